"""`torchrec-fmp prepare`: converts raw files to the Parquet that training reads."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from torchrec_fmp.cli.terminal import fail
from torchrec_fmp.data.prepare import PrepareConfig, prepare


def main(arguments: Sequence[str]) -> int:
    """Runs the verb; returns the exit status."""
    parser = ArgumentParser(prog="torchrec-fmp prepare")
    parser.add_argument("format", type=str, help="criteo, avazu, movielens, csv, tsv or parquet")
    parser.add_argument("inputs", nargs="+", type=str, help="raw files or directories")
    parser.add_class_arguments(PrepareConfig, skip={"format", "inputs"})
    settings = parser.parse_args(list(arguments))
    options = {name: getattr(settings, name) for name in PrepareConfig.__dataclass_fields__}
    try:
        config = PrepareConfig(**options)
    except ValueError as error:
        return fail(error, status=2)
    try:
        schema = prepare(config)
    except (ValueError, OSError) as error:
        return fail(error, status=1)
    sys.stdout.write(
        f"{settings.out}: {len(schema.dense)} dense and {len(schema.sparse)} sparse columns, "
        f"{sum(column.num_embeddings for column in schema.sparse):,} ids\n"
    )
    return 0
