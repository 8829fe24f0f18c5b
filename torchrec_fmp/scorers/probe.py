"""Lets a scorer see and change, from outside, the values that a sharded model reads per feature.

Hooks on the gated modules pass each block of features to the scorer: the pooled embeddings of a
collection, the sequence of one feature, or the dense columns of an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.distributed.types import LazyAwaitable
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_fmp.embeddings.evaluation import evaluation, steps_uncounted
from torchrec_fmp.gates.gated import GatedDense
from torchrec_fmp.gates.scale import Scale
from torchrec_fmp.gates.sharded import ShardedGatedCollection


@dataclass(frozen=True)
class Block:
    """A gated module's values for some features.

    Shapes: R rows, K keys, W = sum of the keys' columns, B examples, F features of the model.

    Args:
        fqn: fqn of the gated module.
        features: feature of each of the K keys; a feature that several tables serve has several
            keys.
        lengths: number of columns of each of the K keys: the embedding dimension, or 1 for a dense
            column.
        values: (R, W) values.
        examples: (R,) int64, example of each row; None if row r belongs to example r.
        ids: input ids of the collection; None for dense columns.
    """

    fqn: str
    features: tuple[str, ...]
    lengths: tuple[int, ...]
    values: Tensor
    examples: Tensor | None = None
    ids: KeyedJaggedTensor | None = None

    @property
    def batch_size(self) -> int:
        """Number of examples B."""
        return len(self.values) if self.ids is None else self.ids.stride()

    def of_keys(self, values: Tensor, features: Sequence[str]) -> Tensor:
        """Values per feature, (..., F) in the order of `features` -> values per key, (..., K)."""
        return values.index_select(-1, self._positions(features))

    def per_example(self, values: Tensor, features: Sequence[str], batch_size: int) -> Tensor:
        """(R, W) -> (B, F) sums over each example's rows and each feature's columns; 0 if none."""
        lengths = torch.tensor(self.lengths, device=values.device)
        columns = self._positions(features).repeat_interleave(lengths, output_size=values.shape[1])
        sums = values.new_zeros(len(values), len(features)).index_add(1, columns, values)
        if self.examples is None:
            return sums
        return values.new_zeros(batch_size, len(features)).index_add(0, self.examples, sums)

    def scaled(self, gates: Tensor) -> Tensor:
        """(R, W) values times the keys' gates: (K,), or (B, K) with one row per example."""
        if gates.dim() == 2 and self.examples is not None:
            gates = gates.index_select(0, self.examples)
        return Scale.apply(self.values, gates.to(self.values.dtype), self.lengths, False)

    def _positions(self, features: Sequence[str]) -> Tensor:
        """(K,) int64, index in `features` of each key's feature."""
        position = {feature: index for index, feature in enumerate(features)}
        return torch.tensor([position[name] for name in self.features], device=self.values.device)


# Returns the values that the model reads instead of the block's values.
Change = Callable[[Block], Tensor]


@contextmanager
def probed(model: nn.Module, change: Change) -> Iterator[None]:
    """Within this context, the model reads the values that `change` returns.

    A forward pass calls `change` once for every gated dense input and `EmbeddingBagCollection`, and
    once for every feature and table of an `EmbeddingCollection`, in the order in which they are
    read.

    Args:
        model: sharded model with gates attached and open.
        change: function from a block to values of the same shape.
    """
    with ExitStack() as stack:
        for fqn, module in get_unwrapped_module(model).named_modules():
            if isinstance(module, ShardedGatedCollection):
                hook = partial(_change_embeddings, change, fqn)
                stack.callback(module.register_forward_hook(hook).remove)
            elif isinstance(module, GatedDense):
                columns = partial(_change_columns, change, fqn, module.gates.features)
                stack.callback(module._module.register_forward_pre_hook(columns).remove)
        yield


@contextmanager
def observed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients, for `torch.autograd.grad` with respect to probed values.

    Gradients do not flow back past the embeddings, so that no fused optimizer steps, and
    DistributedDataParallel does not wait for gradients that never arrive.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        stack.enter_context(steps_uncounted(model))
        stack.enter_context(torch.enable_grad())
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


def _change_embeddings(
    change: Change,
    fqn: str,
    module: nn.Module,
    args: tuple[KeyedJaggedTensor, ...],
    embeddings: LazyAwaitable[Any],
) -> None:
    def changed(output: KeyedTensor | Mapping[str, JaggedTensor]) -> Any:
        if isinstance(output, KeyedTensor):
            return _change_pooled(change, fqn, output, args[0])
        return {
            key: _change_sequence(change, fqn, key, sequence, args[0])
            for key, sequence in output.items()
        }

    embeddings.callbacks.append(changed)


def _change_pooled(
    change: Change, fqn: str, pooled: KeyedTensor, ids: KeyedJaggedTensor
) -> KeyedTensor:
    keys, lengths = pooled.keys(), pooled.length_per_key()
    features = tuple(map(_feature_of, keys))
    block = Block(fqn, features, tuple(lengths), pooled.values(), ids=ids)
    return KeyedTensor(keys, lengths, change(block))


def _change_sequence(
    change: Change, fqn: str, key: str, sequence: JaggedTensor, ids: KeyedJaggedTensor
) -> JaggedTensor:
    values, lengths = sequence.values(), sequence.lengths()
    examples = torch.arange(len(lengths), device=values.device).repeat_interleave(
        lengths, output_size=len(values)
    )
    block = Block(fqn, (_feature_of(key),), (values.shape[1],), values, examples, ids)
    return JaggedTensor(change(block), weights=sequence.weights_or_none(), lengths=lengths)


def _change_columns(
    change: Change, fqn: str, features: tuple[str, ...], module: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return (change(Block(fqn, features, (1,) * len(features), args[0])), *args[1:])


def _feature_of(key: str) -> str:
    """A feature that several tables serve has the keys `feature@table`."""
    return key.split("@")[0]
