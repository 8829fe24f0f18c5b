"""`torchrec-fmp run`: its configuration, its three phases, and their results."""

from __future__ import annotations
