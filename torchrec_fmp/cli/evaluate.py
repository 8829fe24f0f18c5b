"""`torchrec-fmp evaluate`: the same run with several seeds, and how much the results differ."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from torchrec_fmp.cli.terminal import fail, quiet_libraries, shows_everything
from torchrec_fmp.distributed.ranks import process_group
from torchrec_fmp.report.stability import format_stability
from torchrec_fmp.run.config import RunConfig, load_config
from torchrec_fmp.run.directory import RunDirectory
from torchrec_fmp.run.seeds import run_seeds
from torchrec_fmp.run.stability import stability_of
from torchrec_fmp.strict import ConfigError


def main(arguments: Sequence[str]) -> int:
    """Runs the verb; returns the exit status."""
    # No abbreviations, because `--seed` is an option of a run.
    parser = argparse.ArgumentParser(prog="torchrec-fmp evaluate", allow_abbrev=False)
    parser.add_argument("config", help="YAML file; options override it, as for run")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, which start at 0")
    parser.add_argument("--out", help="directory for stability.json, new or empty")
    known, overrides = parser.parse_known_args(arguments)

    def composed(seed: int) -> tuple[RunConfig, str]:
        options = [*overrides, "--reference", "true", "--seed", str(seed)]
        return load_config(known.config, options)

    try:
        if known.seeds < 2:
            raise ConfigError(f"--seeds is {known.seeds}; it must be at least 2 for a comparison")
        if any(option.split("=")[0] == "--seed" for option in overrides):
            raise ConfigError("evaluate runs seeds from 0 upwards: give --seeds instead of --seed")
        _, text = composed(0)
    except (OSError, ValueError) as error:
        return fail(error, status=2)
    quiet_libraries()
    return _evaluate(lambda seed: composed(seed)[0], text, known.seeds, known.out)


def _evaluate(config_of: Callable[[int], RunConfig], text: str, seeds: int, out: str | None) -> int:
    with process_group() as ranks:
        directory = RunDirectory(out, writes=ranks.speaks) if out else None
        try:
            if directory:
                directory.create()
                directory.write_text("config.yaml", text)
            if ranks.speaks:
                sys.stdout.write(f"{ranks}\n")
            runs, labels = run_seeds(config_of, range(seeds), ranks)
        except (ValueError, RuntimeError, OSError) as error:
            if shows_everything():
                raise
            return fail(error, status=1)
        if ranks.speaks:
            stability = stability_of(runs, labels, ranks.world_size)
            sys.stdout.write(format_stability(stability))
            if directory:
                directory.write_json("stability.json", stability)
                sys.stdout.write(f"written    {out}\n")
    return 0
