"""`torchrec-fmp plan`: what a prune would do to plan, memory and step time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torchrec_fmp.cli.terminal import fail, quiet_libraries
from torchrec_fmp.report.plan import format_what_if, write_json
from torchrec_fmp.run.what_if_request import Request, run
from torchrec_fmp.strict import ConfigError


def main(arguments: Sequence[str]) -> int:
    """Runs the verb; returns the exit status."""
    parser = argparse.ArgumentParser(prog="torchrec-fmp plan")
    parser.add_argument("config", help="YAML file of a what-if or a run; options override it")
    parser.add_argument("--drop", nargs="+", action="extend", default=[], metavar="FEATURE")
    parser.add_argument("--selection", help="selection.json with the features to drop")
    parser.add_argument(
        "--keep-fraction", type=float, help="fraction of each what-if group's features to keep"
    )
    parser.add_argument("--json", help="JSON file for the figures")
    known, overrides = parser.parse_known_args(arguments)
    quiet_libraries()
    request = Request(known.config, known.drop, known.selection, known.keep_fraction, overrides)
    try:
        result = run(request)
        if known.json:
            write_json(result, known.json)
    except (ConfigError, FileNotFoundError) as error:
        return fail(error, status=2)
    except (ValueError, TypeError, OSError) as error:
        return fail(error, status=1)
    sys.stdout.write(format_what_if(result))
    return 0
