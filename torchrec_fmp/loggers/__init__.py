"""Loggers for the metrics of a running job."""

from __future__ import annotations
