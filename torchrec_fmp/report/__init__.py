"""Text and tables for people, from results that other packages compute."""

from __future__ import annotations
