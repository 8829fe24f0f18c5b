"""Tables in host memory, without a process group; test_host_staging.py stages a model."""

from __future__ import annotations

import os
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.distributed.batched_embedding_kernel import (
    BatchedDenseEmbeddingBag,
    BatchedFusedEmbeddingBag,
)

from torchrec_fmp.embeddings.boxes import SHARD, Box
from torchrec_fmp.embeddings.local_shards import LocalShard
from torchrec_fmp.reshard.staging import HostStage, release
from torchrec_fmp.reshard.tables import Tables


def holding(*shards: LocalShard) -> Tables:
    local: dict[str, list[LocalShard]] = {}
    for shard in shards:
        local.setdefault(shard.table, []).append(shard)
    return Tables({name: np.zeros(0, SHARD) for name in local}, frozenset(), {}, local)


def fused(table: str, weight: Tensor, **states: Tensor) -> LocalShard:
    kernel = mock.Mock(spec=BatchedFusedEmbeddingBag)
    return LocalShard(table, Box(0, 0, *weight.shape), weight, states, kernel)


def kernel_of_two() -> tuple[Tensor, Tensor, list[LocalShard]]:
    """Weights and states of two tables, each kind in one storage, as FBGEMM has them."""
    weights, sums = torch.rand(5 * 4 + 3 * 2), torch.rand(5 + 3)
    shards = [
        fused("wide", weights[:20].view(5, 4), sum=sums[:5]),
        fused("narrow", weights[20:].view(3, 2), sum=sums[5:]),
    ]
    return weights, sums, shards


def test_staging_frees_the_tables_memory_and_keeps_the_values() -> None:
    weights, sums, shards = kernel_of_two()
    expected = {s.table: {n: t.clone() for n, t in s.tensors.items()} for s in shards}
    stage = HostStage(holding(*shards))
    assert weights.untyped_storage().nbytes() == sums.untyped_storage().nbytes() == 0
    staged = list(stage.tables)
    assert [(s.table, s.box, s.kernel) for s in staged] == [
        (s.table, s.box, s.kernel) for s in shards
    ]
    for shard in staged:
        assert shard.tensors.keys() == {"weight", "sum"}
        for name, tensor in shard.tensors.items():
            assert torch.equal(tensor, expected[shard.table][name])


def test_restoring_returns_the_values_to_the_same_tensors() -> None:
    weights, sums, shards = kernel_of_two()
    before = weights.clone(), sums.clone()
    stage = HostStage(holding(*shards))
    stage.restore()
    assert torch.equal(weights, before[0]) and torch.equal(sums, before[1])
    weights.zero_()
    assert not shards[0].weight.any() and not shards[1].weight.any(), "views are views as before"
    assert torch.equal(shards[1].states["sum"], before[1][5:])


def test_a_state_of_another_dtype_and_stride_is_staged_unchanged() -> None:
    seen = torch.arange(12, dtype=torch.int64).view(4, 3)[:, 1]
    half = torch.rand(4, 6).to(torch.bfloat16)[:, 2:]
    shard = fused("t", half, seen=seen)
    expected = half.clone()
    stage = HostStage(holding(shard))
    (staged,) = stage.tables
    assert torch.equal(staged.weight, expected) and staged.states["seen"].tolist() == [1, 4, 7, 10]
    stage.restore()
    assert torch.equal(half, expected) and seen.tolist() == [1, 4, 7, 10]


def test_data_parallel_tables_are_not_staged() -> None:
    weight = torch.rand(3, 4)
    kernel = mock.Mock(spec=BatchedDenseEmbeddingBag)
    shard = LocalShard("t", Box(0, 0, 3, 4), weight, {}, kernel)
    stage = HostStage(holding(shard))
    (staged,) = stage.tables
    assert staged.weight is weight and weight.untyped_storage().nbytes() == 48
    release(holding(shard))
    assert weight.untyped_storage().nbytes() == 48


def test_a_rank_without_tables_stages_nothing() -> None:
    stage = HostStage(holding())
    assert list(stage.tables) == []
    stage.restore()


def test_releasing_frees_the_memory_of_weights_and_states() -> None:
    weights, sums, shards = kernel_of_two()
    release(holding(*shards))
    assert weights.untyped_storage().nbytes() == sums.untyped_storage().nbytes() == 0


def test_a_full_disk_is_an_error_that_leaves_the_tables_unchanged() -> None:
    weights, _, shards = kernel_of_two()
    before = weights.clone()
    full = OSError(28, "No space left on device")
    with mock.patch.object(os, "posix_fallocate", side_effect=full):
        with pytest.raises(OSError, match="No space left"):
            HostStage(holding(*shards))
    assert torch.equal(weights, before)


def test_the_file_is_deleted_as_soon_as_it_is_mapped(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("staged")
    weights, _, shards = kernel_of_two()
    before = weights.clone()
    with mock.patch("tempfile.tempdir", str(folder)):
        stage = HostStage(holding(*shards))
    assert list(folder.iterdir()) == []
    stage.restore()
    assert torch.equal(weights, before)


def anonymous_bytes() -> int:
    """Memory of this process that is not backed by a file."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def test_staging_cpu_tables_frees_anonymous_memory() -> None:
    size = 64 * 2**20
    shard = fused("t", torch.ones(size // 64, 16))
    before = anonymous_bytes()
    stage = HostStage(holding(shard))
    assert before - anonymous_bytes() > size // 2
    stage.restore()
    assert shard.weight.sum() == size // 4
