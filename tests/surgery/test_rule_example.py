"""The example of a cut rule in the docstring of torchrec_fmp/surgery/rules.py."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.support.selections import select
from torchrec_fmp.surgery import rules
from torchrec_fmp.surgery.blueprint import blueprint
from torchrec_fmp.surgery.cut import Cut, cut

DENSE = 3


@pytest.fixture(scope="module")
def ranker() -> type[nn.Module]:
    """The example's model; running the example registers its rule."""
    assert rules.__doc__ is not None
    _, code = rules.__doc__.split("linear layer::\n")
    code, _ = code.split("\nA rule covers")
    names: dict[str, Any] = {
        "nn": nn,
        "torch": torch,
        "Tensor": Tensor,
        "EmbeddingBagCollection": EmbeddingBagCollection,
        "KeyedJaggedTensor": KeyedJaggedTensor,
    }
    exec(textwrap.dedent(code), names)
    found: type[nn.Module] = names["Ranker"]
    return found


def build(ranker: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=f"t_{features[0]}", embedding_dim=dim, num_embeddings=5, feature_names=features
        )
        for dim, features in ((4, ["a", "b"]), (8, ["c"]))
    ]
    return ranker(EmbeddingBagCollection(tables=tables), DENSE)


def filled(smaller: Cut, old: nn.Module) -> nn.Module:
    """The smaller model with the weights that its `CutMap` takes from the old one."""
    weights = dict(old.named_parameters())
    made = {f: t.apply(weights[t.source].detach()) for f, t in smaller.cut_map.tensors.items()}
    model = smaller.model.to_empty(device="cpu")
    model.load_state_dict(made)
    return model


def test_the_examples_rule_makes_a_model_that_computes_the_same(ranker: type[nn.Module]) -> None:
    old = build(ranker)
    new = filled(cut(blueprint(old), select(a=0, b=0.5, c=0.25)), old)
    assert new.get_parameter("over.weight").shape == (1, DENSE + 4 + 8)
    features = KeyedJaggedTensor.from_lengths_sync(
        keys=["a", "b", "c"],
        values=torch.tensor([0, 1, 2, 3, 4, 0]),
        lengths=torch.tensor([1, 1, 2, 0, 1, 1]),
    )
    dense = torch.randn(2, DENSE)
    # The old model with its features scaled: a, b and c have the gates 0, 0.5 and 0.25.
    scaled = build(ranker)
    gates = torch.tensor([1.0] * DENSE + [0.0] * 4 + [0.5] * 4 + [0.25] * 8)
    with torch.no_grad():
        scaled.get_parameter("over.weight").mul_(gates)
        torch.testing.assert_close(new(dense, features), scaled(dense, features))


def test_the_examples_rule_refuses_a_selection_that_leaves_nothing(
    ranker: type[nn.Module],
) -> None:
    with pytest.raises(ValueError, match="has no features left"):
        cut(blueprint(build(ranker)), select(a=0, b=0, c=0))
