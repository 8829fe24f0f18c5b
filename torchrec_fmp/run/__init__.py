"""`torchrec-fmp run`: its configuration, its three phases, and what they leave behind."""

from __future__ import annotations
