"""Optimizer states of tables that become data-parallel, or that were.

A data-parallel table is a dense parameter, whose states lie in a `torch.optim` optimizer; a sharded
table's lie in FBGEMM's fused optimizer. Both give them the same names: `sum`, `exp_avg`,
`exp_avg_sq`. States are matched by name and converted by shape, for a table of D columns:

- one value an element, or one a row, on both sides: copied;
- element to row: the mean over the columns of the shard. Row-wise Adagrad accumulates the mean over
  a row's g², and sum_t mean_d(g²) = mean_d(sum_t g²), so this is what it would have accumulated
  from the same gradients; so for the running mean of partial row-wise Adam, which is linear too;
- row to element: the row's value in every column. If the table was split by columns, each shard has
  a value of its own; the row's is their mean weighted by width.

The step is carried, in the form that the optimizer keeps (tensor or number). Hyperparameters are
not: those of the place that a table gets to apply.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_fmp.reshard.boxes import Box
from torchrec_fmp.reshard.dense_optimizer import Arrival, Crossed, Place, places
from torchrec_fmp.reshard.local_shards import LocalShard
from torchrec_fmp.reshard.tables import Tables
from torchrec_fmp.surgery.cut_map import CutMap

# Rows and columns of a parameter that shows which states an optimizer keeps.
_SAMPLE = torch.Size([2, 3])
_PER_ROW = (torch.Size([2, 1]), torch.Size([2]))


@dataclass(frozen=True)
class Crossing:
    """The tables that change sides, between the dense and the fused optimizer.

    Args:
        old: the tables to move from.
        new: the tables to move to. Those that were data-parallel have no states in it: every rank
            fills its own from the dense optimizer. Those that become data-parallel have room for
            the states of the fused optimizer.
        leaving: fqn after -> this rank's shards, with their states, and the dense optimizer's state
            (empty before its first step), of each table that was data-parallel.
        arriving: fqn after -> where in the dense optimizer a table goes that becomes data-parallel,
            the state that a parameter has there after one step, and the table's own step.
    """

    old: Tables
    new: Tables
    leaving: Mapping[str, tuple[list[LocalShard], Mapping[str, Any]]]
    arriving: Mapping[str, tuple[Place, Mapping[str, Any], int]]

    @torch.no_grad()
    def finish(self) -> Crossed:
        """Fills the new tables' fused states, once the tables have moved.

        Returns:
            What the dense optimizer is to take.
        """
        for shards, state in self.leaving.values():
            for shard in shards:
                for name, target in shard.states.items():
                    if name in state:
                        target.copy_(converted(state[name], shard.box, target.dim() == 1))
        arrivals = []
        for fqn, (place, sample, step) in self.arriving.items():
            (shard,) = self.new.local[fqn]
            state = {name: _filled(name, value, shard, step) for name, value in sample.items()}
            arrivals.append(Arrival(fqn, shard.parameter, place.group, state))
        return Crossed(frozenset([*self.leaving, *self.arriving]), tuple(arrivals))


def crossing(
    old: Tables,
    new: Tables,
    cut_map: CutMap,
    optimizer: Optimizer,
    model: DistributedModelParallel,
    sources: Mapping[str, str],
) -> Crossing:
    """Pairs the dense optimizer's states with the fused ones', before anything moves.

    A table that becomes data-parallel goes to the first param group that holds data-parallel tables
    of the old model, or, if there is none, to the first that holds dense parameters that survive.

    Args:
        old: the tables before.
        new: the tables after; not changed.
        cut_map: gives each new table's source.
        optimizer: of the old model's dense parameters.
        model: the old one.
        sources: fqn in the bare old model -> fqn in the old model.

    Raises:
        ValueError: if a table would get other states than it has, or the optimizer has no place for
            it.
    """
    old_layouts, new_layouts = dict(old.layouts), dict(new.layouts)
    local = dict(new.local)
    leaving, arriving = {}, {}
    for fqn in new.shards:
        source = cut_map.tensors[fqn].source
        before, after = old.layouts[source], new.layouts[fqn]
        if source in old.data_parallel and fqn not in new.data_parallel:
            by_row = {name: per_row for name, (_, per_row) in after.states.items()}
            state = _leaving(fqn, old.local[source][0], set(by_row), optimizer)
            leaving[fqn] = (new.local[fqn], state)
            old_layouts[source] = replace(before, step=int(state.get("step", 0)))
            new_layouts[fqn] = replace(after, states={})
            local[fqn] = [replace(shard, states={}) for shard in new.local[fqn]]
        elif fqn in new.data_parallel and source not in old.data_parallel:
            (shard,) = new.local[fqn]
            place = _destination(fqn, old, cut_map, optimizer, model, sources)
            sample = _sample_state(fqn, place, shard.parameter)
            _check_names(fqn, set(before.states), sample, place, "data-parallel")
            arriving[fqn] = (place, sample, before.step)
            new_layouts[fqn] = replace(after, states=before.states)
            room = {
                name: shard.weight.new_zeros(shard.box[2 : 3 if per_row else 4], dtype=dtype)
                for name, (dtype, per_row) in before.states.items()
            }
            local[fqn] = [replace(shard, states=room)]
    return Crossing(
        replace(old, layouts=old_layouts),
        replace(new, layouts=new_layouts, local=local),
        leaving,
        arriving,
    )


def converted(state: Tensor, box: Box, by_row: bool) -> Tensor:
    """The part of a whole table's state that a shard keeps.

    Args:
        state: (rows, columns), (rows, 1) or (rows,) of the table.
        box: the shard's.
        by_row: whether the shard keeps one value a row.

    Returns:
        (rows,) or (rows, columns) of the box; may be a view.
    """
    rows = state.narrow(0, box.row, box.rows)
    if rows.dim() == 2 and rows.shape[1] > 1:
        part = rows.narrow(1, box.column, box.columns)
        return part.float().mean(1) if by_row else part
    values = rows.reshape(box.rows)
    return values if by_row else values.unsqueeze(1).expand(box.rows, box.columns)


def _leaving(
    fqn: str, shard: LocalShard, names: set[str], optimizer: Optimizer
) -> Mapping[str, Any]:
    """The dense optimizer's state of a table that becomes sharded."""
    parameter = shard.parameter
    for place in places(optimizer):
        if any(held is parameter for held in place.group["params"]):
            _check_names(fqn, names, _sample_state(fqn, place, parameter), place, "sharded")
            return place.optimizer.state.get(parameter, {})
    if names:
        raise ValueError(
            f"{fqn} was data-parallel, and its new fused optimizer keeps {sorted(names)}, but the "
            "optimizer does not hold its parameter: pass the optimizer that trained it, or a plan "
            "that keeps the table data-parallel"
        )
    return {}


