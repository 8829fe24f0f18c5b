"""Carries the optimizer of dense parameters over to the smaller model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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

from torchrec_fmp.embeddings.fqns import own_parameters
from torchrec_fmp.embeddings.seams import (
    clips_sharded_parameters,
    set_clipped_parameters,
    set_combined_optimizers,
    set_wrapped_optimizer,
    warmup_parameter,
    wrapped_optimizer,
)
from torchrec_fmp.reshard.dense import check_state, cut_state
from torchrec_fmp.surgery.cut_map import CutMap, TensorCut

_logger = logging.getLogger(__name__)


class ParamGroup(NamedTuple):
    """A param group of a `torch.optim` optimizer, whatever wraps the optimizer."""

    optimizer: Optimizer
    group: dict[str, Any]


@dataclass(frozen=True)
class Crossed:
    """Tables in the dense optimizer, before or after, whose place changes; by own fqn after.

    Args:
        states: state of each table that the optimizer holds now.
        groups: param group of each table that was in the fused optimizer.
        left: tables that are in the fused optimizer now.
    """

    states: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    groups: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    left: frozenset[str] = frozenset()


class _Arrival(NamedTuple):
    """A table from the fused optimizer, with its own fqn and its fqn in the model."""

    own: str
    fqn: str
    parameter: nn.Parameter
    group: dict[str, Any]


def param_groups(optimizer: Optimizer) -> Iterator[ParamGroup]:
    """All param groups of an optimizer and of the optimizers in it, except fused optimizers."""
    if isinstance(optimizer, CombinedOptimizer):
        for _, part in optimizer.optimizers:
            yield from param_groups(part)
    elif isinstance(optimizer, (OptimizerWrapper, KeyedOptimizerWrapper)):
        yield from param_groups(wrapped_optimizer(optimizer))
    elif not isinstance(optimizer, FusedOptimizer):
        for group in optimizer.param_groups:
            yield ParamGroup(optimizer, group)


def check_optimizer(optimizer: Optimizer, model: DistributedModelParallel, cut_map: CutMap) -> None:
    """Checks that `carry_optimizer` can carry an optimizer, before anything is built.

    Args:
        optimizer: optimizer of the old model.
        model: old model.
        cut_map: CutMap of the smaller model.

    Raises:
        ValueError: if the optimizer holds a parameter that the model does not have, or a state
            with a shape that cannot be cut.
        TypeError: for a wrapper or an optimizer that keeps parameters anywhere except in its param
            groups, because parameters are replaced.
    """
    if optimizer is model.fused_optimizer:
        return
    if isinstance(optimizer, CombinedOptimizer):
        for _, part in optimizer.optimizers:
            check_optimizer(part, model, cut_map)
    elif isinstance(optimizer, OptimizerWrapper):
        _check_wrapper(optimizer)
        check_optimizer(wrapped_optimizer(optimizer), model, cut_map)
    else:
        cuts = {tensor_cut.source: tensor_cut for tensor_cut in cut_map.tensors.values()}
        names: dict[Tensor, str] = {
            parameter: own for own, (_, parameter) in own_parameters(model).items()
        }
        _check_plain(optimizer, names, cuts)


def carry_optimizer(
    optimizer: Optimizer,
    old: DistributedModelParallel,
    new: DistributedModelParallel,
    cut_map: CutMap,
    crossed: Crossed | None = None,
) -> Callable[[], Optimizer]:
    """Prepares the optimizer of the new model: groups, hyperparameters, cut states, step counters.

    Supports every `torch.optim` optimizer whose states are scalars or have the parameter's shape;
    the states of a parameter that is not cut may have any shape. Also supports TorchRec's
    `KeyedOptimizerWrapper`, `CombinedOptimizer`, `WarmupOptimizer` and `GradientClippingOptimizer`
    around these optimizers. Parameters that do not survive, such as gates, are left out, and so are
    the gates of the new model. A `KeyedOptimizer` keeps its keys, except that the parameter's fqn
    at the end of a key is replaced by the new fqn.

    Args:
        optimizer: optimizer of the old model.
        old: old model.
        new: new model.
        cut_map: CutMap of the new model.
        crossed: tables whose place changes; see `crossing.crossing`.

    Returns:
        A function that changes the optimizer in place, so that learning-rate schedulers and hooks
        that refer to it continue to work. The function returns the optimizer to use from now on.
        Until the call, the optimizer belongs to the old model.

    Raises:
        ValueError: see `check_optimizer`.
        TypeError: see `check_optimizer`.
    """
    check_optimizer(optimizer, old, cut_map)
    carriage = _Carriage.of(old, new, cut_map, crossed or Crossed())
    prepared = carriage.prepare(optimizer)
    groups_before = len(optimizer.param_groups) if isinstance(optimizer, CombinedOptimizer) else 0

    def commit() -> Optimizer:
        carried = prepared()
        if groups_before and len(carried.param_groups) != groups_before:
            _logger.warning(
                "the optimizer had %d param groups and now has %d: a scheduler that keeps a list "
                "with an entry for each, such as LambdaLR, must be created again",
                groups_before,
                len(carried.param_groups),
            )
        return carried

    return commit


class _Successor(NamedTuple):
    """The successor of a parameter.

    Args:
        parameter: parameter of the new model.
        tensor_cut: cut that makes the new parameter from the old one.
        own: own fqn of the new parameter.
        old_fqn: fqn of the old parameter in the old model, including gates' wrappers.
        new_fqn: fqn of the new parameter in the new model, including gates' wrappers.
    """

    parameter: nn.Parameter
    tensor_cut: TensorCut
    own: str
    old_fqn: str
    new_fqn: str


@dataclass(frozen=True)
class _Carriage:
    """The data to carry from one model's optimizers to the other's.

    Args:
        old_fused: fused optimizer of the old model.
        new_fused: fused optimizer of the new model.
        successors: parameter of the old model -> its successor, except for tables of a fused
            optimizer.
        arrivals: tables that come from the fused optimizer.
        states: own fqn of a table -> its state in the dense optimizer.
    """

    old_fused: Optimizer
    new_fused: Optimizer
    successors: Mapping[Tensor, _Successor]
    arrivals: Sequence[_Arrival]
    states: Mapping[str, dict[str, Any]]

    @staticmethod
    def of(
        old: DistributedModelParallel,
        new: DistributedModelParallel,
        cut_map: CutMap,
        crossed: Crossed,
    ) -> _Carriage:
        before, after = own_parameters(old), own_parameters(new)
        successors: dict[Tensor, _Successor] = {}
        for own, (new_fqn, parameter) in after.items():
            tensor_cut = cut_map.tensors.get(own)
            if tensor_cut is None or own in crossed.groups or own in crossed.left:
                continue
            # A rank that does not hold a sharded table has no parameter for it.
            if tensor_cut.source in before:
                old_fqn, source = before[tensor_cut.source]
                successors[source] = _Successor(parameter, tensor_cut, own, old_fqn, new_fqn)
        arrivals = [_Arrival(own, *after[own], group) for own, group in crossed.groups.items()]
        return _Carriage(
            old.fused_optimizer, new.fused_optimizer, successors, arrivals, crossed.states
        )

    def prepare(self, optimizer: Optimizer) -> Callable[[], Optimizer]:
        """Does the work that can fail; the returned function changes the optimizer."""
        if optimizer is self.old_fused:
            return lambda: self.new_fused
        if isinstance(optimizer, CombinedOptimizer):
            commits = [(key, self.prepare(part)) for key, part in optimizer.optimizers]

            def commit_parts() -> Optimizer:
                set_combined_optimizers(optimizer, [(key, commit()) for key, commit in commits])
                return optimizer

            return commit_parts
        if isinstance(optimizer, OptimizerWrapper):
            return _prepare_wrapper(optimizer, self.prepare(wrapped_optimizer(optimizer)))
        return _prepare_plain(optimizer, self)


def _prepare_plain(optimizer: Optimizer, carriage: _Carriage) -> Callable[[], Optimizer]:
    groups = []
    states: dict[Tensor, dict[str, Any]] = {}
    keys: dict[str, Tensor] = {}
    keys_before = {}
    if isinstance(optimizer, KeyedOptimizer):
        keys_before = {parameter: key for key, parameter in optimizer.params.items()}
    for group in optimizer.param_groups:
        kept = []
        for before in group["params"]:
            successor = carriage.successors.get(before)
            if successor is None:
                continue
            kept.append(successor.parameter)
            key = keys_before.get(before, successor.old_fqn)
            if key.endswith(successor.old_fqn):
                key = key.removesuffix(successor.old_fqn) + successor.new_fqn
            keys[key] = successor.parameter
            if successor.own in carriage.states:
                states[successor.parameter] = carriage.states[successor.own]
            elif before in optimizer.state:
                state = cut_state(optimizer.state[before], successor.tensor_cut)
                states[successor.parameter] = state
        for arrival in carriage.arrivals:
            if arrival.group is group:
                kept.append(arrival.parameter)
                keys[arrival.fqn] = arrival.parameter
                states[arrival.parameter] = carriage.states[arrival.own]
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
        wrapped: Any = inner()
        set_wrapped_optimizer(optimizer, wrapped)
        optimizer.params = wrapped.params
        optimizer.params.update(own_params)
        optimizer.state = wrapped.state
        optimizer.state.update(own_state)
        optimizer.param_groups = wrapped.param_groups
        if isinstance(optimizer, GradientClippingOptimizer):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            set_clipped_parameters(optimizer, parameters)
        return optimizer

    return commit


def _own(optimizer: OptimizerWrapper) -> tuple[dict[str, Tensor], dict[Tensor, dict[str, Any]]]:
    """A warm-up's own entries among the parameters and states of its wrapped optimizer."""
    if not isinstance(optimizer, WarmupOptimizer):
        return {}, {}
    own = warmup_parameter(optimizer)
    params = {name: parameter for name, parameter in optimizer.params.items() if parameter is own}
    return params, {own: optimizer.state[own]} if own in optimizer.state else {}


