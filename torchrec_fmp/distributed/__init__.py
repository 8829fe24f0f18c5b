"""Process groups: the ranks, and how they agree."""

from __future__ import annotations
