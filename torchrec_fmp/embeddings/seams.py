"""Private names of TorchRec and FBGEMM, one small function each; no other module touches them.

A name that an upgrade removes or renames raises `SeamError` in any run that needs it. The tests of
this module show the meaning of each name, on every supported version.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import (
    DataParallelWrapper,
    DistributedModelParallel,
)
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ShardEstimator, ShardingOption
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.clipping import GradientClippingOptimizer
from torchrec.optim.keyed import (
    CombinedOptimizer,
    KeyedOptimizer,
    KeyedOptimizerWrapper,
    OptimizerWrapper,
)
from torchrec.optim.warmup import WarmupOptimizer

from torchrec_fmp.distributed.versions import installed_versions

# Fqns of the layers within TorchRec's `MLP` and `Perceptron`.
MLP_LAYERS = "_mlp"
PERCEPTRON_LINEAR = "_linear"

ShardedCollection: TypeAlias = ShardedEmbeddingBagCollection | ShardedEmbeddingCollection


class SeamError(AttributeError):
    """The installed TorchRec or FBGEMM lacks a private name that this package needs."""


def _read(owner: object, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as error:
        versions = installed_versions()
        raise SeamError(
            f"{type(owner).__module__}.{type(owner).__name__} has no {name!r} in torchrec "
            f"{versions['torchrec']}: this version is not supported; run `torchrec-fmp doctor`"
        ) from error


def _write(owner: object, name: str, value: object) -> None:
    """Sets an existing attribute: after a rename, setting the old name would have no effect."""
    _read(owner, name)
    setattr(owner, name, value)


# --- DistributedModelParallel -------------------------------------------------------------------


def sharding_env(model: DistributedModelParallel) -> ShardingEnv:
    """The model's sharding environment: its process group, rank and world size."""
    return cast(ShardingEnv, _read(model, "_env"))


def data_parallel_wrapper(model: DistributedModelParallel) -> DataParallelWrapper:
    """The wrapper of the model's dense part, as passed to the model's constructor."""
    return cast(DataParallelWrapper, _read(model, "_data_parallel_wrapper"))


# --- Sharded collections ------------------------------------------------------------------------


def sharded_table_configs(collection: ShardedCollection) -> list[BaseEmbeddingConfig]:
    """Configs of a sharded collection's tables, in the order of the unsharded one."""
    pooled = isinstance(collection, ShardedEmbeddingBagCollection)
    return list(_read(collection, "_embedding_bag_configs" if pooled else "_embedding_configs"))


def is_weighted(collection: ShardedEmbeddingBagCollection) -> bool:
    """Whether the collection multiplies embeddings by the weights of its input."""
    return bool(_read(collection, "_is_weighted"))


def device_of(collection: ShardedCollection) -> torch.device:
    """The device of the collection's shards on this rank."""
    return cast(torch.device, _read(collection, "_device"))


def sequence_options(collection: nn.Module) -> dict[str, Any]:
    """Constructor arguments of an `EmbeddingCollection`, sharded or not, besides its tables.

    TorchRec 1.6 lacks the last option.
    """
    accepted = inspect.signature(EmbeddingCollection).parameters
    names = ("need_indices", "use_gather_select", "use_gather_select_per_sharding")
    return {name: _read(collection, f"_{name}") for name in names if name in accepted}


def lookups(collection: ShardedCollection) -> Any:
    """The modules that look up embeddings, one per sharding type; `modules()` omits them."""
    return _read(collection, "_lookups")


def kernels(collection: ShardedCollection) -> Iterator[Any]:
    """The modules that run the lookups, each a `BaseEmbedding` for some of the tables."""
    for lookup in lookups(collection):
        while isinstance(lookup, DistributedDataParallel):
            lookup = lookup.module
        yield from _read(lookup, "_emb_modules")


def kernel_tables(kernel: Any) -> Sequence[Any]:
    """`ShardedEmbeddingTable` of each shard in a kernel, in the order of the kernel's weights."""
    return cast(Sequence[Any], _read(kernel, "_config").embedding_tables)


def step_counters(kernel: Any) -> list[Tensor]:
    """FBGEMM's two step counters of a fused kernel: for checkpoints, and for its arithmetic."""
    return [_read(kernel.emb_module, name) for name in ("iter", "iter_cpu")]


def forget_input_order(collection: ShardedCollection) -> None:
    """Lets the collection determine the order of its features again, from the next batch.

    A sharded collection keeps the key order of its first batch for good. TorchRec resets the same
    attributes in `ShardedEmbeddingBagCollection.update_shards`.
    """
    _write(collection, "_has_uninitialized_input_dist", True)
    for name in ("_input_dists", "_features_order", "_feature_splits"):
        _write(collection, name, [])
    if isinstance(collection, ShardedEmbeddingBagCollection):
        _write(collection, "_has_features_permute", True)


# --- Planner ------------------------------------------------------------------------------------


def topology_of(planner: EmbeddingShardingPlanner) -> Topology:
    """The ranks that the planner plans for."""
    return cast(Topology, _read(planner, "_topology"))


def batch_size_of(planner: EmbeddingShardingPlanner) -> int:
    """The batch size per rank, in rows, that the planner assumes."""
    return int(_read(planner, "_batch_size"))


def constraints_of(planner: EmbeddingShardingPlanner) -> dict[str, ParameterConstraints] | None:
    """The planner's constraints by table."""
    return cast("dict[str, ParameterConstraints] | None", _read(planner, "_constraints"))


def estimators_of(planner: EmbeddingShardingPlanner) -> list[ShardEstimator] | None:
    """The estimators of TorchRec's own enumerator; None for an enumerator of another type."""
    enumerator = _read(planner, "_enumerator")
    if not isinstance(enumerator, EmbeddingEnumerator):
        return None
    return cast("list[ShardEstimator]", _read(enumerator, "_estimators"))


