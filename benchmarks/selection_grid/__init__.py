"""The parts of `benchmarks/selection.py`, from the settings to the report."""

from __future__ import annotations
