"""The command line: `torchrec-fmp VERB ...`.

Each verb imports what it needs when it runs, so that `doctor` works where torch does not.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status: 0 done, 1 failed, 2 wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="torchrec-fmp", description="Feature pruning for TorchRec, inside the training job."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    run = verbs.add_parser("run", help="pretrain with gates, prune, continue")
    run.add_argument("config", help="YAML file; options override it: --train.batch_size 512")
    run.add_argument("--out", required=True, help="run directory, new or empty")
    # Not abbreviated, because `--seed` is an option of a run.
    evaluate = verbs.add_parser(
        "evaluate", help="the same run over seeds: how much they change", allow_abbrev=False
    )
    evaluate.add_argument("config", help="YAML file; options override it, as for run")
    evaluate.add_argument("--seeds", type=int, default=5, help="number of them, from 0 on")
    evaluate.add_argument("--out", help="directory for stability.json, new or empty")
    verbs.add_parser("prepare", help="raw files to the Parquet that training reads", add_help=False)
    plan = verbs.add_parser("plan", help="what a prune would do to plan, memory and step time")
    plan.add_argument("config", help="YAML file of a what-if or a run; options override it")
    plan.add_argument("--drop", nargs="+", action="extend", default=[], metavar="FEATURE")
    plan.add_argument("--selection", help="selection.json; what it drops is dropped")
    plan.add_argument("--keep-fraction", type=float, help="of the features of each what-if group")
    plan.add_argument("--json", help="file for the figures")
    verbs.add_parser("doctor", help="check the installed versions, and say how to fix them")
    known, rest = parser.parse_known_args(arguments)
    if rest and known.verb == "doctor":
        parser.error(f"doctor takes no arguments, but got {rest}")
    if known.verb == "doctor":
        from torchrec_fmp import doctor

        return doctor.main()
    _set_up_logging()
    if known.verb == "prepare":
        return _prepare(rest)
    if known.verb == "plan":
        return _plan(known, rest)
    if known.verb == "evaluate":
        return _evaluate(known.config, known.seeds, known.out, rest)
    return _run(known.config, known.out, rest)


def _run(config_path: str, out: str, overrides: Sequence[str]) -> int:
    from torchrec_fmp.config import load_config

    try:
        config, composed = load_config(config_path, overrides)
    except (OSError, ValueError) as error:
        return _fail(error, status=2)

    from torchrec_fmp.pipeline import Pipeline
    from torchrec_fmp.ranks import process_group
    from torchrec_fmp.result import format_report, result_of
    from torchrec_fmp.run_directory import RunDirectory

    _quiet_libraries()
    with process_group() as ranks:
        directory = RunDirectory(out, writes=ranks.speaks)
        try:
            directory.create()
            directory.write_text("config.yaml", composed)
            if ranks.speaks:
                sys.stdout.write(f"{ranks}\n")
            outcome = Pipeline(config, ranks, directory).run()
        except (ValueError, RuntimeError, OSError) as error:
            if logging.getLogger().isEnabledFor(logging.DEBUG):
                raise
            return _fail(error, status=1)
        result = result_of(outcome, config, ranks)
        directory.write_json("result.json", result)
        if ranks.speaks:
            sys.stdout.write(format_report(result, config.data.truth, out))
    return 0


def _evaluate(config_path: str, seeds: int, out: str | None, overrides: Sequence[str]) -> int:
    from torchrec_fmp.config import ConfigError, RunConfig, load_config

    def composed(seed: int) -> tuple[RunConfig, str]:
        return load_config(config_path, [*overrides, "--reference", "true", "--seed", str(seed)])

    try:
        if seeds < 2:
            raise ConfigError(f"--seeds is {seeds}: at least 2 can be compared")
        if any(option.split("=")[0] == "--seed" for option in overrides):
            raise ConfigError("evaluate runs the seeds from 0 on: give --seeds instead of --seed")
        _, text = composed(0)
    except (OSError, ValueError) as error:
        return _fail(error, status=2)

    from torchrec_fmp.ranks import process_group
    from torchrec_fmp.run_directory import RunDirectory
    from torchrec_fmp.seeds import run_seeds
    from torchrec_fmp.stability import format_stability, stability_of

    _quiet_libraries()
    with process_group() as ranks:
        directory = RunDirectory(out, writes=ranks.speaks) if out else None
        try:
            if directory:
                directory.create()
                directory.write_text("config.yaml", text)
            if ranks.speaks:
                sys.stdout.write(f"{ranks}\n")
            runs, labels = run_seeds(lambda seed: composed(seed)[0], range(seeds), ranks)
        except (ValueError, RuntimeError, OSError) as error:
            if logging.getLogger().isEnabledFor(logging.DEBUG):
                raise
            return _fail(error, status=1)
        if ranks.speaks:
            stability = stability_of(runs, labels, ranks.world_size)
            sys.stdout.write(format_stability(stability))
            if directory:
                directory.write_json("stability.json", stability)
                sys.stdout.write(f"written    {out}\n")
    return 0


def _plan(known: argparse.Namespace, overrides: Sequence[str]) -> int:
    from torchrec_fmp.config import ConfigError
    from torchrec_fmp.planning.dry_run import Request, run
    from torchrec_fmp.planning.report import format_what_if, write_json

    _quiet_libraries()
    request = Request(known.config, known.drop, known.selection, known.keep_fraction, overrides)
    try:
        result = run(request)
        if known.json:
            write_json(result, known.json)
    except (ConfigError, FileNotFoundError) as error:
        return _fail(error, status=2)
    except (ValueError, TypeError, OSError) as error:
        return _fail(error, status=1)
    sys.stdout.write(format_what_if(result))
    return 0


def _prepare(arguments: Sequence[str]) -> int:
    from jsonargparse import ArgumentParser

    from torchrec_fmp.data.prepare import PrepareConfig, prepare

    parser = ArgumentParser(prog="torchrec-fmp prepare")
    parser.add_argument("format", type=str, help="criteo, avazu, movielens, csv, tsv or parquet")
    parser.add_argument("inputs", nargs="+", type=str, help="raw files or directories")
    parser.add_class_arguments(PrepareConfig, skip={"format", "inputs"})
    settings = parser.parse_args(list(arguments))
    options = {name: getattr(settings, name) for name in PrepareConfig.__dataclass_fields__}
    try:
        config = PrepareConfig(**options)
    except ValueError as error:
        return _fail(error, status=2)
    try:
        schema = prepare(config)
    except (ValueError, OSError) as error:
        return _fail(error, status=1)
    sys.stdout.write(
        f"{settings.out}: {len(schema.dense)} dense and {len(schema.sparse)} sparse columns, "
        f"{sum(column.num_embeddings for column in schema.sparse):,} ids\n"
    )
    return 0


def _set_up_logging() -> None:
    """TORCHREC_FMP_LOG=debug shows everything, and tracebacks instead of one-line errors."""
    level = os.environ.get("TORCHREC_FMP_LOG", "warning").upper()
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    if level != "DEBUG":
        warnings.filterwarnings("ignore", module=r"(torch|torchrec|fbgemm_gpu)\b")


def _quiet_libraries() -> None:
    """After their import, which sets levels of its own."""
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        return
    # TorchRec's advice to its own developers, on every plan and every sharded module.
    for name in ("torchrec", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """TorchRec's planner warns, by the root logger, of each data-parallel table in every plan."""
    return not record.getMessage().startswith("Sharding spec not found")


def _fail(error: Exception, status: int) -> int:
    # One line, so that it is found whole among the lines of other ranks.
    message = " ".join(line.strip() for line in str(error).splitlines())
    sys.stderr.write(f"torchrec-fmp: {type(error).__name__}: {message}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
