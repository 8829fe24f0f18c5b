"""Modules that multiply features by their gates: pooled embeddings and dense inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_fmp.gates.feature_gates import FeatureGates

# Shapes: B examples, K keys (a feature that two tables serve has two keys), D dimension of a key,
# W = sum of the keys' dimensions.

# Of W = 1,664 floats (26 keys of 64) each, 256 rows are 1.7 MB.
_CPU_CHUNK_ROWS = 256


class _Scale(torch.autograd.Function):
    """values_BW with the columns of key k multiplied by gate k.

    The forward and the gradient of the values are the product's. The gradient of the gates is, if
    `centered`, that of the values' deviation from their mean over the batch. See `GateConfig`.

    The backward pass goes through the batch in chunks that fit into a CPU core's cache; autograd's
    own would write and read (B, W) intermediates, which costs four times as much.
    """

    @staticmethod
    def forward(
        ctx: Any, values_BW: Tensor, gates: Tensor, lengths: Sequence[int], centered: bool
    ) -> Tensor:
        ctx.save_for_backward(values_BW, gates)
        ctx.lengths = lengths
        ctx.centered = centered
        return _multiply(values_BW, gates, lengths, torch.empty_like(values_BW))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad_BW,) = grads
        values_BW, gates = ctx.saved_tensors
        grad_values = torch.empty_like(grad_BW)
        # Not mean(): of an empty batch, which a rank may get, that is NaN.
        mean_W = values_BW.sum(0) / max(len(values_BW), 1) if ctx.centered else 0
        rows = _CPU_CHUNK_ROWS if grad_BW.is_cpu else max(len(grad_BW), 1)
        dots_BK = []
        for start in range(0, max(len(grad_BW), 1), rows):
            chunk = slice(start, start + rows)
            gates_of_chunk = gates if gates.dim() == 1 else gates[chunk]
            _multiply(grad_BW[chunk], gates_of_chunk, ctx.lengths, grad_values[chunk])
            dots_BK.append(_dot_per_key(grad_BW[chunk], values_BW[chunk] - mean_W, ctx.lengths))
        grad_gates = torch.cat(dots_BK)
        return grad_values, grad_gates.sum(0) if gates.dim() == 1 else grad_gates, None, None


def _multiply(values_BW: Tensor, gates: Tensor, lengths: Sequence[int], out: Tensor) -> Tensor:
    """`out`, filled with each key's columns times its gate; gates are (K,) or (B, K)."""
    if len(set(lengths)) == 1:
        shape = (len(values_BW), len(lengths), lengths[0])
        torch.mul(values_BW.reshape(shape), gates.unsqueeze(-1), out=out.view(shape))
        return out
    repeats = torch.tensor(lengths, device=gates.device)
    columns = gates.repeat_interleave(repeats, dim=-1, output_size=sum(lengths))
    return torch.mul(values_BW, columns, out=out)


def _dot_per_key(left_BW: Tensor, right_BW: Tensor, lengths: Sequence[int]) -> Tensor:
    """Dot products over each key's columns, (B, K)."""
    if len(set(lengths)) == 1:
        shape = (len(left_BW), len(lengths), lengths[0])
        return torch.linalg.vecdot(left_BW.reshape(shape), right_BW.reshape(shape))
    pairs = zip(left_BW.split(list(lengths), 1), right_BW.split(list(lengths), 1), strict=True)
    return torch.stack([torch.linalg.vecdot(left, right) for left, right in pairs], dim=1)


def scale_keys(
    embeddings: KeyedTensor, features: Sequence[str], gates: Tensor, centered: bool
) -> KeyedTensor:
    """Multiplies each key's pooled embedding by its feature's gate.

    Args:
        embeddings: K keys with values (B, W); a feature that several tables serve has the keys
            `feature@table`, which share its gate.
        features: the names that `gates` has values for.
        gates: (F,) or (B, F) fp32.
        centered: see `GateConfig`.

    Returns:
        A KeyedTensor with the same keys, values (B, W) in the dtype of `embeddings`.
    """
    keys = embeddings.keys()
    names = [key.split("@")[0] for key in keys]
    if names != list(features):
        position = {feature: index for index, feature in enumerate(features)}
        index = torch.tensor([position[name] for name in names], device=gates.device)
        gates = gates.index_select(-1, index)
    values = embeddings.values()
    lengths = embeddings.length_per_key()
    scaled = _Scale.apply(values, gates.to(values.dtype), lengths, centered)
    return KeyedTensor(keys, lengths, scaled)


class GatedEmbeddingBagCollection(nn.Module):
    """An `EmbeddingBagCollection` whose features each have a gate behind the lookup.

    Pooling is linear, so scaling the pooled embedding equals scaling every row that went into it,
    under every sharding type.

    ::

        KeyedJaggedTensor -> EmbeddingBagCollection -> KeyedTensor -> * gates -> KeyedTensor

    Args:
        embedding_bag_collection: the user's collection.
        gates: one gate for each of its features.
    """

    def __init__(
        self, embedding_bag_collection: EmbeddingBagCollection, gates: FeatureGates
    ) -> None:
        super().__init__()
        self._embedding_bag_collection = embedding_bag_collection
        self.gates = gates

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled, gated embeddings: (B, W) by key."""
        embeddings = self._embedding_bag_collection(features)
        gates = self.gates(self.gates.next_step(), features.stride())
        return scale_keys(embeddings, self.gates.features, gates, self.gates.config.centered)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._embedding_bag_collection.embedding_bag_configs()

    def is_weighted(self) -> bool:
        return self._embedding_bag_collection.is_weighted()

    @property
    def device(self) -> torch.device:
        return self._embedding_bag_collection.device


class GatedDense(nn.Module):
    """A module that reads dense features, with a gate on each column of its input.

    Args:
        module: the user's module; its only argument is the dense input (B, F).
        gates: one gate for each column, in order.
    """

    def __init__(self, module: nn.Module, gates: FeatureGates) -> None:
        super().__init__()
        self._module = module
        self.gates = gates

    def forward(self, dense_BF: Tensor) -> Tensor:
        """The module's output for the gated input.

        Raises:
            ValueError: if the input has another number of columns than there are gates.
        """
        if dense_BF.shape[-1] != len(self.gates.features):
            raise ValueError(
                f"the dense input has {dense_BF.shape[-1]} columns and {self.gates.name!r} has "
                f"{len(self.gates.features)} gates: name every column, in order, in attach_gates"
            )
        gates = self.gates(self.gates.next_step(), dense_BF.shape[0])
        lengths = [1] * len(self.gates.features)
        centered = self.gates.config.centered
        return self._module(_Scale.apply(dense_BF, gates.to(dense_BF.dtype), lengths, centered))
