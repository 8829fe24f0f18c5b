"""Keeps the old tables in host memory while the new ones are built, where both do not fit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from torchrec_fmp.embeddings.local_shards import LocalShard
from torchrec_fmp.reshard.tables import Tables, storages


class HostStage:
    """A model's tables, moved to host memory; the model cannot run until they are restored.

    The memory is taken from under the model's own tensors and given back the same way, so all
    references to the tensors stay valid. Tables that the dense optimizer trains stay where they
    are, and so do tables that FBGEMM keeps in host memory (UVM). The tables of a CPU's model are in
    host memory already: they move to a memory-mapped file.

    Args:
        tables: tables of the model.
    """

    def __init__(self, tables: Tables) -> None:
        copies: dict[int, Tensor] = {}
        self._staged: list[tuple[torch.UntypedStorage, Tensor]] = []
        for tensor in storages(shard for shard in tables if shard.is_fused):
            if _is_unified(tensor):
                continue
            storage = tensor.untyped_storage()
            copy = _host_memory(storage.nbytes(), tensor.device)
            copy.copy_(_bytes(storage))
            copies[storage.data_ptr()] = copy
            self._staged.append((storage, copy))

        def staged(_: str, shard: LocalShard) -> LocalShard:
            return replace(
                shard,
                weight=_moved(shard.weight, copies),
                states={name: _moved(state, copies) for name, state in shard.states.items()},
            )

        self.tables = tables.change(staged)
        for storage, _ in self._staged:
            storage.resize_(0)

    def restore(self) -> None:
        """Gives the model its tables back."""
        for storage, copy in self._staged:
            storage.resize_(copy.numel())
            _bytes(storage).copy_(copy)


def release(shards: Iterable[LocalShard]) -> None:
    """Frees the tables' memory, whatever still refers to it; the tables are unusable afterwards."""
    for tensor in storages(shard for shard in shards if shard.is_fused):
        if not _is_unified(tensor):
            tensor.untyped_storage().resize_(0)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _moved(tensor: Tensor, copies: dict[int, Tensor]) -> Tensor:
    copy = copies.get(tensor.untyped_storage().data_ptr())
    if copy is None:
        return tensor
    place = (tensor.storage_offset(), tensor.size(), tensor.stride())
    return torch.empty(0, dtype=tensor.dtype).set_(copy.untyped_storage(), *place)


def _is_unified(tensor: Tensor) -> bool:
    return tensor.is_cuda and bool(torch.ops.fbgemm.is_uvm_tensor(tensor))


def _host_memory(size: int, device: torch.device) -> Tensor:
    """(size,) uint8 that does not count against the device's memory."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8)
    with tempfile.NamedTemporaryFile(prefix="torchrec_fmp_") as file:
        # Raises if the disk is full; writing to a mapped hole would kill the process instead.
        os.posix_fallocate(file.fileno(), 0, size)
        # The mapping keeps the file's blocks until it is gone, although the name is removed.
        return torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
