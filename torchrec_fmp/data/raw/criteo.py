"""Criteo's display advertising logs: TSV without a header, plain or compressed."""

from __future__ import annotations

from collections.abc import Sequence

from torchrec_fmp.data.raw.delimited import DelimitedTable, Dialect
from torchrec_fmp.data.raw.table import RawColumns

_COLUMNS = RawColumns(
    label="label",
    dense=tuple(f"I{number}" for number in range(1, 14)),
    sparse=tuple(f"C{number}" for number in range(1, 27)),
)
_DIALECT = Dialect("\t", quoted=False, names=("label", *_COLUMNS.dense, *_COLUMNS.sparse))


def criteo_table(files: Sequence[str]) -> DelimitedTable:
    """Each line has a label, 13 integers I1 .. I13 and 26 hexadecimal strings C1 .. C26."""
    return DelimitedTable(files, _DIALECT, _COLUMNS)
