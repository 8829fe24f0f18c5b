"""Which features stay: scores, costs, policies, schedules, and the `Selection` itself."""

from __future__ import annotations
