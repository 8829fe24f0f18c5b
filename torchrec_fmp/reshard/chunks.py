"""Parts of tensors in transit between two ranks, packed into messages of bounded size.

Both ends split the same list of parts by the same rule, so a message need not list its contents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Each part of a message starts at a multiple of this, so that it can be viewed in its dtype.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Part:
    """A box of one tensor that leaves or arrives.

    Args:
        name: name of the tensor and the box, for errors.
        view: view of the tensor, (rows, columns), or (rows,) for a state with one value per row.
        share: fraction of the target shard's columns that lie in the box; 1 except where a state
            with one value per row is merged.
    """

    name: str
    view: Tensor
    share: float = 1.0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.view[:1].numel() * self.view.element_size()

    def rows(self, start: int, count: int) -> Part:
        """The part's rows [start, start + count)."""
        return Part(self.name, self.view.narrow(0, start, count), self.share)

    def accept(self, value: Tensor) -> None:
        """Writes a received value.

        For a state with one value per row, adds the value weighted by `share`. Together, the column
        shards give their width-weighted mean.
        """
        if self.share == 1 or self.view.dim() > 1:
            self.view.copy_(value)
        else:
            self.view.add_(value, alpha=self.share)


def chunked(parts: Sequence[Part], chunk_bytes: int) -> Iterator[list[Part]]:
    """Splits the parts by rows into messages of at most `chunk_bytes`, or one row if that is more.

    The result depends only on the parts' shapes and dtypes.
    """
    message: list[Part] = []
    # The room is a multiple of the alignment, so a part that fits still fits with its padding.
    size = chunk_bytes // _ALIGNMENT * _ALIGNMENT
    room = size
    for part in parts:
        start, total = 0, part.view.shape[0]
        while start < total:
            count = min(total - start, room // part.row_bytes)
            if count <= 0 and message:
                yield message
                message, room = [], size
                continue
            piece = part.rows(start, max(count, 1))
            message.append(piece)
            room -= _padded(piece)
            start += max(count, 1)
    if message:
        yield message


def message_bytes(message: Sequence[Part]) -> int:
    """Bytes of a message, including the padding between its parts.

    No padding follows the last part, so that one end may send a single part from a buffer and the
    other receive it in place.
    """
    return sum(_padded(part) for part in message[:-1]) + _bytes(message[-1])


def pack(message: Sequence[Part], buffer: Tensor) -> None:
    """Writes the parts into a message buffer of uint8."""
    for part, place in _places(message, buffer):
        place.copy_(part.view)


def unpack(message: Sequence[Part], buffer: Tensor) -> None:
    """Writes a received message into the parts."""
    for part, place in _places(message, buffer):
        part.accept(place)


def direct(message: Sequence[Part], device: torch.device) -> Tensor | None:
    """The tensor itself as uint8, if the message is one contiguous tensor and needs no buffer."""
    if len(message) > 1:
        return None
    (part,) = message
    view = part.view
    if view.device != device or not view.is_contiguous():
        return None
    if view.dim() == 1 and part.share != 1:
        return None
    # A single element counts as contiguous under any stride.
    return view.as_strided((view.numel(),), (1,)).view(torch.uint8)


def _bytes(part: Part) -> int:
    return part.view.numel() * part.view.element_size()


def _padded(part: Part) -> int:
    return -(-_bytes(part) // _ALIGNMENT) * _ALIGNMENT


def _places(message: Sequence[Part], buffer: Tensor) -> Iterator[tuple[Part, Tensor]]:
    start = 0
    for part in message:
        view = part.view
        yield part, buffer[start : start + _bytes(part)].view(view.dtype).view(view.shape)
        start += _padded(part)
