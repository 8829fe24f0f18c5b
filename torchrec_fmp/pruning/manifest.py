"""`Manifest`: what a prune did, or would do."""

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
    """Something before a prune and after it; made of the pair."""

    __slots__ = ()

    @property
    def before(self) -> _T:
        return self[0]

    @property
    def after(self) -> _T:
        return self[1]

    def describe(self, value: Callable[[_T], Any] = lambda value: value) -> dict[str, Any]:
        """Plain data for reports, with `value` of each."""
        return {"before": value(self.before), "after": value(self.after)}


@dataclass(frozen=True)
class Manifest:
    """What a prune did, or would do.

    Args:
        selection: the decisions.
        dense_columns: fqn of a module that reads gated dense columns -> the columns it reads now,
            in order; give the pruned model these.
        tables: number of embedding tables, before and after.
        table_bytes: of all embedding tables, before and after.
        parameters: before and after, tables included.
        plans: TorchRec's plans, before and after.
        estimates: by TorchRec's planner, of both plans; None with another planner.
        comparison: of staying and moving, where the plan was chosen by it.
        link_bytes: (ranks, ranks) int64, tables and the state of fused optimizers, from each rank
            to each; the diagonal is copied where it is.
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
        """Bytes that go from one rank to another."""
        return moved_bytes(self.link_bytes)

    def describe(self) -> dict[str, Any]:
        """Plain data for reports: everything but the decisions, which have a file of their own."""
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
