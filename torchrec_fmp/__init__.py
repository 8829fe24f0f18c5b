"""Feature pruning for TorchRec, inside the training job.

A model goes through::

    attach_gates(model, GateConfig())          every feature gets a hard concrete gate
    DistributedModelParallel(model, sharders=sharders(...))
    loss + GateSchedule(...).loss_term(step)   pretrain on a small part of the data
    decide(gate_scores(dmp), ClosedGates())    which features to drop: a Selection, plain JSON
    prune(dmp, optimizer, selection, ...)      the smaller model, weights and state carried over
    ... and training continues
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchrec_fmp.embeddings.fqns import join_fqn as join_fqn
    from torchrec_fmp.gates.attach import attach_gates as attach_gates
    from torchrec_fmp.gates.attach import feature_gates as feature_gates
    from torchrec_fmp.gates.attach import gate_optimizer as gate_optimizer
    from torchrec_fmp.gates.feature_gates import GateConfig as GateConfig
    from torchrec_fmp.gates.hard_concrete import HardConcrete as HardConcrete
    from torchrec_fmp.gates.penalty import L0Penalty as L0Penalty
    from torchrec_fmp.gates.penalty import TargetPenalty as TargetPenalty
    from torchrec_fmp.gates.schedule import GateSchedule as GateSchedule
    from torchrec_fmp.gates.scores import gate_scores as gate_scores
    from torchrec_fmp.gates.sharded import sharders as sharders
    from torchrec_fmp.planning.pricing import costs as costs
    from torchrec_fmp.planning.pricing import table_costs as table_costs
    from torchrec_fmp.pruning.manifest import Manifest as Manifest
    from torchrec_fmp.pruning.parity import ParityError as ParityError
    from torchrec_fmp.pruning.proposal import dry_run as dry_run
    from torchrec_fmp.pruning.prune import prune as prune
    from torchrec_fmp.reshard.reshard import MoveConfig as MoveConfig
    from torchrec_fmp.selection.costs import TableCost as TableCost
    from torchrec_fmp.selection.policies.closed_gates import ClosedGates as ClosedGates
    from torchrec_fmp.selection.policies.from_file import FromFile as FromFile
    from torchrec_fmp.selection.policies.policy import decide as decide
    from torchrec_fmp.selection.policies.top_budget import TopBudget as TopBudget
    from torchrec_fmp.selection.policies.top_fraction import TopFraction as TopFraction
    from torchrec_fmp.selection.selection import Selection as Selection
    from torchrec_fmp.surgery.cut_tables import cut_tables as cut_tables
    from torchrec_fmp.surgery.linear import cut_linear as cut_linear
    from torchrec_fmp.surgery.linear import kept_columns as kept_columns
    from torchrec_fmp.surgery.rules import Cutter as Cutter
    from torchrec_fmp.surgery.rules import cut_rule as cut_rule

# Imported at first use, so that `torchrec-fmp doctor` runs where torch cannot be imported.
_HOMES = {
    "join_fqn": "embeddings.fqns",
    "attach_gates": "gates.attach",
    "feature_gates": "gates.attach",
    "gate_optimizer": "gates.attach",
    "GateConfig": "gates.feature_gates",
    "HardConcrete": "gates.hard_concrete",
    "L0Penalty": "gates.penalty",
    "TargetPenalty": "gates.penalty",
    "GateSchedule": "gates.schedule",
    "gate_scores": "gates.scores",
    "sharders": "gates.sharded",
    "costs": "planning.pricing",
    "table_costs": "planning.pricing",
    "Manifest": "pruning.manifest",
    "ParityError": "pruning.parity",
    "dry_run": "pruning.proposal",
    "prune": "pruning.prune",
    "MoveConfig": "reshard.reshard",
    "TableCost": "selection.costs",
    "ClosedGates": "selection.policies.closed_gates",
    "FromFile": "selection.policies.from_file",
    "decide": "selection.policies.policy",
    "TopBudget": "selection.policies.top_budget",
    "TopFraction": "selection.policies.top_fraction",
    "Selection": "selection.selection",
    "cut_tables": "surgery.cut_tables",
    "cut_linear": "surgery.linear",
    "kept_columns": "surgery.linear",
    "Cutter": "surgery.rules",
    "cut_rule": "surgery.rules",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
