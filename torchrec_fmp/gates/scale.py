"""Multiplies pooled embeddings, sequences of embeddings, and dense columns by gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

# Shapes: B rows (examples, or positions of a sequence feature), K keys (a feature that two tables
# serve has two keys), D dimension of a key, W = sum of the keys' dimensions.

# 1.7 MB of fp32, which stays in a CPU core's cache from one operation to the next.
_CPU_CHUNK_ELEMENTS = 256 * 1664


class Scale(torch.autograd.Function):
    """Multiplies the columns of key k in values_BW by gate k.

    The output and the gradient of the values are the plain product's. If `centered`, the
    gradient of the gates uses the values' deviation from their mean over the rows. See
    `GateConfig`.

    The backward pass processes the batch in chunks that fit into a CPU core's cache. Autograd's
    backward would write and read (B, W) intermediates, which costs four times as much.
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
        # Not mean(): a rank may get an empty batch, whose mean is NaN.
        mean_W = values_BW.sum(0) / max(len(values_BW), 1) if ctx.centered else 0
        dots_BK = []
        for chunk in _chunks(grad_BW):
            gates_of_chunk = gates if gates.dim() == 1 else gates[chunk]
            _multiply(grad_BW[chunk], gates_of_chunk, ctx.lengths, grad_values[chunk])
            dots_BK.append(_dot_per_key(grad_BW[chunk], values_BW[chunk] - mean_W, ctx.lengths))
        grad_gates = torch.cat(dots_BK)
        return grad_values, grad_gates.sum(0) if gates.dim() == 1 else grad_gates, None, None


def _chunks(tensor_BW: Tensor) -> list[slice]:
    """Slices of rows to process one at a time; an empty tensor gives one empty chunk."""
    rows = max(len(tensor_BW), 1)
    step = max(_CPU_CHUNK_ELEMENTS // max(tensor_BW.shape[1], 1), 1) if tensor_BW.is_cpu else rows
    return [slice(start, start + step) for start in range(0, rows, step)]


def _multiply(values_BW: Tensor, gates: Tensor, lengths: Sequence[int], out: Tensor) -> Tensor:
    """Fills `out` with each key's columns times its gate; gates are (K,) or (B, K)."""
    if len(set(lengths)) <= 1:
        shape = (len(values_BW), len(lengths), max(lengths, default=0))
        torch.mul(values_BW.reshape(shape), gates.unsqueeze(-1), out=out.view(shape))
        return out
    key_of_column = tuple(key for key, length in enumerate(lengths) for _ in range(length))
    columns = gates.index_select(-1, _index(key_of_column, gates.device))
    return torch.mul(values_BW, columns, out=out)


def _dot_per_key(left_BW: Tensor, right_BW: Tensor, lengths: Sequence[int]) -> Tensor:
    """Dot products over each key's columns, (B, K)."""
    if len(set(lengths)) <= 1:
        shape = (len(left_BW), len(lengths), max(lengths, default=0))
        return torch.linalg.vecdot(left_BW.reshape(shape), right_BW.reshape(shape))
    pairs = zip(left_BW.split(list(lengths), 1), right_BW.split(list(lengths), 1), strict=True)
    return torch.stack([torch.linalg.vecdot(left, right) for left, right in pairs], dim=1)


@lru_cache(maxsize=256)
def _index(positions: tuple[int, ...], device: torch.device) -> Tensor:
    """The positions on the device, int64, copied once rather than in every step."""
    # The first call may be in inference mode, and autograd cannot save tensors made there.
    with torch.inference_mode(False):
        return torch.tensor(positions, device=device)


def _gates_of_keys(gates: Tensor, features: Sequence[str], keys: Sequence[str]) -> Tensor:
    """(..., F) by feature -> (..., K) by key; `feature@table` is a key of `feature`."""
    names = [key.split("@")[0] for key in keys]
    if names == list(features):
        return gates
    position = {feature: index for index, feature in enumerate(features)}
    return gates.index_select(-1, _index(tuple(position[name] for name in names), gates.device))


def scale_keys(
    embeddings: KeyedTensor, features: Sequence[str], gates: Tensor, centered: bool
) -> KeyedTensor:
    """Multiplies each key's pooled embedding by its feature's gate.

    Args:
        embeddings: K keys with values (B, W); a feature that several tables serve has the keys
            `feature@table`, which share its gate.
        features: features of `gates`, in order; they may include features without a key.
        gates: gate values, (F,) or (B, F) fp32.
        centered: whether the gates' gradient is centered; see `GateConfig`.

    Returns:
        A KeyedTensor with the same keys, values (B, W) in the dtype of `embeddings`.
    """
    keys, lengths, values = embeddings.keys(), embeddings.length_per_key(), embeddings.values()
    gates_of_keys = _gates_of_keys(gates, features, keys).to(values.dtype)
    return KeyedTensor(keys, lengths, Scale.apply(values, gates_of_keys, lengths, centered))


def scale_sequences(
    embeddings: Mapping[str, JaggedTensor], features: Sequence[str], gates: Tensor, centered: bool
) -> dict[str, JaggedTensor]:
    """Multiplies the embeddings of each key's positions by its feature's gate.

    All positions of an example share its gate, so the gate's gradient is their sum.

    Args:
        embeddings: key -> values (N, D) of the N positions of all examples, and lengths (B,); keys
            as in `scale_keys`.
        features: features of `gates`, in order; they may include features without a key.
        gates: gate values, (F,) or (B, F) fp32.
        centered: whether the gates' gradient is centered; see `GateConfig`. The mean is taken over
            the N positions.

    Returns:
        The same keys, lengths and weights; values (N, D) in the dtype of `embeddings`.
    """
    of_keys = _gates_of_keys(gates, features, list(embeddings)).unbind(-1)
    scaled = {}
    for (key, sequence), gate in zip(embeddings.items(), of_keys, strict=True):
        values_ND = sequence.values()
        if gate.dim() == 1:
            gate = gate.repeat_interleave(sequence.lengths(), output_size=len(values_ND))
        gate = gate.unsqueeze(-1).to(values_ND.dtype)
        scaled[key] = JaggedTensor(
            values=Scale.apply(values_ND, gate, [values_ND.shape[1]], centered),
            weights=sequence.weights_or_none(),
            lengths=sequence.lengths_or_none(),
            offsets=sequence.offsets_or_none(),
        )
    return scaled
