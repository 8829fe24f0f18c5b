"""Optimizer states of tables that the dense optimizer trains, before or after.

A data-parallel table, or a shard on the dense kernel, is a parameter, whose states lie in a
`torch.optim` optimizer; those of other shards lie in FBGEMM's fused optimizer. Both give them the
same names: `sum`, `exp_avg`, `exp_avg_sq`. So a table's states move from shard to shard, wherever
they lie; where dense and fused optimizer differ, a shard of D columns first gets them as they were,
and then converts them:

- one value an element, or one a row, on both sides: copied;
- element to row: the mean over the columns of the shard. Row-wise Adagrad accumulates the mean over
  a row's g², and sum_t mean_d(g²) = mean_d(sum_t g²), so this is what it would have accumulated
  from the same gradients; so for the running mean of partial row-wise Adam, which is linear too;
- row to element: the row's value in every column. If the table was split by columns, each shard has
  a value of its own; the row's is their mean weighted by width.

The step is carried, in the form that the optimizer keeps (tensor or number). From fused to dense or
back hyperparameters are not: those of the place that a table gets to apply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_fmp.distributed.agreement import all_or_none
from torchrec_fmp.embeddings.fqns import own_parameters
from torchrec_fmp.embeddings.local_shards import LocalShard
from torchrec_fmp.reshard.dense_optimizer import Crossed, ParamGroup, param_groups
from torchrec_fmp.reshard.dense_state import DenseState, sample_state
from torchrec_fmp.reshard.tables import Layout, Tables, from_one_rank_each
from torchrec_fmp.surgery.cut_map import CutMap


def with_dense_states(
    current: Tables, optimizer: Optimizer, group: dist.ProcessGroup, timeout: timedelta
) -> Tables:
    """The tables of a model with what the dense optimizer keeps of them.

    Collective.

    Args:
        current: without.
        optimizer: that holds the dense tables, if any does.
        group: of the model.
        timeout: of the wait for the slowest rank.

    Returns:
        The tables. The states are views; those that do not belong to rows are left out.
    """
    if not current.dense:
        return current
    local = dict(current.local)
    forms: dict[str, DenseState] = {}
    with all_or_none("reading the dense optimizer's states", group, timeout):
        held = {
            parameter: state
            for held_in in param_groups(optimizer)
            for parameter, state in held_in.optimizer.state.items()
        }
        for fqn in current.dense:
            for i, shard in enumerate(current.local[fqn]):
                state = held.get(shard.parameter, {})
                forms[fqn] = DenseState.of(shard.parameter.shape, state)
                states = {name: shard.part_of(state[name]) for name in forms[fqn].by_rows}
                local[fqn] = [*local[fqn][:i], replace(shard, states=states), *local[fqn][i + 1 :]]
    layouts = dict(current.layouts)
    dense_shards = {fqn: current.shards[fqn] for fqn in current.dense}
    for fqn, form in from_one_rank_each(
        dense_shards, lambda fqn: forms[fqn], group, timeout
    ).items():
        layouts[fqn] = replace(layouts[fqn], states=form.layout, step=form.step, form=form)
    return replace(current, layouts=layouts, local=local)


@dataclass(frozen=True)
class Crossing:
    """Tables that the dense optimizer trains before or after they move.

    Args:
        old: the tables to move from.
        new: the tables to move to; their states have the old ones' form.
        filled: fqn after -> this rank's shards with the states that they are to have; those of
            `new` are the same where no conversion is needed.
        states: fqn after -> what the dense optimizer is to keep of this rank's part of a table.
        groups: fqn after -> the param group that takes a table from the fused optimizer.
        left: fqns after of the tables that leave the dense optimizer.
    """

    old: Tables
    new: Tables
    filled: Mapping[str, list[LocalShard]]
    states: Mapping[str, dict[str, Any]]
    groups: Mapping[str, dict[str, Any]]
    left: frozenset[str]

    @torch.no_grad()
    def finish(self) -> Crossed:
        """Converts the new tables' states, once the tables have moved.

        Returns:
            What the dense optimizer is to take.
        """
        for fqn, shards in self.filled.items():
            for moved, shard in zip(self.new.local[fqn], shards, strict=True):
                for name, state in moved.states.items():
                    target = shard.states[name]
                    if target is not state:
                        target.copy_(converted(state, shard.box.columns, target.dim() == 1))
        return Crossed(self.states, self.groups, self.left)


def crossing(
    old: Tables,
    new: Tables,
    cut_map: CutMap,
    optimizer: Optimizer,
    model: DistributedModelParallel,
) -> Crossing:
    """Pairs the dense optimizer's states with the fused ones', before anything moves.

    A table that comes to the dense optimizer goes to the first param group that holds tables of the
    old model, or, if there is none, to the first that holds dense parameters that survive.

    Args:
        old: the tables before, from `with_dense_states`.
        new: the tables after; not changed.
        cut_map: gives each new table's source.
        optimizer: of the old model's dense parameters.
        model: the old one.

    Raises:
        ValueError: if a table would get other states than it has, or the optimizer has no place for
            it.
    """
    found = _Search(old, new, cut_map, optimizer, model)
    old_layouts, new_layouts = dict(old.layouts), dict(new.layouts)
    old_local, new_local = dict(old.local), dict(new.local)
    filled, states, groups, left = {}, {}, {}, set()
    for fqn in new.shards:
        source = cut_map.tensors[fqn].source
        before, after = old.layouts[source], new.layouts[fqn]
        was_dense, is_dense = source in old.dense, fqn in new.dense
        if not was_dense and not is_dense:
            continue
        if was_dense and is_dense and np.array_equal(old.shards[source], new.shards[fqn]):
            # Each rank keeps its own, of whatever shape, with the other dense parameters.
            old_layouts[source] = replace(before, states={})
            old_local[source] = [replace(shard, states={}) for shard in old.local[source]]
            continue
        if was_dense:
            _check_form(source, before, old.local[source])
        if is_dense:
            form = before.form
            if not was_dense:
                destination = found.destination(fqn)
                form = sample_state(fqn, destination, before.dtype, model.device)
                _check_names(fqn, form, set(before.states), destination)
                groups[fqn], form = destination.group, form.at(before.step)
            assert form is not None
            states[fqn], filled[fqn] = _new_states(form, new.local[fqn])
        else:
            found.check_leaving(fqn)
            left.add(fqn)
            filled[fqn] = new.local[fqn]
            old_layouts[source] = replace(before, **_schedule(old))
        new_layouts[fqn] = replace(after, states=before.states)
        new_local[fqn] = [_in_form_of(before, shard) for shard in filled[fqn]]
    return Crossing(
        replace(old, layouts=old_layouts, local=old_local),
        replace(new, layouts=new_layouts, local=new_local),
        filled,
        states,
        groups,
        frozenset(left),
    )


def converted(state: Tensor, columns: int, by_row: bool) -> Tensor:
    """A shard's state in the other form.

    Args:
        state: (rows,) or (rows, columns).
        columns: of the shard.
        by_row: whether one value a row is wanted.

    Returns:
        (rows,) or (rows, columns); may be a view.
    """
    if state.dim() == 1:
        return state if by_row else state.unsqueeze(1).expand(-1, columns)
    return state.float().mean(1) if by_row else state


def _new_states(
    form: DenseState, shards: list[LocalShard]
) -> tuple[dict[str, Any], list[LocalShard]]:
    """What the dense optimizer keeps of this rank's shards, and the shards with their parts."""
    if not shards:
        return {}, []
    # All of them lie in one parameter.
    state = form.zeros(shards[0].parameter)
    return state, [
        replace(shard, states={name: shard.part_of(state[name]) for name in form.by_rows})
        for shard in shards
    ]


