"""Sharded counterparts of the gated collections, and the sharders to pass to TorchRec.

They follow TorchRec's own wrapped collections (torchrec/distributed/fp_embeddingbag.py): the inner
collection is sharded by its own sharder, and the gates are a data-parallel parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding import (
    EmbeddingCollectionSharder,
    ShardedEmbeddingCollection,
)
from torchrec.distributed.embedding_types import (
    BaseEmbeddingSharder,
    KJTList,
    ShardedEmbeddingModule,
)
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.types import (
    Awaitable,
    LazyAwaitable,
    ModuleSharder,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)
from torchrec.distributed.utils import append_prefix
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_fmp.embeddings.meta import meta_parameter
from torchrec_fmp.embeddings.seams import lookups
from torchrec_fmp.embeddings.wrappers import CollectionWrapper
from torchrec_fmp.gates.feature_gates import FeatureGates
from torchrec_fmp.gates.gated import (
    GatedCollection,
    GatedEmbeddingBagCollection,
    GatedEmbeddingCollection,
)
from torchrec_fmp.gates.scale import scale_keys, scale_sequences
from torchrec_fmp.gates.step_counter import StepCounter

Out = TypeVar("Out")
M = TypeVar("M", bound=GatedCollection)


class ShardedGatedCollection(
    ShardedEmbeddingModule[KJTList, list[Tensor], Out, Any], CollectionWrapper, Generic[Out]
):
    """Sharded counterpart of a `GatedCollection`; its sharder creates it."""

    unsharded: ClassVar[type[GatedCollection]]
    scale: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        module: GatedCollection,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        sharder: BaseEmbeddingSharder[Any],
        env: ShardingEnv,
        device: torch.device,
        module_fqn: str | None = None,
    ) -> None:
        super().__init__()
        sharded = sharder.shard(
            module.collection,
            table_name_to_parameter_sharding,
            env=env,
            device=device,
            module_fqn=append_prefix(module_fqn, module.inner) if module_fqn else module_fqn,
        )
        setattr(self, module.inner, sharded)
        self._lookups = lookups(sharded)
        self.features: tuple[str, ...] = module.features
        # In place, so that collections with shared gates continue to share them.
        self.gates: FeatureGates = module.gates.to(device)
        self.step: StepCounter = module.step

    def create_context(self) -> Any:
        return self.collection.create_context()

    def input_dist(self, ctx: Any, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KJTList]]:
        # A batch's noise depends on these two. They are set here, so that a pipeline that
        # distributes a batch ahead gives each batch its own noise.
        ctx.step = self.step.next()
        ctx.batch_size = features.stride()
        return self.collection.input_dist(ctx, features)

    def compute(self, ctx: Any, dist_input: KJTList) -> list[Tensor]:
        return self.collection.compute(ctx, dist_input)

    def output_dist(self, ctx: Any, output: list[Tensor]) -> LazyAwaitable[Out]:
        return self._gate(ctx, self.collection.output_dist(ctx, output))

    def compute_and_output_dist(self, ctx: Any, input: KJTList) -> LazyAwaitable[Out]:
        return self._gate(ctx, self.collection.compute_and_output_dist(ctx, input))

    def _gate(self, ctx: Any, embeddings: LazyAwaitable[Out]) -> LazyAwaitable[Out]:
        embeddings.callbacks.append(
            partial(
                self.scale,
                features=self.gates.features,
                gates=self.gates(ctx.step, ctx.batch_size),
                centered=self.gates.config.centered,
            )
        )
        return embeddings

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        for fqn, _ in self.named_parameters():
            if fqn.startswith(f"{self.inner}."):
                yield append_prefix(prefix, fqn)

    @property
    def unsharded_module_type(self) -> type[GatedCollection]:
        return self.unsharded


class ShardedGatedEmbeddingBagCollection(ShardedGatedCollection[KeyedTensor]):
    """Sharded counterpart of `GatedEmbeddingBagCollection`."""

    unsharded = GatedEmbeddingBagCollection
    inner = GatedEmbeddingBagCollection.inner
    scale = staticmethod(scale_keys)
    _embedding_bag_collection: ShardedEmbeddingBagCollection


class ShardedGatedEmbeddingCollection(ShardedGatedCollection[dict[str, JaggedTensor]]):
    """Sharded counterpart of `GatedEmbeddingCollection`."""

    unsharded = GatedEmbeddingCollection
    inner = GatedEmbeddingCollection.inner
    scale = staticmethod(scale_sequences)
    _embedding_collection: ShardedEmbeddingCollection


class AnyShardingEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, which offers the planner row-wise sharding on CPU too.

    TorchRec hides row-wise sharding on CPU (BaseEmbeddingSharder.sharding_types), although the
    sharded module runs it.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        row_wise = ShardingType.ROW_WISE.value
        return types if row_wise in types else [*types, row_wise]


class TracedEmbeddingCollectionSharder(EmbeddingCollectionSharder):
    """TorchRec's sharder, which records the unsharded parameters in the sharded module.

    `apply_optimizer_in_backward` notes a table's optimizer on its parameter. TorchRec's
    `ShardedEmbeddingCollection` forgets the parameter; its `ShardedEmbeddingBagCollection` does
    not.
    """

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingCollection:
        tables = {
            table: meta_parameter(weight)
            for table, weight in self.shardable_parameters(module).items()
        }
        sharded = super().shard(module, params, env, device, module_fqn)
        sharded.tables_before_sharding = tables
        return sharded


class _GatedSharder(BaseEmbeddingSharder[M]):
    """Shards a gated collection by applying another sharder to the inner collection.

    Args:
        sharder: sharder of the inner collection, with its fused parameters.
    """

    sharded: ClassVar[type[ShardedGatedCollection[Any]]]

    def __init__(self, sharder: BaseEmbeddingSharder[Any]) -> None:
        super().__init__(
            fused_params=sharder.fused_params,
            qcomm_codecs_registry=sharder.qcomm_codecs_registry,
        )
        self._sharder = sharder

    def shard(
        self,
        module: M,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedGatedCollection[Any]:
        device = device or torch.device("cpu")
        return self.sharded(module, params, self._sharder, env, device, module_fqn)

    def shardable_parameters(self, module: M) -> dict[str, nn.Parameter]:
        return self._sharder.shardable_parameters(module.collection)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return self._sharder.sharding_types(compute_device_type)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return self._sharder.compute_kernels(sharding_type, compute_device_type)

    @property
    def module_type(self) -> type[GatedCollection]:
        return self.sharded.unsharded

    @property
    def sharded_module_type(self) -> type[ShardedGatedCollection[Any]]:
        return self.sharded


class GatedEmbeddingBagCollectionSharder(_GatedSharder[GatedEmbeddingBagCollection]):
    """Shards a `GatedEmbeddingBagCollection`."""

    sharded = ShardedGatedEmbeddingBagCollection


class GatedEmbeddingCollectionSharder(_GatedSharder[GatedEmbeddingCollection]):
    """Shards a `GatedEmbeddingCollection`."""

    sharded = ShardedGatedEmbeddingCollection


def sharders(
    fused_params: dict[str, Any] | None = None,
    qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
) -> list[ModuleSharder[Any]]:
    """Sharders for gated and for plain collections, for `DistributedModelParallel` and the planner.

    A model with modules of other types that TorchRec shards needs their sharders as well, as in
    `[*sharders(...), EmbeddingTowerSharder()]`.

    Args:
        fused_params: parameters of FBGEMM's fused optimizer, as for
            `EmbeddingBagCollectionSharder`.
        qcomm_codecs_registry: codecs for quantized communication, as for
            `EmbeddingBagCollectionSharder`.
    """
    bags = AnyShardingEmbeddingBagCollectionSharder(fused_params, qcomm_codecs_registry)
    sequences = TracedEmbeddingCollectionSharder(fused_params, qcomm_codecs_registry)
    return [
        GatedEmbeddingBagCollectionSharder(bags),
        bags,
        GatedEmbeddingCollectionSharder(sequences),
        sequences,
    ]
