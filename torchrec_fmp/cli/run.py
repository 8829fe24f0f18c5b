"""`torchrec-fmp run`: pretrain with gates, prune, continue."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torchrec_fmp.cli.terminal import fail, quiet_libraries, shows_everything
from torchrec_fmp.distributed.ranks import process_group
from torchrec_fmp.report.text import format_report
from torchrec_fmp.run.config import RunConfig, load_config
from torchrec_fmp.run.directory import RunDirectory
from torchrec_fmp.run.pipeline import Pipeline
from torchrec_fmp.run.result import result_of


def main(arguments: Sequence[str]) -> int:
    """Runs the verb; returns the exit status."""
    parser = argparse.ArgumentParser(prog="torchrec-fmp run")
    parser.add_argument("config", help="YAML file; options override it: --train.batch_size 512")
    parser.add_argument("--out", required=True, help="run directory, new or empty")
    known, overrides = parser.parse_known_args(arguments)
    try:
        config, composed = load_config(known.config, overrides)
    except (OSError, ValueError) as error:
        return fail(error, status=2)
    quiet_libraries()
    return _run(config, composed, known.out)


def _run(config: RunConfig, composed: str, out: str) -> int:
    with process_group() as ranks:
        directory = RunDirectory(out, writes=ranks.speaks)
        try:
            directory.create()
            directory.write_text("config.yaml", composed)
            if ranks.speaks:
                sys.stdout.write(f"{ranks}\n")
            outcome = Pipeline(config, ranks, directory).run()
        except (ValueError, RuntimeError, OSError) as error:
            if shows_everything():
                raise
            return fail(error, status=1)
        result = result_of(outcome, config, ranks)
        directory.write_json("result.json", result)
        if ranks.speaks:
            sys.stdout.write(format_report(result, config.data.truth, out))
    return 0
