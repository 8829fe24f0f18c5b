"""`CutMap`: the source of every tensor in the smaller model.

The same map moves weights, fused optimizer states and dense optimizer states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorCut:
    """`new = old[..., columns] * scale`.

    Args:
        source: fqn of the tensor in the old model.
        source_shape: shape of that tensor.
        columns: positions kept along the last dimension, int64; None keeps all.
        scale: folded gates, broadcast along the last dimension; None is exactly 1.
    """

    source: str
    source_shape: torch.Size
    columns: Tensor | None = None
    scale: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the new tensor."""
        if self.columns is None:
            return self.source_shape
        return torch.Size([*self.source_shape[:-1], len(self.columns)])

    @property
    def is_whole(self) -> bool:
        """Whether the new tensor equals the old one, neither cut nor scaled."""
        return self.columns is None and self.scale is None

    def apply(self, tensor: Tensor) -> Tensor:
        """The new parameter or buffer: a new tensor of `shape`.

        Raises:
            ValueError: if `tensor` does not have the source's shape.
        """
        kept = self.select(tensor)
        return kept if self.scale is None else kept * self.scale.to(kept)

    def select(self, tensor: Tensor) -> Tensor:
        """The part of an optimizer state that survives, unscaled: a new tensor of `shape`.

        Raises:
            ValueError: if `tensor` does not have the source's shape.
        """
        if tensor.shape != self.source_shape:
            raise ValueError(
                f"{self.source} has the shape {tuple(tensor.shape)}, but the cut was made for "
                f"{tuple(self.source_shape)}"
            )
        if self.columns is None:
            return tensor.clone()
        return tensor.index_select(-1, self.columns.to(tensor.device))


@dataclass(frozen=True)
class CutMap:
    """New fqn -> its cut, for every parameter and buffer of the new model."""

    tensors: Mapping[str, TensorCut] = field(default_factory=dict)

    def digest(self) -> str:
        """A hash that is equal for equal maps, on any rank."""
        hasher = hashlib.blake2b(digest_size=16)
        for fqn, cut in self.tensors.items():
            hasher.update(f"{fqn}={cut.source}{tuple(cut.source_shape)}".encode())
            for tensor in (cut.columns, cut.scale):
                hasher.update(b"-" if tensor is None else tensor.cpu().numpy().tobytes())
        return hasher.hexdigest()
