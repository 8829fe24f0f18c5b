"""The error that every reader raises for rows it cannot use."""

from __future__ import annotations


class DataError(ValueError):
    """Input that cannot be trained on.

    The message says which file, column and row (counted from 0 within the file), which value, and
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