def _in_form_of(before: Layout, shard: LocalShard) -> LocalShard:
    """The shard with the states that the table had, in other tensors where their form differs."""
    states = {}
    # The dense optimizer may not have started, and a shard without rows has no states.
    for name in before.states.keys() & shard.states.keys():
        state, (dtype, by_row) = shard.states[name], before.states[name]
        if state.dtype != dtype or (state.dim() == 1) != by_row:
            shape = shard.box[2 : 3 if by_row else 4]
            state = torch.zeros(shape, dtype=dtype, device=shard.weight.device)
        states[name] = state
    return replace(shard, states=states)


def _schedule(old: Tables) -> dict[str, Any]:
    """Learning rate and scheduler's settings that all fused tables of the old model share."""
    fused = [layout for fqn, layout in old.layouts.items() if fqn not in old.dense]
    settings = [
        {"learning_rate": layout.learning_rate, "hyperparameters": layout.hyperparameters}
        for layout in fused
    ]
    return settings[0] if settings and all(other == settings[0] for other in settings) else {}


def _check_form(fqn: str, layout: Layout, shards: list[LocalShard]) -> None:
    """Sees whether the states of a table of the dense optimizer can move."""
    assert layout.form is not None
    if layout.form.odd:
        raise ValueError(
            f"{fqn} cannot be sharded otherwise: the dense optimizer keeps "
            f"{list(layout.form.odd)}, which have no value for each row. Use an optimizer with one "
            "value an element or a row, or leave the table where it is with "
            'prune(..., replan="sticky")'
        )
    for shard in shards:
        if shard.states.keys() != layout.states.keys():
            raise ValueError(
                f"{fqn} has the states {sorted(shard.states)} in this rank's optimizer, and "
                f"{sorted(layout.states)} on the first rank that holds it: train all ranks alike"
            )


