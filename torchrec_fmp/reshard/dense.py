"""Cuts dense parameters, buffers and their optimizer states along the `CutMap`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchrec_fmp.embeddings.seams import add_backward_optimizer, backward_optimizers
from torchrec_fmp.surgery.cut_map import CutMap, TensorCut


@torch.no_grad()
def fill_dense(model: nn.Module, old_tensors: Mapping[str, Tensor], cut_map: CutMap) -> None:
    """Replaces the smaller model's meta parameters, except tables, with the cut ones.

    Shared parameters stay shared. An optimizer that `apply_optimizer_in_backward` set on a
    parameter is set on its successor, with the optimizer's state cut like the parameter.

    Args:
        model: smaller model, not yet sharded; changed in place.
        old_tensors: parameters and buffers of the old model by own fqn, without its tables.
        cut_map: CutMap of `model`.

    Raises:
        ValueError: if a parameter that several layers share is cut for any of them, or if the state
            of an optimizer in the backward pass cannot be cut.
    """
    made: dict[Tensor, tuple[nn.Parameter, TensorCut]] = {}
    for fqn, tensor_cut in cut_map.tensors.items():
        old = old_tensors.get(tensor_cut.source)
        if old is None:
            continue
        parent, _, name = fqn.rpartition(".")
        module = model.get_submodule(parent)
        value = tensor_cut.apply(old.detach())
        if isinstance(getattr(module, name), nn.Parameter):
            if old not in made:
                parameter = nn.Parameter(value, requires_grad=old.requires_grad)
                _carry_optimizers_in_backward(old, parameter, tensor_cut)
                made[old] = (parameter, tensor_cut)
            parameter, first = made[old]
            if first is not tensor_cut and not (first.is_whole and tensor_cut.is_whole):
                raise ValueError(
                    f"{first.source} and {tensor_cut.source} share a parameter that is cut: "
                    "untie them before pruning"
                )
            setattr(module, name, parameter)
        else:
            setattr(module, name, value)


def check_state(name: str, value: Any, tensor_cut: TensorCut) -> None:
    """Checks that a state has its parameter's shape, is a scalar, or stays whole.

    Raises:
        ValueError: if the state cannot be cut.
    """
    if tensor_cut.columns is None:
        return
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor) and tensor.dim() > 0:
            if tensor is not value or tensor.shape != tensor_cut.source_shape:
                raise ValueError(
                    f"the optimizer state {name!r} of {tensor_cut.source} has the shape "
                    f"{tuple(tensor.shape)}, not the parameter's {tuple(tensor_cut.source_shape)}, "
                    "so the part for the kept columns is unknown. Use an optimizer that keeps one "
                    "value per element"
                )


def cut_state(state: Mapping[str, Any], tensor_cut: TensorCut) -> dict[str, Any]:
    """An optimizer's state for a parameter's successor.

    States of the parameter's shape are cut; step counters and other scalars are copied. If the
    parameter is not cut, everything is copied.

    Raises:
        ValueError: for a tensor of any other shape, if the parameter is cut.
    """
    cut: dict[str, Any] = {}
    for name, value in state.items():
        check_state(name, value, tensor_cut)
        if not isinstance(value, Tensor):
            cut[name] = copy.deepcopy(value)
        elif value.shape == tensor_cut.source_shape:
            cut[name] = tensor_cut.select(value)
        else:
            cut[name] = value.clone()
    return cut


def _carry_optimizers_in_backward(old: Tensor, new: nn.Parameter, tensor_cut: TensorCut) -> None:
    """Sets the optimizers of a parameter's backward pass on its successor."""
    for optimizer, settings in backward_optimizers(old):
        carried = add_backward_optimizer(new, type(optimizer), settings)
        ((group,), (carried_group,)) = optimizer.param_groups, carried.param_groups
        carried_group.update({name: value for name, value in group.items() if name != "params"})
        if old in optimizer.state:
            carried.state[new] = cut_state(optimizer.state[old], tensor_cut)
