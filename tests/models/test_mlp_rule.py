"""The rule for ERASE's MLP, against its own forward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.support.selections import select
from tests.support.unsharded import (
    DENSE,
    DIM,
    gated_output,
    inputs,
    pruned,
    pruned_output,
    shared_tables,
)
from torchrec_fmp.gates.attach import attach_gates
from torchrec_fmp.models.mlp import Mlp
from torchrec_fmp.surgery.blueprint import blueprint
from torchrec_fmp.surgery.cut import cut

GATES = st.sampled_from([0.0, 0.25, 0.5, 1.0])


def gated_mlp() -> nn.Module:
    """A gated MLP with learned batch normalization statistics."""
    torch.manual_seed(0)
    model = Mlp(shared_tables(), len(DENSE), [5, 3], 0.2, True, torch.device("cpu"))
    for _ in range(3):
        model(*inputs())
    return attach_gates(model, dense={"dense_layer": DENSE})


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries({name: GATES for name in ("a", "b", "c", "d", *DENSE)}))
def test_the_pruned_mlp_computes_the_same_as_the_gated_one(gates: dict[str, float]) -> None:
    model, selection = gated_mlp(), select(**gates)
    if any(gates[name] for name in "abcd"):
        actual = pruned_output(model, selection)
        torch.testing.assert_close(actual, gated_output(model, selection), rtol=0, atol=1e-6)
    else:
        with pytest.raises(ValueError, match="no sparse feature left"):
            cut(blueprint(model), selection)


def test_the_tables_and_the_first_layers_shrink_and_batch_normalization_does_not() -> None:
    model = gated_mlp()
    smaller = pruned(model, select(a=0, c=0, x=0))
    shapes = {name: tuple(tensor.shape) for name, tensor in smaller.state_dict().items()}
    assert shapes["sparse_layer.weight"] == (5, 2 * DIM)
    assert shapes["dense_layer.weight"] == (5, 1)
    assert smaller.embedding_bag_collection.embedding_bags.keys() == {"t_ab", "t_d"}
    old = model.state_dict()
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name in [name for name in old if name.endswith(statistics)]:
        assert torch.equal(smaller.state_dict()[name], old[name]), name
    assert old["over.0.num_batches_tracked"] == 3


def test_a_pruned_mlp_can_be_pruned_again() -> None:
    both = select(a=0, b=0.5, c=0, d=0.3)
    model = gated_mlp()
    once = pruned(model, select(a=0, b=0.5))
    again = pruned(once, select(c=0, d=0.3))
    torch.testing.assert_close(again(*inputs()), gated_output(model, both), rtol=0, atol=1e-6)
