"""Parts of tensors, packed into messages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_fmp.reshard.chunks import Part, chunked, direct, message_bytes, pack, unpack

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64)
# (rows, columns or None for a state with one value per row, dtype)
Shape = tuple[int, int | None, torch.dtype]
shapes = st.lists(
    st.tuples(st.integers(1, 20), st.none() | st.integers(1, 9), st.sampled_from(DTYPES)),
    min_size=1,
    max_size=6,
)
chunk_sizes = st.integers(0, 400)


def values(rows: int, columns: int | None, dtype: torch.dtype) -> Tensor:
    """Random bytes, so that every bit counts."""
    size = rows * (columns or 1) * dtype.itemsize
    whole = torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype)
    return whole if columns is None else whole.view(rows, columns)


def contiguous(shapes: list[Shape]) -> list[Part]:
    return [Part(f"part {i}", values(*shape)) for i, shape in enumerate(shapes)]


def strided(shapes: list[Shape]) -> list[Part]:
    """The same shapes as boxes of larger tensors."""
    parts = []
    for i, (rows, columns, dtype) in enumerate(shapes):
        whole = values(rows + 2, (columns or 1) + 3, dtype)
        view = whole[1 : rows + 1, 2]
        if columns is not None:
            view = whole[1 : rows + 1, 2 : columns + 2]
        parts.append(Part(f"part {i}", view))
    return parts


def bits(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


@given(shapes, chunk_sizes)
def test_every_row_is_in_one_message_and_in_order(shapes: list[Shape], size: int) -> None:
    parts = strided(shapes)
    pieces = [piece for message in chunked(parts, size) for piece in message]
    order = list(dict.fromkeys(piece.name for piece in pieces))
    assert order == [part.name for part in parts]
    for part in parts:
        rows = torch.cat([piece.view for piece in pieces if piece.name == part.name])
        assert torch.equal(bits(rows), bits(part.view))


@given(shapes, chunk_sizes)
def test_a_message_is_at_most_one_chunk_or_one_row(shapes: list[Shape], size: int) -> None:
    for message in chunked(strided(shapes), size):
        one_row = len(message) == 1 and len(message[0].view) == 1
        assert message_bytes(message) <= size or one_row


def test_rows_larger_than_a_chunk_are_sent_one_by_one() -> None:
    messages = list(chunked([Part("t", torch.zeros(1000, 4))], 8))
    assert [message_bytes(message) for message in messages] == [16] * 1000


def test_parts_are_packed_into_few_large_messages() -> None:
    parts = [Part("t", torch.zeros(100, 4)), Part("u", torch.zeros(100, 4))]
    assert [message_bytes(message) for message in chunked(parts, 320)] == [320] * 10


def test_no_parts_make_no_message() -> None:
    assert list(chunked([], 64)) == []


@given(shapes, chunk_sizes)
def test_both_ends_cut_equal_messages_for_any_memory_layout(shapes: list[Shape], size: int) -> None:
    ends = [
        [[(piece.name, piece.view.shape) for piece in message] for message in chunked(parts, size)]
        for parts in (contiguous(shapes), strided(shapes))
    ]
    assert ends[0] == ends[1]


@settings(deadline=None)
@given(shapes, chunk_sizes, st.booleans(), st.booleans())
def test_a_packed_message_is_unpacked_bit_equal(
    shapes: list[Shape], size: int, from_boxes: bool, to_boxes: bool
) -> None:
    sources = (strided if from_boxes else contiguous)(shapes)
    targets = (strided if to_boxes else contiguous)(shapes)
    for leaving, arriving in zip(chunked(sources, size), chunked(targets, size), strict=True):
        buffer = torch.full((message_bytes(leaving),), 255, dtype=torch.uint8)
        pack(leaving, buffer)
        unpack(arriving, buffer)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(bits(source.view), bits(target.view))


def test_unpacking_leaves_elements_outside_the_box_unchanged() -> None:
    whole = torch.zeros(4, 5)
    message = [Part("t", whole[1:3, 2:4])]
    unpack(message, bits(torch.ones(2, 2)))
    assert whole.sum() == 4 and whole[1:3, 2:4].all()


@given(shapes, chunk_sizes, st.booleans())
def test_a_message_sent_in_place_equals_the_packed_one(
    shapes: list[Shape], size: int, from_boxes: bool
) -> None:
    for message in chunked((strided if from_boxes else contiguous)(shapes), size):
        in_place = direct(message, CPU)
        if not from_boxes:
            assert (in_place is None) == (len(message) > 1)
        if in_place is not None:
            assert in_place.numel() == message_bytes(message)
            buffer = torch.empty_like(in_place)
            pack(message, buffer)
            assert torch.equal(in_place, buffer)


def test_writing_to_a_direct_message_writes_to_the_tensor() -> None:
    table = torch.zeros(4, 3)
    message = direct([Part("rows", table[1:3])], CPU)
    assert message is not None
    message.copy_(bits(torch.ones(2, 3)))
    assert table.tolist() == [[0.0] * 3, [1.0] * 3, [1.0] * 3, [0.0] * 3]


@pytest.mark.parametrize(
    ("views", "share", "in_place"),
    [
        ([torch.zeros(4, 3)], 1.0, True),
        ([torch.zeros(4, 3)], 0.5, True),
        ([torch.zeros(4)], 1.0, True),
        ([torch.zeros(1, 3)[:, :2]], 1.0, True),
        ([torch.zeros(4)], 0.5, False),
        ([torch.zeros(4, 3)[:, :2]], 1.0, False),
        ([torch.zeros(4, 2)[:, 0]], 1.0, False),
        ([torch.zeros(4, 3, device="meta")], 1.0, False),
        ([torch.zeros(4, 3), torch.zeros(4)], 1.0, False),
    ],
    ids=[
        "whole rows",
        "part of wider rows",
        "row values",
        "a part of one row",
        "row values to be merged",
        "columns",
        "strided row values",
        "another device",
        "two tensors",
    ],
)
def test_only_a_single_contiguous_unmerged_tensor_is_sent_without_a_buffer(
    views: list[Tensor], share: float, in_place: bool
) -> None:
    message = [Part(f"part {i}", view, share) for i, view in enumerate(views)]
    assert (direct(message, CPU) is not None) == in_place


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_row_values_of_column_shards_are_summed_by_their_shares(dtype: torch.dtype) -> None:
    state = torch.zeros(2, dtype=dtype)
    Part("narrow", state, 0.25).accept(torch.tensor([4, 8], dtype=dtype))
    Part("wide", state, 0.75).accept(torch.tensor([8, 4], dtype=dtype))
    assert state.tolist() == [7, 5]


@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_an_unmerged_part_is_overwritten(shape: tuple[int, ...]) -> None:
    target, value = torch.full(shape, torch.nan), torch.rand(shape)
    Part("t", target, 1.0 if len(shape) == 1 else 0.5).accept(value)
    assert torch.equal(target, value)
