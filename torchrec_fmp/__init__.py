"""Feature pruning for TorchRec, inside the training job.

A model goes through::

    attach_gates(model, GateConfig())          every feature gets a hard concrete gate
    DistributedModelParallel(model, sharders=sharders(...))
    loss + GateSchedule(...).loss_term(step)   pretrain on a small part of the data
    decide(gate_scores(dmp), ClosedGates())    which features go: a Selection, plain JSON
    prune(dmp, optimizer, selection, ...)      the smaller model, weights and state carried over
    ... and training goes on
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchrec_fmp.gates.attach import attach_gates as attach_gates
    from torchrec_fmp.gates.attach import feature_gates as feature_gates
    from torchrec_fmp.gates.attach import gate_optimizer as gate_optimizer
    from torchrec_fmp.gates.feature_gates import GateConfig as GateConfig
    from torchrec_fmp.gates.hard_concrete import HardConcrete as HardConcrete
    from torchrec_fmp.gates.penalty import L0Penalty as L0Penalty
    from torchrec_fmp.gates.penalty import TargetPenalty as TargetPenalty
    from torchrec_fmp.gates.sharded import sharders as sharders
    from torchrec_fmp.manifest import Manifest as Manifest
    from torchrec_fmp.planning.costs import TableCost as TableCost
    from torchrec_fmp.planning.costs import costs as costs
    from torchrec_fmp.planning.costs import table_costs as table_costs
    from torchrec_fmp.policies.closed_gates import ClosedGates as ClosedGates
    from torchrec_fmp.policies.from_file import FromFile as FromFile
    from torchrec_fmp.policies.policy import decide as decide
    from torchrec_fmp.policies.selection import Selection as Selection
    from torchrec_fmp.policies.top_budget import TopBudget as TopBudget
    from torchrec_fmp.policies.top_fraction import TopFraction as TopFraction
    from torchrec_fmp.preparation import dry_run as dry_run
    from torchrec_fmp.pruning import ParityError as ParityError
    from torchrec_fmp.pruning import prune as prune
    from torchrec_fmp.reshard.reshard import MoveConfig as MoveConfig
    from torchrec_fmp.scores.gate_scores import gate_scores as gate_scores
    from torchrec_fmp.surgery.dense import cut_linear as cut_linear
    from torchrec_fmp.surgery.dense import kept_columns as kept_columns
    from torchrec_fmp.surgery.rules import Cutter as Cutter
    from torchrec_fmp.surgery.rules import cut_rule as cut_rule
    from torchrec_fmp.surgery.rules import join_fqn as join_fqn
    from torchrec_fmp.surgery.tables import cut_tables as cut_tables
    from torchrec_fmp.train import GateSchedule as GateSchedule

# Imported at first use, so that `torchrec-fmp doctor` runs where torch cannot be imported.
_HOMES = {
    "dry_run": "preparation",
    "attach_gates": "gates.attach",
    "feature_gates": "gates.attach",
    "gate_optimizer": "gates.attach",
    "GateConfig": "gates.feature_gates",
    "HardConcrete": "gates.hard_concrete",
    "L0Penalty": "gates.penalty",
    "TargetPenalty": "gates.penalty",
    "sharders": "gates.sharded",
    "TableCost": "planning.costs",
    "costs": "planning.costs",
    "table_costs": "planning.costs",
    "ClosedGates": "policies.closed_gates",
    "FromFile": "policies.from_file",
    "decide": "policies.policy",
    "Selection": "policies.selection",
    "TopBudget": "policies.top_budget",
    "TopFraction": "policies.top_fraction",
    "Manifest": "manifest",
    "ParityError": "pruning",
    "prune": "pruning",
    "MoveConfig": "reshard.reshard",
    "gate_scores": "scores.gate_scores",
    "cut_linear": "surgery.dense",
    "kept_columns": "surgery.dense",
    "Cutter": "surgery.rules",
    "cut_rule": "surgery.rules",
    "join_fqn": "surgery.rules",
    "cut_tables": "surgery.tables",
    "GateSchedule": "train",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
