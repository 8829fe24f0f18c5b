"""Raw formats that `prepare` reads: one file a format, all behind `RawTable`."""

from __future__ import annotations
