"""The planner's configuration."""

from __future__ import annotations

import pytest

from torchrec_fmp.planning.planner import PlannerConfig


@pytest.mark.parametrize("where", ["sharding_types", "tables"])
def test_sharding_types_that_cannot_be_resharded_are_refused(where: str) -> None:
    value = {"t": ["data_parallel"]} if where == "tables" else ["data_parallel", "table_wise"]
    with pytest.raises(ValueError, match="data_parallel tables train with the dense optimizer"):
        PlannerConfig(**{where: value})  # type: ignore[arg-type]


def test_an_unknown_sharding_type_is_refused_and_named() -> None:
    with pytest.raises(ValueError, match=r"unknown sharding types \['row_wize'\]"):
        PlannerConfig(sharding_types=["row_wize"])
