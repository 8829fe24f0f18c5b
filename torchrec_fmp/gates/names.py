"""Fqns with gates, and of the same model without them.

A gated module takes the place of the user's and holds it, so what is in that has a longer fqn.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torchrec.distributed.model_parallel import get_unwrapped_module

from torchrec_fmp.gates.gated import GatedCollection, GatedDense
from torchrec_fmp.gates.sharded import ShardedGatedCollection


def wrapped_modules(model: nn.Module) -> dict[str, str]:
    """Fqn of every gated module, sharded or not -> fqn of the user's module in it."""
    wrapped = {}
    for fqn, module in get_unwrapped_module(model).named_modules(remove_duplicate=False):
        if isinstance(module, (GatedCollection, ShardedGatedCollection)):
            wrapped[fqn] = f"{fqn}.{module.inner}"
        elif isinstance(module, GatedDense):
            wrapped[fqn] = f"{fqn}._module"
    return wrapped


def gated_fqn(bare: str, wrapped: Mapping[str, str]) -> str:
    """The fqn in a model whose `wrapped_modules` are these, of a tensor of the bare model."""
    for fqn, inner in wrapped.items():
        if bare.startswith(f"{fqn}."):
            return inner + bare[len(fqn) :]
    return bare


def ungated_fqn(gated: str, wrapped: Mapping[str, str]) -> str:
    """The fqn without gates, of a tensor or module of a model with these `wrapped_modules`."""
    for fqn, inner in wrapped.items():
        if gated == inner or gated.startswith(f"{inner}."):
            return fqn + gated[len(inner) :]
    return gated
