"""The planner's configuration."""

from __future__ import annotations

import pytest

from torchrec_fmp.planning.planner import PlannerConfig


def test_an_unknown_sharding_type_is_refused_and_named() -> None:
    with pytest.raises(ValueError, match=r"unknown sharding types \['row_wize'\]"):
        PlannerConfig(sharding_types=["row_wize"])
