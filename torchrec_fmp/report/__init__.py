"""What a person reads: text and tables of what others computed."""

from __future__ import annotations
