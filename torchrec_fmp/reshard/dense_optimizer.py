"""Carries the optimizer of dense parameters over to the smaller model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.clipping import GradientClippingOptimizer
from torchrec.optim.fused import FusedOptimizer
from torchrec.optim.keyed import (
    CombinedOptimizer,
    KeyedOptimizer,
    KeyedOptimizerWrapper,
    OptimizerWrapper,
)
from torchrec.optim.warmup import WarmupOptimizer

from torchrec_fmp.gates.names import gated_fqn, wrapped_modules
from torchrec_fmp.reshard.dense import check_state, cut_state
from torchrec_fmp.surgery.cut_map import CutMap, TensorCut

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class Place(NamedTuple):
    """A param group of a `torch.optim` optimizer, whatever wraps that."""

    optimizer: Optimizer
    group: dict[str, Any]


@dataclass(frozen=True)
class Crossed:
    """Tables of the dense optimizer, before or after, that are placed anew. All by the fqn after.

    That is the fqn in the bare new model.

    Args:
        states: what the optimizer keeps of each table that it has now.
        groups: the param group that takes a table which was in the fused optimizer.
        left: tables that are in the fused optimizer now.
    """

    states: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    groups: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    left: frozenset[str] = frozenset()


class _Arrival(NamedTuple):
    """A table that comes from the fused optimizer."""

    fqn: str
    parameter: nn.Parameter
    group: dict[str, Any]


def places(optimizer: Optimizer) -> Iterator[Place]:
    """All param groups of an optimizer and of those that it wraps, but for fused ones."""
    if isinstance(optimizer, CombinedOptimizer):
        for _, part in optimizer.optimizers:
            yield from places(part)
    elif isinstance(optimizer, (OptimizerWrapper, KeyedOptimizerWrapper)):
        yield from places(optimizer._optimizer)
    elif not isinstance(optimizer, FusedOptimizer):
        for group in optimizer.param_groups:
            yield Place(optimizer, group)


def check_optimizer(
    optimizer: Optimizer,
    model: DistributedModelParallel,
    cut_map: CutMap,
    sources: Mapping[str, str],
) -> None:
    """Finds out whether `carry_optimizer` can carry an optimizer, before anything is built.

    Args:
        optimizer: of the old model.
        model: the old model.
        cut_map: of the smaller model.
        sources: fqn in the bare old model -> fqn in the old model.

    Raises:
        ValueError: if the optimizer holds a parameter that the model does not have, or a state
            with a shape that cannot be cut.
        TypeError: for a wrapper or an optimizer that keeps parameters, which are replaced, anywhere
            but in its param groups.
    """
    if optimizer is model.fused_optimizer:
        return
    if isinstance(optimizer, CombinedOptimizer):
        for _, part in optimizer.optimizers:
            check_optimizer(part, model, cut_map, sources)
    elif isinstance(optimizer, OptimizerWrapper):
        _check_wrapper(optimizer)
        check_optimizer(optimizer._optimizer, model, cut_map, sources)
    else:
        cuts = {sources[tensor_cut.source]: tensor_cut for tensor_cut in cut_map.tensors.values()}
        names = {parameter: fqn for fqn, parameter in model.named_parameters()}
        _check_plain(optimizer, names, cuts)


def carry_optimizer(
    optimizer: Optimizer,
    old: DistributedModelParallel,
    new: DistributedModelParallel,
    cut_map: CutMap,
    sources: Mapping[str, str],
    crossed: Crossed | None = None,
) -> Callable[[], Optimizer]:
    """Prepares the optimizer of the new model: groups, hyperparameters, cut states, step counters.

    Takes every `torch.optim` optimizer, whose states are scalars or have the parameter's shape (a
    parameter that is not cut may have any), and TorchRec's `KeyedOptimizerWrapper`,
    `CombinedOptimizer`, `WarmupOptimizer` and `GradientClippingOptimizer` around them. Parameters
    that do not survive, such as gates, are left out. The keys of a `KeyedOptimizer` stay, but where
    they end in the parameter's fqn, which is replaced by the new one. Gates of the new model are
    left out, too.

    Args:
        optimizer: of the old model.
        old: the old model.
        new: the new model.
        cut_map: of the new model.
        sources: fqn in the bare old model -> fqn in the old model.
        crossed: tables that are placed anew; see `crossing.crossing`.

    Returns:
        A function that changes the optimizer in place, so that learning-rate schedulers and hooks
        that refer to it go on working, and returns what to use from now on. Until it is called,
        the optimizer is the old model's.

    Raises:
        ValueError: as `check_optimizer`.
        TypeError: as `check_optimizer`.
    """
    check_optimizer(optimizer, old, cut_map, sources)
    wrapped = wrapped_modules(new)
    cuts = _renamed(cut_map.tensors, wrapped)
    crossed = crossed or Crossed()
    crossed = Crossed(
        _renamed(crossed.states, wrapped),
        _renamed(crossed.groups, wrapped),
        frozenset(gated_fqn(fqn, wrapped) for fqn in crossed.left),
    )
    successors = _successors(old, new, cuts, sources, crossed)
    parameters = dict(new.named_parameters())
    arrivals = [_Arrival(fqn, parameters[fqn], group) for fqn, group in crossed.groups.items()]
    prepared = _prepare(optimizer, (old, new), successors, arrivals, crossed.states)
    groups_before = len(optimizer.param_groups) if isinstance(optimizer, CombinedOptimizer) else 0

    def commit() -> Optimizer:
        carried = prepared()
        if groups_before and len(carried.param_groups) != groups_before:
            _logger.warning(
                "the optimizer had %d param groups and has %d: a scheduler that keeps a list with "
                "an entry for each, such as LambdaLR, must be made anew",
                groups_before,
                len(carried.param_groups),
            )
        return carried

    return commit


def _renamed(by_fqn: Mapping[str, _T], wrapped: Mapping[str, str]) -> dict[str, _T]:
    """The same by the fqns of the new model, which may have gates."""
    return {gated_fqn(fqn, wrapped): value for fqn, value in by_fqn.items()}


class _Successor(NamedTuple):
    """What becomes of a parameter, with its fqns."""

    parameter: nn.Parameter
    tensor_cut: TensorCut
    old_fqn: str
    new_fqn: str


def _successors(
    old: DistributedModelParallel,
    new: DistributedModelParallel,
    cuts: Mapping[str, TensorCut],
    sources: Mapping[str, str],
    crossed: Crossed,
) -> dict[Tensor, _Successor]:
    """Parameter of the old model -> its successor, but for tables that a fused optimizer has.

    `cuts` and `crossed` are by the fqns of `new`.
    """
    before = dict(old.named_parameters())
    found = {}
    for fqn, parameter in new.named_parameters():
        tensor_cut = cuts.get(fqn)
        if tensor_cut is None or fqn in crossed.groups or fqn in crossed.left:
            continue
        old_fqn = sources[tensor_cut.source]
        # A rank that does not hold a sharded table has no parameter of it.
        if old_fqn in before:
            found[before[old_fqn]] = _Successor(parameter, tensor_cut, old_fqn, fqn)
    return found


def _prepare(
    optimizer: Optimizer,
    models: tuple[DistributedModelParallel, DistributedModelParallel],
    successors: Mapping[Tensor, _Successor],
    arrivals: Sequence[_Arrival],
    states: Mapping[str, dict[str, Any]],
) -> Callable[[], Optimizer]:
    old, new = models
    if optimizer is old.fused_optimizer:
        return lambda: new.fused_optimizer
    if isinstance(optimizer, CombinedOptimizer):
        commits = [
            (key, _prepare(part, models, successors, arrivals, states))
            for key, part in optimizer.optimizers
        ]

        def commit_parts() -> Optimizer:
            optimizer._optims = [(key, commit()) for key, commit in commits]
            return optimizer

        return commit_parts
    if isinstance(optimizer, OptimizerWrapper):
        inner = _prepare(optimizer._optimizer, models, successors, arrivals, states)
        return _prepare_wrapper(optimizer, inner)
    return _prepare_plain(optimizer, successors, arrivals, states)


def _prepare_plain(
    optimizer: Optimizer,
    successors: Mapping[Tensor, _Successor],
    arrivals: Sequence[_Arrival],
    table_states: Mapping[str, dict[str, Any]],
) -> Callable[[], Optimizer]:
    groups = []
    states: dict[Tensor, dict[str, Any]] = {}
    keys: dict[str, Tensor] = {}
    keys_before = {}
    if isinstance(optimizer, KeyedOptimizer):
        keys_before = {parameter: key for key, parameter in optimizer.params.items()}
    for group in optimizer.param_groups:
        kept = []
        for before in group["params"]:
            if before not in successors:
                continue
            successor = successors[before]
            kept.append(successor.parameter)
            key = keys_before.get(before, successor.old_fqn)
            if key.endswith(successor.old_fqn):
                key = key.removesuffix(successor.old_fqn) + successor.new_fqn
            keys[key] = successor.parameter
            if successor.new_fqn in table_states:
                states[successor.parameter] = table_states[successor.new_fqn]
            elif before in optimizer.state:
                state = cut_state(optimizer.state[before], successor.tensor_cut)
                states[successor.parameter] = state
        for arrival in arrivals:
            if arrival.group is group:
                kept.append(arrival.parameter)
                keys[arrival.fqn] = arrival.parameter
                states[arrival.parameter] = table_states[arrival.fqn]
        groups.append(kept)

    def commit() -> Optimizer:
        for group, kept in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = kept
        optimizer.state.clear()
        optimizer.state.update({parameter: state for parameter, state in states.items() if state})
        if isinstance(optimizer, KeyedOptimizer):
            optimizer.params = keys
        return optimizer

    return commit


def _prepare_wrapper(
    optimizer: OptimizerWrapper, inner: Callable[[], Optimizer]
) -> Callable[[], Optimizer]:
    own_params, own_state = _own(optimizer)

    def commit() -> Optimizer:
        optimizer._optimizer = inner()
        optimizer.params = optimizer._optimizer.params
        optimizer.params.update(own_params)
        optimizer.state = optimizer._optimizer.state
        optimizer.state.update(own_state)
        optimizer.param_groups = optimizer._optimizer.param_groups
        if isinstance(optimizer, GradientClippingOptimizer):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            optimizer._replicate_params = parameters
        return optimizer

    return commit


def _own(optimizer: OptimizerWrapper) -> tuple[dict[str, Tensor], dict[Tensor, dict[str, Any]]]:
    """What a warm-up keeps among the parameters and states of the optimizer that it wraps."""
    if not isinstance(optimizer, WarmupOptimizer):
        return {}, {}
    own = optimizer._warmup_param
    params = {name: parameter for name, parameter in optimizer.params.items() if parameter is own}
    return params, {own: optimizer.state[own]} if own in optimizer.state else {}


def _check_wrapper(optimizer: OptimizerWrapper) -> None:
    if type(optimizer) not in (OptimizerWrapper, WarmupOptimizer, GradientClippingOptimizer):
        raise TypeError(
            f"{type(optimizer).__name__} may keep parameters that are replaced: pass the optimizer "
            "that it wraps, and wrap the returned one again"
        )
    if isinstance(optimizer, GradientClippingOptimizer) and optimizer._sharded_params:
        raise ValueError(
            "the GradientClippingOptimizer clips sharded parameters, which are replaced: pass the "
            "optimizer that it wraps, and wrap the returned one again"
        )


def _check_plain(
    optimizer: Optimizer, names: Mapping[Tensor, str], cuts: Mapping[str, TensorCut]
) -> None:
    plain = optimizer._optimizer if isinstance(optimizer, KeyedOptimizerWrapper) else optimizer
    for attribute, value in vars(plain).items():
        if attribute in ("param_groups", "state") or isinstance(plain, KeyedOptimizer):
            continue
        if any(isinstance(leaf, nn.Parameter) for leaf in tree_leaves(value)):
            raise TypeError(
                f"{type(plain).__name__} keeps parameters in its attribute {attribute}, and they "
                "are replaced: use an optimizer whose states are of one parameter each"
            )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that the "
                    "model does not have: pass the optimizer that was made for this model"
                )
            tensor_cut = cuts.get(names[parameter])
            if tensor_cut is not None and parameter in optimizer.state:
                for name, value in optimizer.state[parameter].items():
                    check_state(name, value, tensor_cut)