def _check_wrapper(optimizer: OptimizerWrapper) -> None:
    if type(optimizer) not in (OptimizerWrapper, WarmupOptimizer, GradientClippingOptimizer):
        raise TypeError(
            f"{type(optimizer).__name__} may keep parameters, which pruning replaces: pass the "
            "optimizer that it wraps, and wrap the returned optimizer again"
        )
    if isinstance(optimizer, GradientClippingOptimizer) and clips_sharded_parameters(optimizer):
        raise ValueError(
            "the GradientClippingOptimizer clips sharded parameters, which pruning replaces: pass "
            "the optimizer that it wraps, and wrap the returned optimizer again"
        )


def _check_plain(
    optimizer: Optimizer, names: Mapping[Tensor, str], cuts: Mapping[str, TensorCut]
) -> None:
    plain = optimizer
    if isinstance(optimizer, KeyedOptimizerWrapper):
        plain = wrapped_optimizer(optimizer)
    for attribute, value in vars(plain).items():
        if attribute in ("param_groups", "state") or isinstance(plain, KeyedOptimizer):
            continue
        if any(isinstance(leaf, nn.Parameter) for leaf in tree_leaves(value)):
            raise TypeError(
                f"{type(plain).__name__} keeps parameters in its attribute {attribute}, and "
                "pruning replaces them: use an optimizer whose states each belong to one parameter"
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
