"""The command line: `torchrec-fmp VERB ...`, one module of this package for each verb."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from torchrec_fmp.cli.terminal import set_up_logging

_VERBS = {
    "run": "pretrain with gates, prune, continue",
    "evaluate": "repeat a run with several seeds and compare the results",
    "prepare": "convert raw files to the Parquet that training reads",
    "plan": "estimate what a prune would do to plan, memory and step time",
    "doctor": "check the installed versions and say how to fix them",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status: 0 done, 1 failed, 2 wrong arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="torchrec-fmp", description="Feature pruning for TorchRec, inside the training job."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, summary in _VERBS.items():
        verbs.add_parser(verb, help=summary, add_help=False)
    verb = parser.parse_args(arguments[:1]).verb
    # Before any import of a library that emits warnings when imported.
    set_up_logging()
    # Imported when it runs, so that `doctor` works where torch does not.
    status: int = import_module(f"torchrec_fmp.cli.{verb}").main(arguments[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
