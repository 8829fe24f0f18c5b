"""The sharded `GatedEmbeddingBagCollection` and the sharders to pass to TorchRec.

Built as TorchRec builds its own wrapped collections (torchrec/distributed/fp_embeddingbag.py): the
inner collection is sharded by its own sharder, and the gates are a data-parallel parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.embedding_types import (
    BaseEmbeddingSharder,
    KJTList,
    ShardedEmbeddingModule,
)
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
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
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_fmp.gates.feature_gates import FeatureGates
from torchrec_fmp.gates.gated import GatedEmbeddingBagCollection, scale_keys

_INNER = "_embedding_bag_collection"


@dataclass
class GatedContext(EmbeddingBagCollectionContext):
    """Adds what the noise of one batch depends on.

    It is taken in `input_dist`, so that a pipeline that distributes a batch ahead gives each batch
    its own noise.
    """

    step: int = 0
    batch_size: int = 0


class ShardedGatedEmbeddingBagCollection(
    ShardedEmbeddingModule[KJTList, list[Tensor], KeyedTensor, GatedContext]
):
    """Sharded counterpart of `GatedEmbeddingBagCollection`; made by its sharder."""

    def __init__(
        self,
        module: GatedEmbeddingBagCollection,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        ebc_sharder: EmbeddingBagCollectionSharder,
        env: ShardingEnv,
        device: torch.device,
        module_fqn: str | None = None,
    ) -> None:
        super().__init__()
        self._embedding_bag_collection: ShardedEmbeddingBagCollection = ebc_sharder.shard(
            module._embedding_bag_collection,
            table_name_to_parameter_sharding,
            env=env,
            device=device,
            module_fqn=module_fqn,
        )
        self._lookups = self._embedding_bag_collection._lookups
        self.gates: FeatureGates = module.gates.to(device)

    def create_context(self) -> GatedContext:
        return GatedContext()

    def input_dist(
        self, ctx: GatedContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        ctx.step = self.gates.next_step()
        ctx.batch_size = features.stride()
        return self._embedding_bag_collection.input_dist(ctx, features)

    def compute(self, ctx: GatedContext, dist_input: KJTList) -> list[Tensor]:
        return self._embedding_bag_collection.compute(ctx, dist_input)

    def output_dist(self, ctx: GatedContext, output: list[Tensor]) -> LazyAwaitable[KeyedTensor]:
        return self._gate(ctx, self._embedding_bag_collection.output_dist(ctx, output))

    def compute_and_output_dist(
        self, ctx: GatedContext, input: KJTList
    ) -> LazyAwaitable[KeyedTensor]:
        return self._gate(ctx, self._embedding_bag_collection.compute_and_output_dist(ctx, input))

    def _gate(
        self, ctx: GatedContext, embeddings: LazyAwaitable[KeyedTensor]
    ) -> LazyAwaitable[KeyedTensor]:
        gates = self.gates(ctx.step, ctx.batch_size)
        embeddings.callbacks.append(
            partial(
                scale_keys,
                features=self.gates.features,
                gates=gates,
                centered=self.gates.config.centered,
            )
        )
        return embeddings

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        for fqn, _ in self.named_parameters():
            if fqn.startswith(_INNER):
                yield append_prefix(prefix, fqn)

    @property
    def unsharded_module_type(self) -> type[GatedEmbeddingBagCollection]:
        return GatedEmbeddingBagCollection


class AnyShardingEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, offering the planner row-wise sharding on CPU too.

    TorchRec's own hides it there (BaseEmbeddingSharder.sharding_types), although the sharded module
    runs it.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        row_wise = ShardingType.ROW_WISE.value
        return types if row_wise in types else [*types, row_wise]


class GatedEmbeddingBagCollectionSharder(BaseEmbeddingSharder[GatedEmbeddingBagCollection]):
    """Shards a `GatedEmbeddingBagCollection` as `ebc_sharder` shards the collection inside.

    Args:
        ebc_sharder: sharder of the inner collection, with its fused parameters.
    """

    def __init__(self, ebc_sharder: EmbeddingBagCollectionSharder) -> None:
        super().__init__(
            fused_params=ebc_sharder.fused_params,
            qcomm_codecs_registry=ebc_sharder.qcomm_codecs_registry,
        )
        self._ebc_sharder = ebc_sharder

    def shard(
        self,
        module: GatedEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedGatedEmbeddingBagCollection:
        return ShardedGatedEmbeddingBagCollection(
            module,
            params,
            self._ebc_sharder,
            env=env,
            device=device or torch.device("cpu"),
            module_fqn=append_prefix(module_fqn, _INNER) if module_fqn else module_fqn,
        )

    def shardable_parameters(
        self, module: GatedEmbeddingBagCollection
    ) -> dict[str, torch.nn.Parameter]:
        return self._ebc_sharder.shardable_parameters(module._embedding_bag_collection)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return self._ebc_sharder.sharding_types(compute_device_type)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return self._ebc_sharder.compute_kernels(sharding_type, compute_device_type)

    @property
    def module_type(self) -> type[GatedEmbeddingBagCollection]:
        return GatedEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedGatedEmbeddingBagCollection]:
        return ShardedGatedEmbeddingBagCollection


def sharders(
    fused_params: dict[str, Any] | None = None,
    qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
) -> list[ModuleSharder[Any]]:
    """Sharders for gated and for plain collections, for `DistributedModelParallel` and the planner.

    A model with modules of other types that TorchRec shards needs their sharders as well, as in
    `[*sharders(...), EmbeddingTowerSharder()]`.

    Args:
        fused_params: of FBGEMM's fused optimizer, as `EmbeddingBagCollectionSharder` takes them.
        qcomm_codecs_registry: of quantized communication, the same.
    """
    ebc_sharder = AnyShardingEmbeddingBagCollectionSharder(
        fused_params=fused_params, qcomm_codecs_registry=qcomm_codecs_registry
    )
    return [GatedEmbeddingBagCollectionSharder(ebc_sharder), ebc_sharder]
