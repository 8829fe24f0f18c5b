"""`Manifest`: the record of a prune or of a dry run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from torchrec.distributed.types import ShardingPlan

from torchrec_fmp.planning.estimates import PlanEstimate
from torchrec_fmp.planning.planner import describe_plan
from torchrec_fmp.planning.replan import Comparison, moved_bytes
from torchrec_fmp.selection.selection import Selection

_T = TypeVar("_T")


class BeforeAfter(tuple[_T, _T]):
    """A value before and after a prune, constructed from the pair."""

    __slots__ = ()

    @property
    def before(self) -> _T:
        return self[0]

    @property
    def after(self) -> _T:
        return self[1]

    def describe(self, value: Callable[[_T], Any] = lambda value: value) -> dict[str, Any]:
        """Plain data for reports, with `value` applied to each."""
        return {"before": value(self.before), "after": value(self.after)}


@dataclass(frozen=True)
class Manifest:
    """The record of a prune or of a dry run.

    Args:
        selection: decisions of the prune.
        dense_columns: fqn of a module that reads gated dense columns -> the columns it reads now,
            in order; give the pruned model these columns.
        tables: number of embedding tables, before and after.
        table_bytes: bytes of all embedding tables, before and after.
        parameters: number of parameters, including tables, before and after.
        plans: TorchRec's plans, before and after.
        estimates: TorchRec's estimates of both plans; None with another planner.
        comparison: comparison of staying and moving, if it decided the plan.
        link_bytes: (ranks, ranks) int64 bytes of tables and fused optimizer states, from each rank
            to each; the diagonal is copied within its rank.
        staging: whether the old tables went through host memory.
        parity_max_abs: max abs difference of the outputs over all ranks; None without a batch, and
            before the prune.
    """

    selection: Selection
    dense_columns: Mapping[str, tuple[str, ...]]
    tables: BeforeAfter[int]
    table_bytes: BeforeAfter[int]
    parameters: BeforeAfter[int]
    plans: BeforeAfter[ShardingPlan]
    estimates: BeforeAfter[PlanEstimate] | None
    comparison: Comparison | None
    link_bytes: NDArray[np.int64]
    staging: Literal["none", "host"]
    parity_max_abs: float | None = None

    @property
    def moved_bytes(self) -> int:
        """Bytes that move from one rank to another."""
        return moved_bytes(self.link_bytes)

    def describe(self) -> dict[str, Any]:
        """Plain data for reports, without the decisions, which have a separate file."""
        return {
            "dropped": self.selection.dropped,
            "dense_columns": {fqn: list(names) for fqn, names in self.dense_columns.items()},
            "tables": self.tables.describe(),
            "table_bytes": self.table_bytes.describe(),
            "parameters": self.parameters.describe(),
            "plans": self.plans.describe(describe_plan),
            "estimates": self.estimates and self.estimates.describe(PlanEstimate.describe),
            "comparison": self.comparison and self.comparison.describe(),
            "moved_bytes": self.moved_bytes,
            "copied_bytes": int(np.trace(self.link_bytes)),
            "staging": self.staging,
            "parity_max_abs": self.parity_max_abs,
        }
