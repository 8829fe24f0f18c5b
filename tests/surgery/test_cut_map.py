"""`TensorCut` and the digest of a `CutMap`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_fmp.surgery.cut_map import CutMap, TensorCut


@given(st.data())
def test_the_new_tensor_is_the_scaled_columns_of_the_old_one(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 8))
    columns = data.draw(st.lists(st.integers(0, width - 1), unique=True))
    old = torch.arange(3.0 * width).reshape(3, width)
    scale = torch.linspace(0.5, 1, len(columns))
    cut = TensorCut("w", old.shape, torch.tensor(columns, dtype=torch.int64), scale)
    new, state = cut.apply(old), cut.select(old)
    assert new.shape == state.shape == cut.shape == (3, len(columns))
    for position, column in enumerate(columns):
        assert torch.equal(new[:, position], old[:, column] * scale[position])
        # An optimizer's state is not scaled with the weight.
        assert torch.equal(state[:, position], old[:, column])


def test_a_cut_that_changes_nothing_returns_an_independent_copy() -> None:
    old = torch.rand(2, 3)
    new = TensorCut("w", old.shape).apply(old)
    assert torch.equal(new, old)
    new.zero_()
    assert old.any()


@pytest.mark.parametrize("shape", [(2, 4), (3, 2), (6,), (1, 2, 3)])
@pytest.mark.parametrize("columns", [None, torch.tensor([0, 1])])
def test_a_tensor_of_another_shape_is_refused(
    shape: tuple[int, ...], columns: torch.Tensor | None
) -> None:
    cut = TensorCut("over.weight", torch.Size([2, 3]), columns)
    for method in (cut.apply, cut.select):
        with pytest.raises(ValueError, match=r"over\.weight has the shape .* made for \(2, 3\)"):
            method(torch.zeros(shape))


def digest(**changes: Any) -> str:
    values = {
        "source": "w",
        "source_shape": torch.Size([2, 3]),
        "columns": torch.tensor([0, 2]),
        "scale": torch.tensor([1.0, 0.5]),
    }
    return CutMap({"w": TensorCut(**{**values, **changes})}).digest()


def test_equal_maps_have_equal_digests() -> None:
    assert digest() == digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "v"},
        {"source_shape": torch.Size([2, 4])},
        {"columns": torch.tensor([0, 1])},
        {"columns": None},
        {"scale": torch.tensor([1.0, 0.25])},
        {"scale": None},
    ],
    ids=str,
)
def test_any_change_changes_the_digest(changes: dict[str, Any]) -> None:
    assert digest(**changes) != digest()