def _destination(
    fqn: str,
    old: Tables,
    cut_map: CutMap,
    optimizer: Optimizer,
    model: DistributedModelParallel,
    sources: Mapping[str, str],
) -> Place:
    """Where the dense optimizer takes a table that becomes data-parallel."""
    survivors = {
        sources[tensor_cut.source]
        for tensor_cut in cut_map.tensors.values()
        if tensor_cut.source not in old.shards
    }
    data_parallel = {shard.parameter for shard in old if not shard.is_fused}
    dense = {parameter for name, parameter in model.named_parameters() if name in survivors}
    found = list(places(optimizer))
    for wanted in (data_parallel, dense):
        for place in found:
            if any(parameter in wanted for parameter in place.group["params"]):
                return place
    raise ValueError(
        f"{fqn} becomes data-parallel, so the dense optimizer has to train it, but no param group "
        "of the optimizer given holds data-parallel tables or dense parameters: pass the dense "
        "optimizer, too (in a CombinedOptimizer), or a plan that keeps the table sharded"
    )


def _sample_state(fqn: str, place: Place, like: nn.Parameter) -> dict[str, Any]:
    """The state that the optimizer gives a small parameter in that group, after one step."""
    kind = type(place.optimizer)
    sample = nn.Parameter(torch.zeros(_SAMPLE, dtype=like.dtype, device=like.device))
    sample.grad = torch.zeros_like(sample)
    accepted = inspect.signature(kind).parameters.keys() - {"params"}
    settings = {name: value for name, value in place.group.items() if name in accepted}
    try:
        optimizer = kind([sample], **settings)
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{fqn} cannot change between data-parallel and sharded with {kind.__name__}: which "
            f"states it keeps could not be tried out ({error}). Pass a plan that leaves the table "
            "as it is"
        ) from error
    return {name: value for name, value in optimizer.state[sample].items() if value is not None}


def _check_names(
    fqn: str, fused: set[str], sample: Mapping[str, Any], place: Place, becomes: str
) -> None:
    dense = {name for name in sample if name != "step"}
    shapes = {name: value.shape for name, value in sample.items() if isinstance(value, Tensor)}
    odd = [name for name in dense if shapes.get(name) not in (_SAMPLE, *_PER_ROW)]
    if dense != fused or odd:
        raise ValueError(
            f"{fqn} becomes {becomes}: {type(place.optimizer).__name__} keeps the states "
            f"{sorted(dense)} of a data-parallel table, the fused optimizer {sorted(fused)}. Give "
            "dense and sharded tables optimizers with the same states, or pass a plan that leaves "
            f"{fqn} as it is"
        )


def _filled(name: str, sample: Any, shard: LocalShard, step: int) -> Any:
    """One of the states that the dense optimizer keeps of a table that has become data-parallel."""
    if name == "step":
        return torch.full_like(sample, step) if isinstance(sample, Tensor) else type(sample)(step)
    per_row = sample.shape in _PER_ROW
    value = converted(shard.states[name], shard.box, per_row).to(sample.dtype, copy=True)
    return value.view(-1, *sample.shape[1:]) if per_row else value.contiguous()
