"""Private names of TorchRec and FBGEMM, one small function each; nothing else touches them.

A name that an upgrade removes or renames raises `SeamError`, in any run that needs it. The tests of
this module say what each name means, on every supported version.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
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
            f"{versions['torchrec']}: this version is not supported; see `torchrec-fmp doctor`"
        ) from error


def _write(owner: object, name: str, value: object) -> None:
    """Sets what is there; a renamed attribute must not become a new one that nothing reads."""
    _read(owner, name)
    setattr(owner, name, value)


# --- DistributedModelParallel -------------------------------------------------------------------


def sharding_env(model: DistributedModelParallel) -> ShardingEnv:
    """What the model was sharded in: its process group, rank and world size."""
    return cast(ShardingEnv, _read(model, "_env"))


def data_parallel_wrapper(model: DistributedModelParallel) -> DataParallelWrapper:
    """What wraps the dense part of the model, as it was passed to its constructor."""
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
    """The device that the collection's shards on this rank are on."""
    return cast(torch.device, _read(collection, "_device"))


def sequence_options(collection: nn.Module) -> dict[str, Any]:
    """What an `EmbeddingCollection`, sharded or not, was made with besides its tables.

    TorchRec 1.6 does not have the last of the options.
    """
    accepted = inspect.signature(EmbeddingCollection).parameters
    names = ("need_indices", "use_gather_select", "use_gather_select_per_sharding")
    return {name: _read(collection, f"_{name}") for name in names if name in accepted}


def lookups(collection: ShardedCollection) -> Any:
    """The modules that look up embeddings, one for each sharding type; `modules()` lacks them."""
    return _read(collection, "_lookups")


def kernels(collection: ShardedCollection) -> Iterator[Any]:
    """The modules that run the lookups, each a `BaseEmbedding` of some of the tables."""
    for lookup in lookups(collection):
        while isinstance(lookup, DistributedDataParallel):
            lookup = lookup.module
        yield from _read(lookup, "_emb_modules")


def kernel_tables(kernel: Any) -> Sequence[Any]:
    """`ShardedEmbeddingTable` of each shard of a kernel, in the order of its weights."""
    return cast(Sequence[Any], _read(kernel, "_config").embedding_tables)


def step_counters(kernel: Any) -> list[Tensor]:
    """FBGEMM's counters of a fused kernel's steps: of checkpoints, and of its arithmetic."""
    return [_read(kernel.emb_module, name) for name in ("iter", "iter_cpu")]


def forget_input_order(collection: ShardedCollection) -> None:
    """Lets the next batch decide again in which order the collection finds its features.

    A sharded collection keeps the order of the first batch's keys for good. The attributes are
    those that TorchRec resets in `ShardedEmbeddingBagCollection.update_shards`.
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
    """Rows of a batch on one rank that the planner assumes."""
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
    narrowed: Any,
) -> EmbeddingShardingPlanner:
    """A copy of the planner without what it keeps of the models that it has planned.

    Args:
        planner: not changed.
        narrowed: constraints -> those that the copy has in their place. Enumerator and estimators
            usually hold the planner's own dictionary, but need not.
    """
    enumerator = _read(planner, "_enumerator")
    # A stored plan is of the old tables; the others would copy the tables themselves.
    kept = [(planner, "_best_plan"), (planner, "plan_loader")]
    constraints = [constraints_of(planner)]
    if isinstance(enumerator, EmbeddingEnumerator):
        stored = ("_last_stored_module", "_last_stored_sharders", "_last_stored_search_space")
        kept += [(enumerator, name) for name in stored]
        constraints.append(_read(enumerator, "_constraints"))
    # Those of other authors need not have any.
    others = [*(estimators_of(planner) or ()), enumerator]
    constraints += [vars(other).get("_constraints") for other in others]
    memo: dict[int, Any] = {
        id(value): None for holder, name in kept if (value := _read(holder, name)) is not None
    }
    memo |= {id(found): narrowed(found) for found in constraints if found is not None}
    return copy.deepcopy(planner, memo)


def set_priced_tensor(option: ShardingOption, tensor: Tensor) -> None:
    """Puts another tensor in the place of an option's table, for the estimators."""
    _write(option, "_tensor", tensor)


# --- Optimizers ---------------------------------------------------------------------------------


def wrapped_optimizer(optimizer: OptimizerWrapper | KeyedOptimizerWrapper) -> Any:
    """The optimizer that a wrapper wraps."""
    return _read(optimizer, "_optimizer")


def set_wrapped_optimizer(optimizer: OptimizerWrapper, wrapped: KeyedOptimizer) -> None:
    """Puts another optimizer into a wrapper."""
    _write(optimizer, "_optimizer", wrapped)


def set_combined_optimizers(optimizer: CombinedOptimizer, parts: Sequence[tuple[str, Any]]) -> None:
    """Puts other optimizers, by their keys, in the place of those that were combined."""
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
    """Sets the parameters, equal on every rank, whose gradients the optimizer clips."""
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
    """Most parameters have none of the names, so their absence says nothing: try one out."""
    parameter = nn.Parameter(torch.zeros(1))
    with torch.enable_grad():
        _apply_optimizer_in_backward(torch.optim.SGD, [parameter], {"lr": 0.1}, register_hook=False)
    for name in (_OPTIMIZERS, _CLASSES, _SETTINGS):
        _read(parameter, name)


def backward_classes(parameter: Tensor) -> list[type[Optimizer]]:
    """Classes of the optimizers that were set on a parameter; empty if none was."""
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
    """Has an optimizer step in a parameter's backward pass, and returns it."""
    # The hook is put on the graph of the parameter.
    with torch.enable_grad():
        _apply_optimizer_in_backward(
            kind, [parameter], settings, register_hook=parameter.requires_grad
        )
    return cast(Optimizer, _read(parameter, _OPTIMIZERS)[-1])


def copy_fused_optimizer(source: Tensor, target: Tensor) -> None:
    """Carries over which optimizers were set on a table's parameter, for TorchRec to fuse."""
    _check_backward_names()
    for name in (_CLASSES, _SETTINGS):
        if hasattr(source, name):
            setattr(target, name, copy.deepcopy(getattr(source, name)))


def set_fused_optimizer(parameter: Tensor, kind: type[Optimizer]) -> None:
    """Notes an optimizer on a table's parameter, as TorchRec's storage estimator looks for it."""
    _check_backward_names()
    setattr(parameter, _CLASSES, [kind])
