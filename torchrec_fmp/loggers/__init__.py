"""Where the figures of a running job go."""

from __future__ import annotations
