"""Cuts dense parameters, buffers and the state of `torch.optim` optimizers along the `CutMap`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.clipping import GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper, OptimizerWrapper
from torchrec.optim.warmup import WarmupOptimizer

from torchrec_fmp.surgery.cut_map import CutMap, TensorCut


@torch.no_grad()
def fill_dense(
    model: nn.Module, old_tensors: Mapping[str, Tensor], cut_map: CutMap, sources: Mapping[str, str]
) -> None:
    """Replaces the meta parameters of the smaller model by the cut ones, except the tables'.

    Parameters that were one stay one.

    Args:
        model: not yet sharded; changed in place.
        old_tensors: parameters and buffers of the old model by its fqns; a table is not in it.
        cut_map: of `model`.
        sources: fqn in the bare old model -> fqn in the old model.

    Raises:
        ValueError: if a parameter that several layers share is cut for any of them.
    """
    made: dict[Tensor, tuple[nn.Parameter, TensorCut]] = {}
    for fqn, tensor_cut in cut_map.tensors.items():
        old = old_tensors.get(sources[tensor_cut.source])
        if old is None:
            continue
        parent, _, name = fqn.rpartition(".")
        module = model.get_submodule(parent)
        value = tensor_cut.apply(old.detach())
        if name in module._parameters:
            parameter = nn.Parameter(value, requires_grad=old.requires_grad)
            parameter, first = made.setdefault(old, (parameter, tensor_cut))
            if first is not tensor_cut and not (first.is_whole and tensor_cut.is_whole):
                raise ValueError(
                    f"{first.source} and {tensor_cut.source} share a parameter that is cut: "
                    "untie them before pruning"
                )
            module._parameters[name] = parameter
        else:
            module._buffers[name] = value


def carry_optimizer(
    optimizer: Optimizer,
    old: DistributedModelParallel,
    new: DistributedModelParallel,
    cut_map: CutMap,
    sources: Mapping[str, str],
) -> Callable[[], Optimizer]:
    """Prepares the optimizer of the new model: groups, hyperparameters, cut states, step counters.

    Takes `torch.optim` optimizers, and TorchRec's `KeyedOptimizerWrapper`, `CombinedOptimizer`,
    `WarmupOptimizer` and `GradientClippingOptimizer` around them. Parameters that do not
    survive, such as gates, are left out.

    Returns:
        A function that changes the optimizer in place, so that learning-rate schedulers and hooks
        that refer to it go on working, and returns what to use from now on. Until it is called,
        the optimizer is the old model's.

    Raises:
        ValueError: if the optimizer holds a parameter that the model does not have, or a state
            with a shape that cannot be cut.
        TypeError: for another kind of wrapper.
    """
    if optimizer is old.fused_optimizer:
        return lambda: new.fused_optimizer
    if isinstance(optimizer, CombinedOptimizer):
        commits = [
            (key, carry_optimizer(part, old, new, cut_map, sources))
            for key, part in optimizer.optimizers
        ]

        def commit_parts() -> Optimizer:
            optimizer._optims = [(key, commit()) for key, commit in commits]
            return optimizer

        return commit_parts
    if isinstance(optimizer, OptimizerWrapper):
        return _carry_wrapped(optimizer, old, new, cut_map, sources)
    names = {parameter: fqn for fqn, parameter in old.named_parameters()}
    successors = _successors(new, cut_map, sources)
    groups = []
    states: dict[Tensor, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        kept = []
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that the "
                    "model does not have: pass the optimizer that was made for this model"
                )
            fqn = names[parameter]
            if fqn not in successors:
                continue
            successor, tensor_cut = successors[fqn]
            kept.append(successor)
            if parameter in optimizer.state:
                states[successor] = _cut_state(optimizer.state[parameter], tensor_cut)
        groups.append(kept)

    def commit() -> Optimizer:
        for group, kept in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = kept
        optimizer.state.clear()
        optimizer.state.update(states)
        if isinstance(optimizer, KeyedOptimizerWrapper):
            kept_names = {id(p): fqn for fqn, p in new.named_parameters()}
            optimizer.params = {kept_names[id(p)]: p for kept in groups for p in kept}
        return optimizer

    return commit


def _carry_wrapped(
    optimizer: OptimizerWrapper,
    old: DistributedModelParallel,
    new: DistributedModelParallel,
    cut_map: CutMap,
    sources: Mapping[str, str],
) -> Callable[[], Optimizer]:
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
    own_params, own_state = _own(optimizer)
    inner = carry_optimizer(optimizer._optimizer, old, new, cut_map, sources)

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


def _successors(
    new: DistributedModelParallel, cut_map: CutMap, sources: Mapping[str, str]
) -> dict[str, tuple[nn.Parameter, TensorCut]]:
    """Fqn in the old model -> parameter of the new model, and its cut."""
    found = {}
    for fqn, parameter in new.named_parameters():
        tensor_cut = cut_map.tensors.get(fqn)
        if tensor_cut is not None:
            found[sources[tensor_cut.source]] = (parameter, tensor_cut)
    return found


def _cut_state(state: Mapping[str, Any], tensor_cut: TensorCut) -> dict[str, Any]:
    """States of the parameter's shape are cut, step counters and other scalars copied.

    Raises:
        ValueError: for a tensor of any other shape.
    """
    cut: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            cut[name] = value
        elif value.dim() == 0 and len(tensor_cut.source_shape) > 0:
            cut[name] = value.clone()
        else:
            try:
                cut[name] = tensor_cut.select(value)
            except ValueError as error:
                raise ValueError(f"optimizer state {name!r}: {error}") from error
    return cut
