"""Optimizer states of tables that the dense optimizer trains, before or after the move.

A data-parallel table, or a shard on the dense kernel, is a parameter, and its states lie in a
`torch.optim` optimizer. The states of other shards lie in FBGEMM's fused optimizer. Both optimizers
use the same names: `sum`, `exp_avg`, `exp_avg_sq`. So a table's states move from shard to shard,
wherever they lie. Where dense and fused optimizer differ, a shard of D columns first receives the
states in their old form, and then converts them:

- one value per element, or one per row, on both sides: copied;
- element to row: the mean over the columns of the shard. Row-wise Adagrad accumulates the mean over
  a row's g², and sum_t mean_d(g²) = mean_d(sum_t g²), so the same gradients would have accumulated
  the same value. This also holds for the running mean of partial row-wise Adam, which is linear;
- row to element: the row's value in every column. If the table was split by columns, each shard has
  a separate value; the row's value is their mean weighted by width.

The step is carried, in the form that the optimizer keeps (tensor or number). Hyperparameters are
not carried from fused to dense or back: the hyperparameters of the table's new place apply.
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
    """The tables of a model with their states in the dense optimizer.

    Collective.

    Args:
        current: tables without these states.
        optimizer: optimizer that holds the dense tables, if any does.
        group: process group of the model.
        timeout: time to wait for the slowest rank.

    Returns:
        The tables. Their states are views; states that do not belong to rows are left out.
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
        old: tables to move from.
        new: tables to move to; their states have the form of the old tables' states.
        filled: fqn after -> this rank's shards with their final states; the states in `new` are
            the same where no conversion is needed.
        states: fqn after -> final state of this rank's part of the table in the dense optimizer.
        groups: fqn after -> param group that takes a table from the fused optimizer.
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
            The states and param groups for the dense optimizer.
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

    A table that moves to the dense optimizer joins the first param group that holds tables of the
    old model. If there is none, it joins the first group that holds surviving dense parameters.

    Args:
        old: tables before, from `with_dense_states`.
        new: tables after; not changed.
        cut_map: map that gives each new table's source.
        optimizer: optimizer of the old model's dense parameters.
        model: old model.

    Raises:
        ValueError: if a table would get different states, or the optimizer has no place for it.
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
            # Each rank keeps its own states, of any shape, with the other dense parameters.
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
    """A shard's state with one value per row, or one per element.

    Args:
        state: state to convert, (rows,) or (rows, columns).
        columns: number of columns in the shard.
        by_row: whether the result has one value per row.

    Returns:
        (rows,) or (rows, columns); may be a view.
    """
    if state.dim() == 1:
        return state if by_row else state.unsqueeze(1).expand(-1, columns)
    return state.float().mean(1) if by_row else state


def _new_states(
    form: DenseState, shards: list[LocalShard]
) -> tuple[dict[str, Any], list[LocalShard]]:
    """The dense optimizer's state for this rank's shards, and the shards with their parts of it."""
    if not shards:
        return {}, []
    # All these shards lie in one parameter.
    state = form.zeros(shards[0].parameter)
    return state, [
        replace(shard, states={name: shard.part_of(state[name]) for name in form.by_rows})
        for shard in shards
    ]


def _in_form_of(before: Layout, shard: LocalShard) -> LocalShard:
    """The shard with states in the table's old form, in new tensors where the forms differ."""
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
    """Learning rate and scheduler settings, if all fused tables of the old model share them."""
    fused = [layout for fqn, layout in old.layouts.items() if fqn not in old.dense]
    settings = [
        {"learning_rate": layout.learning_rate, "hyperparameters": layout.hyperparameters}
        for layout in fused
    ]
    return settings[0] if settings and all(other == settings[0] for other in settings) else {}


def _check_form(fqn: str, layout: Layout, shards: list[LocalShard]) -> None:
    """Checks that a table's states in the dense optimizer can move."""
    assert layout.form is not None
    if layout.form.odd:
        raise ValueError(
            f"{fqn} cannot be resharded: the dense optimizer keeps "
            f"{list(layout.form.odd)}, which have no value for each row. Use an optimizer with one "
            "value per element or per row, or leave the table where it is with "
            'prune(..., replan="sticky")'
        )
    for shard in shards:
        if shard.states.keys() != layout.states.keys():
            raise ValueError(
                f"{fqn} has the states {sorted(shard.states)} in this rank's optimizer, but "
                f"{sorted(layout.states)} on another rank that holds it. Train all ranks alike"
            )


def _check_names(fqn: str, form: DenseState, fused: set[str], held_in: ParamGroup) -> None:
    if form.names != fused or form.odd or form.others.keys() & form.names:
        raise ValueError(
            f"{fqn} moves between dense and fused optimizer: {type(held_in.optimizer).__name__} "
            f"keeps the states {sorted(form.names)}, the fused optimizer {sorted(fused)}. Use "
            "optimizers that keep the same states, or leave the table where it is: use "
            'prune(..., replan="sticky"), or a planner whose ParameterConstraints (PlannerConfig) '
            "exclude data_parallel and the dense kernel where the old plan did not use them"
        )


@dataclass(frozen=True)
class _Search:
    """Finds tables in the dense optimizer; the arguments are as in `crossing`."""

    old: Tables
    new: Tables
    cut_map: CutMap
    optimizer: Optimizer
    model: DistributedModelParallel

    def check_leaving(self, fqn: str) -> None:
        """Checks that the fused optimizer can take a table's states."""
        source = self.cut_map.tensors[fqn].source
        fused = set(self.new.layouts[fqn].states)
        # A rank that does not hold the table has an empty parameter for it.
        _, parameter = own_parameters(self.model)[source]
        for held_in in param_groups(self.optimizer):
            if any(held is parameter for held in held_in.group["params"]):
                before = self.old.layouts[source]
                form = before.form
                if form is None or not form.names:  # No state yet: before the first step.
                    form = sample_state(fqn, held_in, before.dtype, self.model.device)
                _check_names(fqn, form, fused, held_in)
                return
        if fused:
            raise ValueError(
                f"{fqn} moves to the fused optimizer, which keeps {sorted(fused)}, but the given "
                "optimizer does not hold its parameter. Pass the optimizer that trained the table, "
                "or a plan that leaves the table where it is"
            )

    def destination(self, fqn: str) -> ParamGroup:
        """The dense optimizer's param group for a table from the fused optimizer."""
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
            f"{fqn} moves to the dense optimizer, which has to train it, but no param group of the "
            "given optimizer holds tables or dense parameters. Pass the dense optimizer too (in a "
            "CombinedOptimizer), or a plan that leaves the table where it is"
        )