def _check_names(fqn: str, form: DenseState, fused: set[str], held_in: ParamGroup) -> None:
    if form.names != fused or form.odd or form.others.keys() & form.names:
        raise ValueError(
            f"{fqn} changes between dense and fused optimizer: {type(held_in.optimizer).__name__} "
            f"keeps the states {sorted(form.names)} of it, the fused optimizer {sorted(fused)}. "
            "Give both the same states, or leave the table where it is: with "
            'prune(..., replan="sticky"), or a planner whose ParameterConstraints (PlannerConfig) '
            "do not have data_parallel and the dense kernel where the old plan had not"
        )


@dataclass(frozen=True)
class _Search:
    """Finds tables in the dense optimizer. Arguments are those of `crossing`."""

    old: Tables
    new: Tables
    cut_map: CutMap
    optimizer: Optimizer
    model: DistributedModelParallel

    def check_leaving(self, fqn: str) -> None:
        """Sees whether the fused optimizer can take the states of a table."""
        source = self.cut_map.tensors[fqn].source
        fused = set(self.new.layouts[fqn].states)
        # A rank that does not hold the table has an empty parameter for it.
        _, parameter = own_parameters(self.model)[source]
        for held_in in param_groups(self.optimizer):
            if any(held is parameter for held in held_in.group["params"]):
                before = self.old.layouts[source]
                form = before.form
                if form is None or not form.names:  # As before the first step.
                    form = sample_state(fqn, held_in, before.dtype, self.model.device)
                _check_names(fqn, form, fused, held_in)
                return
        if fused:
            raise ValueError(
                f"{fqn} goes to the fused optimizer, which keeps {sorted(fused)}, but the "
                "optimizer given does not hold its parameter: pass the one that trained it, or a "
                "plan that leaves the table as it is"
            )

    def destination(self, fqn: str) -> ParamGroup:
        """Where the dense optimizer takes a table that comes from the fused one."""
        survivors = {
            tensor_cut.source
            for tensor_cut in self.cut_map.tensors.values()
            if tensor_cut.source not in self.old.shards
        }
        named = own_parameters(self.model)
        groups = list(param_groups(self.optimizer))
        for wanted in (self.old.dense, survivors):
            parameters = {parameter for own, (_, parameter) in named.items() if own in wanted}
            for group in groups:
                if any(parameter in parameters for parameter in group.group["params"]):
                    return group
        raise ValueError(
            f"{fqn} comes to the dense optimizer, which has to train it, but no param group of the "
            "optimizer given holds tables or dense parameters: pass the dense optimizer, too (in a "
            "CombinedOptimizer), or a plan that leaves the table as it is"
        )
