"""Which features are kept: scores, costs, policies, schedules, and the `Selection` itself."""

from __future__ import annotations
