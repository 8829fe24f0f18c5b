"""The error that every reader raises for unusable rows."""

from __future__ import annotations


class DataError(ValueError):
    """Input that cannot be trained on.

    The message names the file, column, row (counted from 0 within the file) and value, and says
    what to do.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str,
        remedy: str,
        column: str | None = None,
        row: int | None = None,
    ) -> None:
        where = [file]
        if column is not None:
            where.append(f"column {column!r}")
        if row is not None:
            where.append(f"row {row}")
        super().__init__(f"{', '.join(where)}: {problem}. {remedy}")
        self.file = file
        self.column = column
        self.row = row
