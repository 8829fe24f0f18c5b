"""Process groups: which ranks there are, and how they agree."""

from __future__ import annotations
