"""Raw formats that `prepare` reads: one file per format, all behind `RawTable`."""

from __future__ import annotations
