"""Gates are attached to a model once, where requested, and can be found again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_fmp.gates.attach import (
    attach_gates,
    embedding_features,
    feature_gates,
    gate_optimizer,
)
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.gated import (
    GatedDense,
    GatedEmbeddingBagCollection,
    GatedEmbeddingCollection,
)
from torchrec_fmp.gates.hard_concrete import HardConcrete

EBC = "sparse_arch.embedding_bag_collection"


def collection(*features_of_tables: Sequence[str]) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=f"t{i}", embedding_dim=4, num_embeddings=10, feature_names=list(features)
            )
            for i, features in enumerate(features_of_tables)
        ]
    )


def dlrm() -> DLRM:
    return DLRM(collection(["a", "b"], ["c"]), 2, [8, 4], [8, 1])


def test_every_collection_and_named_dense_module_gets_gates_and_keeps_its_place() -> None:
    model = dlrm()
    dense_arch = model.dense_arch
    returned = attach_gates(model, GateConfig(), {"dense_arch": ["x", "y"]})
    assert returned is model
    assert type(model.get_submodule(EBC)) is GatedEmbeddingBagCollection
    assert type(model.dense_arch) is GatedDense
    assert model.dense_arch._module is dense_arch
    assert [(fqn, gates.features, gates.name) for fqn, gates in feature_gates(model)] == [
        (f"{EBC}.gates", ("a", "b", "c"), EBC),
        ("dense_arch.gates", ("x", "y"), "dense_arch"),
    ]
    assert embedding_features(model) == {EBC: ("a", "b", "c")}


def test_a_feature_of_two_tables_gets_one_gate() -> None:
    model = nn.ModuleDict({"ebc": collection(["a", "b"], ["b", "c"])})
    attach_gates(model, GateConfig())
    assert [gates.features for _, gates in feature_gates(model)] == [("a", "b", "c")]


def test_parameters_other_than_gates_stay_the_same_objects() -> None:
    model = dlrm()
    before = {id(parameter) for parameter in model.parameters()}
    attach_gates(model, GateConfig(), {"dense_arch": ["x", "y"]})
    gates = {id(module.log_alpha) for _, module in feature_gates(model)}
    assert {id(parameter) for parameter in model.parameters()} == before | gates


def test_a_model_without_a_collection_is_refused() -> None:
    with pytest.raises(ValueError, match="no EmbeddingBagCollection or .* nothing to gate"):
        attach_gates(nn.ModuleDict({"dense": nn.Linear(2, 2)}), GateConfig())


def test_a_model_without_a_collection_may_have_gated_dense_inputs() -> None:
    model = nn.ModuleDict({"dense": nn.Linear(2, 2)})
    attach_gates(model, GateConfig(), {"dense": ["x", "y"]})
    assert [fqn for fqn, _ in feature_gates(model)] == ["dense.gates"]


def test_attaching_gates_twice_is_refused() -> None:
    model = attach_gates(dlrm(), GateConfig())
    with pytest.raises(ValueError, match="already has gates"):
        attach_gates(model, GateConfig())


def sequence_collection(*features: str) -> EmbeddingCollection:
    tables = [
        EmbeddingConfig(
            name=f"t_{feature}", embedding_dim=4, num_embeddings=10, feature_names=[feature]
        )
        for feature in features
    ]
    return EmbeddingCollection(tables=tables)


def test_overlapping_collections_share_gates_even_through_a_third_one() -> None:
    model = nn.ModuleDict(
        {
            "wide": collection(["a", "b"]),
            "alone": collection(["x"]),
            "sequence": sequence_collection("c", "d"),
            "deep": collection(["b"], ["c"]),
        }
    )
    attach_gates(model)
    names = ["wide", "sequence", "deep"]
    assert len({id(model[name].gates) for name in names}) == 1
    assert dict(feature_gates(model)).keys() == {"wide.gates", "alone.gates"}
    assert dict(feature_gates(model))["wide.gates"].features == ("a", "b", "c", "d")
    assert embedding_features(model) == {
        "wide": ("a", "b"),
        "alone": ("x",),
        "sequence": ("c", "d"),
        "deep": ("b", "c"),
    }
    log_alphas = [name for name, _ in model.named_parameters() if name.endswith("log_alpha")]
    assert log_alphas == ["wide.gates.log_alpha", "alone.gates.log_alpha"]
    (group,) = gate_optimizer(model, 0.1).param_groups
    assert len(group["params"]) == 2


def test_a_shared_gate_has_the_same_noise_in_all_collections_and_sums_their_gradients() -> None:
    model = nn.ModuleDict({"wide": collection(["a", "b"]), "deep": collection(["c"], ["b"])})
    attach_gates(model, GateConfig(distribution=HardConcrete(temperature=10.0)))
    features = KeyedJaggedTensor(
        keys=["a", "b", "c"], values=torch.arange(6), lengths=torch.ones(6, dtype=torch.int64)
    )
    ((_, gates),) = feature_gates(model)
    for step in range(2):
        gates.log_alpha.grad = None
        sums, column = [], gates.features.index("b")
        for name in ("wide", "deep"):
            plain = model[name].collection(features)["b"].detach()
            gated = model[name](features)["b"]
            gate = gates(step, 2)[:, column : column + 1]
            torch.testing.assert_close(gated, plain * gate)
            (grad,) = torch.autograd.grad(gated.sum(), gates.log_alpha, retain_graph=True)
            sums.append(grad)
            gated.sum().backward()
        torch.testing.assert_close(gates.log_alpha.grad, sums[0] + sums[1])
        assert (gates.log_alpha.grad[column] != sums[0][column]).all()


def test_collections_of_both_kinds_are_gated_in_place() -> None:
    model = nn.ModuleDict({"ebc": collection(["a"]), "ec": sequence_collection("s")})
    attach_gates(model)
    assert type(model["ebc"]) is GatedEmbeddingBagCollection
    assert type(model["ec"]) is GatedEmbeddingCollection
    assert embedding_features(model) == {"ebc": ("a",), "ec": ("s",)}


def test_a_collection_used_in_two_places_is_gated_in_both() -> None:
    shared = collection(["a"])
    first, second = nn.Module(), nn.Module()
    first.ebc = second.ebc = shared
    model = nn.ModuleList([first, second])
    attach_gates(model)
    assert first.ebc is second.ebc
    assert type(first.ebc) is GatedEmbeddingBagCollection
    assert first.ebc.collection is shared


def test_a_dense_column_with_the_name_of_a_sparse_feature_is_refused() -> None:
    with pytest.raises(ValueError, match=f"'c': .*{EBC}.*dense_arch"):
        attach_gates(dlrm(), GateConfig(), {"dense_arch": ["x", "c"]})


def test_a_dense_column_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'x': .*dense_arch"):
        attach_gates(dlrm(), GateConfig(), {"dense_arch": ["x", "x"]})


def test_an_unknown_dense_module_is_refused() -> None:
    with pytest.raises(AttributeError, match="dense_arhc"):
        attach_gates(dlrm(), GateConfig(), {"dense_arhc": ["x", "y"]})


def test_a_model_that_is_itself_the_collection_is_refused() -> None:
    with pytest.raises(ValueError, match="wrap it in a module first"):
        attach_gates(collection(["a"]), GateConfig())
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="wrap it in a module first"):
        attach_gates(model, dense={"": ["x", "y"]})


@pytest.mark.parametrize(
    "dense", [{"dense_arhc": ["x", "y"]}, {"dense_arch": ["x", "c"]}], ids=["fqn", "name"]
)
def test_a_refused_attachment_leaves_the_model_unchanged(dense: dict[str, list[str]]) -> None:
    model = dlrm()
    with pytest.raises((AttributeError, ValueError)):
        attach_gates(model, GateConfig(), dense)
    assert list(feature_gates(model)) == []
    assert type(model.get_submodule(EBC)) is EmbeddingBagCollection


def test_gate_optimizer_steps_only_gates_and_keeps_them_in_bounds() -> None:
    model = attach_gates(dlrm(), GateConfig(), {"dense_arch": ["x", "y"]})
    optimizer = gate_optimizer(model, learning_rate=100.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(iter(feature_gates(model)))[1].log_alpha.grad.neg_()
    optimizer.step()
    after = dict(model.named_parameters())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"{EBC}.gates.log_alpha", "dense_arch.gates.log_alpha"}
    low, high = GateConfig().log_alpha_bounds
    assert after[f"{EBC}.gates.log_alpha"].tolist() == [high] * 3
    assert after["dense_arch.gates.log_alpha"].tolist() == [low] * 2


def test_gate_optimizer_of_a_model_without_gates_is_refused() -> None:
    with pytest.raises(ValueError, match="no gates: call attach_gates before it is sharded"):
        gate_optimizer(dlrm(), 0.1)


class OtherCollection(EmbeddingBagCollection):
    """A subclass, which may compute something else."""


def weighted() -> EmbeddingBagCollection:
    tables = [EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=5, feature_names=["a"])]
    return EmbeddingBagCollection(tables=tables, is_weighted=True)


@pytest.mark.parametrize(
    "build",
    [
        lambda: FeatureProcessedEmbeddingBagCollection(
            weighted(), PositionWeightedModuleCollection({"a": 3})
        ),
        lambda: OtherCollection(tables=weighted().embedding_bag_configs()),
    ],
    ids=["feature-processed", "subclass"],
)
def test_a_collection_that_cannot_be_pruned_is_refused_before_training(
    build: Callable[[], nn.Module],
) -> None:
    model = nn.ModuleDict({"other": build()})
    kind = type(model["other"]).__name__
    with pytest.raises(TypeError, match=f"other is a {kind}; only .* can be gated and pruned"):
        attach_gates(model)