def planner_copy(
    planner: EmbeddingShardingPlanner,
    narrowed: Callable[[dict[str, ParameterConstraints]], dict[str, ParameterConstraints]],
) -> EmbeddingShardingPlanner:
    """A copy of the planner without its data on the models that it has planned.

    Args:
        planner: planner to copy; not changed.
        narrowed: function from constraints to the copy's constraints. Enumerator and estimators
            usually hold the planner's own dictionary, but need not.
    """
    enumerator = _read(planner, "_enumerator")
    # A stored plan is for the old tables; the other attributes would copy the tables themselves.
    kept = [(planner, "_best_plan"), (planner, "plan_loader")]
    constraints = [constraints_of(planner)]
    if isinstance(enumerator, EmbeddingEnumerator):
        stored = ("_last_stored_module", "_last_stored_sharders", "_last_stored_search_space")
        kept += [(enumerator, name) for name in stored]
        constraints.append(_read(enumerator, "_constraints"))
    # Enumerators and estimators by other authors need not have constraints.
    others = [*(estimators_of(planner) or ()), enumerator]
    constraints += [vars(other).get("_constraints") for other in others]
    memo: dict[int, Any] = {
        id(value): None for holder, name in kept if (value := _read(holder, name)) is not None
    }
    memo |= {id(found): narrowed(found) for found in constraints if found is not None}
    return copy.deepcopy(planner, memo)


def set_priced_tensor(option: ShardingOption, tensor: Tensor) -> None:
    """Replaces the tensor that the estimators see as an option's table."""
    _write(option, "_tensor", tensor)


# --- Optimizers ---------------------------------------------------------------------------------


def wrapped_optimizer(optimizer: OptimizerWrapper | KeyedOptimizerWrapper) -> Any:
    """The optimizer inside a wrapper."""
    return _read(optimizer, "_optimizer")


def set_wrapped_optimizer(optimizer: OptimizerWrapper, wrapped: KeyedOptimizer) -> None:
    """Replaces the optimizer inside a wrapper."""
    _write(optimizer, "_optimizer", wrapped)


def set_combined_optimizers(optimizer: CombinedOptimizer, parts: Sequence[tuple[str, Any]]) -> None:
    """Replaces the combined optimizers; `parts` gives the new ones with their keys."""
    _write(optimizer, "_optims", list(parts))


def warmup_parameter(optimizer: WarmupOptimizer) -> Tensor:
    """The parameter whose state counts the steps of the warm-up."""
    return cast(Tensor, _read(optimizer, "_warmup_param"))


def clips_sharded_parameters(optimizer: GradientClippingOptimizer) -> bool:
    """Whether the optimizer clips the gradients of sharded parameters."""
    return bool(_read(optimizer, "_sharded_params"))


def set_clipped_parameters(
    optimizer: GradientClippingOptimizer, parameters: Sequence[Tensor]
) -> None:
    """Sets the parameters whose gradients the optimizer clips; they are equal on every rank."""
    _write(optimizer, "_replicate_params", list(parameters))


# --- Optimizers in the backward pass ------------------------------------------------------------

# Set on a parameter by `apply_optimizer_in_backward`, in torch and TorchRec.
_OPTIMIZERS, _CLASSES, _SETTINGS = (
    "_in_backward_optimizers",
    "_optimizer_classes",
    "_optimizer_kwargs",
)


@lru_cache(maxsize=1)
def _check_backward_names() -> None:
    """Tries the names on one parameter: most have none of them, so absence proves nothing."""
    parameter = nn.Parameter(torch.zeros(1))
    with torch.enable_grad():
        _apply_optimizer_in_backward(torch.optim.SGD, [parameter], {"lr": 0.1}, register_hook=False)
    for name in (_OPTIMIZERS, _CLASSES, _SETTINGS):
        _read(parameter, name)


def backward_classes(parameter: Tensor) -> list[type[Optimizer]]:
    """Classes of the optimizers that were set on a parameter; empty if there are none."""
    _check_backward_names()
    return list(getattr(parameter, _CLASSES, ()))


def backward_optimizers(parameter: Tensor) -> list[tuple[Optimizer, dict[str, Any]]]:
    """The optimizers that step in a parameter's backward pass, each with its settings."""
    _check_backward_names()
    found = (getattr(parameter, name, ()) for name in (_OPTIMIZERS, _SETTINGS))
    return list(zip(*found, strict=True))


def add_backward_optimizer(
    parameter: nn.Parameter, kind: type[Optimizer], settings: dict[str, Any]
) -> Optimizer:
    """Makes an optimizer step in a parameter's backward pass, and returns the optimizer."""
    # The hook is registered on the parameter's graph.
    with torch.enable_grad():
        _apply_optimizer_in_backward(
            kind, [parameter], settings, register_hook=parameter.requires_grad
        )
    return cast(Optimizer, _read(parameter, _OPTIMIZERS)[-1])


def copy_fused_optimizer(source: Tensor, target: Tensor) -> None:
    """Copies the optimizer classes and settings of a table's parameter, for TorchRec to fuse."""
    _check_backward_names()
    for name in (_CLASSES, _SETTINGS):
        if hasattr(source, name):
            setattr(target, name, copy.deepcopy(getattr(source, name)))


def set_fused_optimizer(parameter: Tensor, kind: type[Optimizer]) -> None:
    """Records an optimizer on a table's parameter, where TorchRec's storage estimator reads it."""
    _check_backward_names()
    setattr(parameter, _CLASSES, [kind])
