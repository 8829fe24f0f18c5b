"""Sharded gates on sequence features, and gates that two collections share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.support.gated_dlrm import Tensors, local, set_open
from tests.support.process_group import ProcessGroup
from tests.support.sequence_model import (
    BAG_TABLES,
    DIM,
    KEYS,
    SEQUENCE_TABLES,
    SHARDINGS,
    STEPS,
    Case,
    batches,
    build_model,
    fused_sharders,
    optimizers,
    shard,
)
from torchrec_fmp.embeddings.fqns import own_parameters
from torchrec_fmp.gates.attach import embedding_features, feature_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.gated import GatedEmbeddingCollection
from torchrec_fmp.gates.hard_concrete import HardConcrete
from torchrec_fmp.gates.sharded import ShardedGatedEmbeddingCollection, sharders
from torchrec_fmp.gates.step_counter import StepCounter
from torchrec_fmp.surgery.blueprint import blueprint


def plain_names(tensors: Mapping[str, Any]) -> Tensors:
    """Tensors under their names in the plain model, without the tensors of the gates."""
    return {
        name.replace("._embedding_collection", "").replace("._embedding_bag_collection", ""): tensor
        for name, tensor in local(tensors).items()
        if ".gates." not in name and ".step." not in name
    }


def trained_with_open_gates(case: Case) -> dict[str, Tensors]:
    """Results of training, under the same keys for a plain and a gated model."""
    dmp = shard(case, build_model(case))
    set_open(dmp, True)
    optimizer = optimizers(dmp)
    found = {}
    for step, batch in enumerate(batches()):
        optimizer.zero_grad()
        loss, logits = dmp(batch)
        loss.backward()
        optimizer.step()
        grads = {n: p.grad.clone() for n, p in dmp.named_parameters() if p.grad is not None}
        found[f"step {step}"] = plain_names({"loss": loss.detach(), "logits": logits, **grads})
    found["weights"] = plain_names(dmp.state_dict())
    found["fused state"] = plain_names(dmp.fused_optimizer.state_dict()["state"])
    return found


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_open_gates_change_no_bit_of_three_training_steps(
    ranks: ProcessGroup, sharding: str
) -> None:
    case = Case(sharding, bags=True)
    plain = ranks.run(trained_with_open_gates, replace(case, gates=None))
    gated = ranks.run(trained_with_open_gates, case)
    for rank, (expected, computed) in enumerate(zip(plain, gated, strict=True)):
        for key in expected:
            where = f"rank {rank}, {key}"
            assert computed[key].keys() == expected[key].keys(), where
            for name, tensor in expected[key].items():
                assert torch.equal(computed[key][name], tensor), f"{where}, {name}"
    # The comparison must not be vacuous.
    assert plain[0]["fused state"]
    assert not torch.equal(plain[0]["step 0"]["logits"], plain[0]["step 2"]["logits"])


def sequences(model: nn.Module, batch: Any) -> Tensors:
    """Values, lengths and indices by key."""
    collection = get_unwrapped_module(model).get_submodule("ec")
    return {
        f"{key} {part}": tensor
        for key, jagged in collection(batch).items()
        for part, tensor in (
            ("values", jagged.values()),
            ("lengths", jagged.lengths()),
            ("indices", jagged.weights()),
        )
    }


def sampled(case: Case) -> list[tuple[Tensors, Tensors]]:
    """Outputs and the gradient of log_alpha in two training steps, sharded and unsharded."""
    whole = build_model(case)
    dmp = shard(case, copy.deepcopy(whole))
    # On CPU the sharded tables start from new random weights.
    dmp.load_state_dict(whole.state_dict())
    results = []
    for batch in batches(2):
        found = []
        for model in (dmp, whole):
            ((_, gates),) = feature_gates(model)
            gates.log_alpha.grad = None
            loss, logits = model(batch)
            loss.backward()
            assert gates.log_alpha.grad is not None
            found.append({"logits": logits.detach(), "gradient": gates.log_alpha.grad.clone()})
        # DistributedDataParallel has averaged the gradient of the sharded model.
        dist.all_reduce(found[1]["gradient"])
        found[1]["gradient"] /= dist.get_world_size()
        # The fused optimizer has updated only the sharded tables.
        dmp.load_state_dict(whole.state_dict())
        results.append((found[0], found[1]))
    return results


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(("sampling", "centered"), [("batch", False), ("example", True)])
def test_noise_and_gradients_match_the_unsharded_gated_model(
    ranks: ProcessGroup, sharding: str, sampling: Literal["batch", "example"], centered: bool
) -> None:
    # No gate is sampled at exactly 0 or 1, where its gradient is zero.
    smooth = HardConcrete(temperature=10.0)
    config = GateConfig(sampling=sampling, centered=centered, distribution=smooth)
    for results in ranks.run(sampled, Case(sharding, config, bags=True)):
        first, second = results
        assert not torch.equal(first[1]["logits"], second[1]["logits"])
        for found, expected in results:
            assert expected["gradient"].abs().min() > 0
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def evaluated(case: Case) -> tuple[Tensors, Tensors]:
    """Embeddings of one batch by key, of the sharded and the unsharded model."""
    whole = build_model(case).eval()
    ((_, gates),) = feature_gates(whole)
    with torch.no_grad():
        gates.log_alpha.copy_(torch.tensor([-3.0, 0.7, 2.4]))
    dmp = shard(case, copy.deepcopy(whole)).eval()
    dmp.load_state_dict(whole.state_dict())
    (batch,) = batches(1)
    with torch.no_grad():
        sharded, unsharded = sequences(dmp, batch), sequences(whole, batch)
    assert [m.value for m in dmp.modules() if isinstance(m, StepCounter)] == [0]
    return sharded, unsharded


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_evaluation_matches_the_unsharded_gated_model(ranks: ProcessGroup, sharding: str) -> None:
    for sharded, unsharded in ranks.run(evaluated, Case(sharding)):
        assert sharded.keys() == unsharded.keys()
        assert {name.split()[0] for name in unsharded} == set(KEYS)
        for name, tensor in unsharded.items():
            torch.testing.assert_close(sharded[name], tensor, rtol=0, atol=1e-6, msg=name)
        assert [key for key in KEYS if not sharded[f"{key} values"].any()] == ["r"]


def sharing(case: Case) -> dict[str, Any]:
    """Places where a shared gate appears, and its values after training."""
    dmp = shard(case, build_model(case))
    optimizer = optimizers(dmp)
    for batch in batches():
        optimizer.zero_grad()
        dmp(batch)[0].backward()
        optimizer.step()
    bare = get_unwrapped_module(dmp)
    ((fqn, gates),) = feature_gates(dmp)
    assert bare.ec.gates is bare.ebc.gates is gates
    return {
        "fqn": fqn,
        "parameters": [n for n, _ in dmp.named_parameters() if "log_alpha" in n],
        "collections": embedding_features(dmp),
        "features": gates.features,
        "log_alpha": gates.log_alpha.detach().clone(),
        "steps": [m.value for m in dmp.modules() if isinstance(m, StepCounter)],
        "state": {n for n in dmp.state_dict() if "log_alpha" in n},
    }


def test_collections_that_share_a_feature_share_one_parameter_when_sharded(
    ranks: ProcessGroup,
) -> None:
    found = ranks.run(sharing, Case(bags=True))
    for rank in found:
        assert rank["fqn"] == "ec.gates"
        assert rank["parameters"] == ["ec.gates.log_alpha"]
        assert rank["collections"] == {"ec": ("r", "s", "u"), "ebc": ("s", "v")}
        assert rank["features"] == ("r", "s", "u", "v")
        assert torch.equal(rank["log_alpha"], found[0]["log_alpha"])
        assert (rank["log_alpha"] != GateConfig().initial_log_alpha).all()
        assert rank["steps"] == [STEPS, STEPS]
        # PyTorch saves a tensor that two modules share under both names.
        assert rank["state"] == {"ec.gates.log_alpha", "ebc.gates.log_alpha"}


def state_after(case: Case, by_pipeline: bool) -> Tensors:
    dmp = shard(case, build_model(case))
    optimizer = optimizers(dmp)
    if by_pipeline:
        pipeline = TrainPipelineSparseDist(dmp, optimizer, torch.device("cpu"))
        source = batches(5)
        for _ in range(5):
            pipeline.progress(source)
        assert {type(m) for m in pipeline._pipelined_modules} >= {ShardedGatedEmbeddingCollection}
    else:
        for batch in batches(5):
            optimizer.zero_grad()
            dmp(batch)[0].backward()
            optimizer.step()
    return local(dmp.state_dict()) | local({"fused": dmp.fused_optimizer.state_dict()["state"]})


def test_a_pipeline_that_runs_ahead_ends_bit_equal_to_a_plain_loop(ranks: ProcessGroup) -> None:
    case = Case(bags=True)
    for expected, computed in zip(
        ranks.run(state_after, case, False), ranks.run(state_after, case, True), strict=True
    ):
        assert expected.keys() == computed.keys()
        assert expected["ec.step._extra_state"].item() == 5
        for name, tensor in expected.items():
            if not name.endswith("_extra_state"):
                assert torch.equal(computed[name], tensor), name


def resumed(case: Case) -> tuple[Tensors, Tensors]:
    """Gated outputs of the next step, of a trained model and of one that loaded its state."""
    dmp, other = (shard(case, build_model(case)) for _ in range(2))
    for batch in batches():
        dmp(batch)[0].backward()
    other.load_state_dict(dmp.state_dict())
    (batch,) = batches(1)
    with torch.no_grad():
        first, second = (sequences(model, batch) for model in (dmp, other))
    return first, second


def test_noise_continues_from_the_step_of_a_loaded_state_dict(ranks: ProcessGroup) -> None:
    for expected, computed in ranks.run(resumed, Case(bags=True)):
        for name, tensor in expected.items():
            assert torch.equal(computed[name], tensor), name


def shapes_of_blueprint(case: Case, in_backward: bool) -> dict[str, Any]:
    model = build_model(case)
    plain = build_model(replace(case, gates=None))
    weights = [p for n, p in model.named_parameters() if n.endswith("embeddings.t0.weight")]
    if in_backward:
        apply_optimizer_in_backward(RowWiseAdagrad, weights, {"lr": 0.3})
    dmp = shard(case, model)
    taken = blueprint(dmp)
    collection = taken.model.ec
    weight = collection.embeddings["t0"].weight
    return {
        "types": (type(collection), type(taken.model.ebc)),
        "shapes": {name: tensor.shape for name, tensor in taken.model.state_dict().items()},
        "expected": {name: tensor.shape for name, tensor in plain.state_dict().items()},
        "options": (collection.need_indices(), collection.use_gather_select()),
        "optimizer": getattr(weight, "_optimizer_kwargs", None),
        "source": own_parameters(dmp)["ec.embeddings.t0.weight"][0],
        "traces": [
            name for name, m in taken.model.named_modules() if "torchrec_fmp" in type(m).__module__
        ],
    }


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("in_backward", [True, False])
def test_the_blueprint_of_sharded_sequences_is_the_model_as_its_author_wrote_it(
    ranks_2: ProcessGroup, gated: bool, in_backward: bool
) -> None:
    case = Case(gates=GateConfig() if gated else None, bags=True)
    for found in ranks_2.run(shapes_of_blueprint, case, in_backward):
        assert found["types"] == (EmbeddingCollection, EmbeddingBagCollection)
        assert found["shapes"] == found["expected"]
        assert found["shapes"]["ec.embeddings.t0.weight"] == (20, DIM)
        assert found["options"] == (True, False)
        assert found["optimizer"] == ([{"lr": 0.3}] if in_backward else None)
        inner = "._embedding_collection" if gated else ""
        assert found["source"] == f"ec{inner}.embeddings.t0.weight"
        assert found["traces"] == []


def forgetful_blueprint(case: Case) -> str:
    dmp = shard(case, build_model(case), [EmbeddingCollectionSharder()])
    with pytest.raises(TypeError) as error:
        blueprint(dmp)
    return str(error.value)


def test_a_collection_sharded_by_torchrecs_own_sharder_is_refused(ranks_1: ProcessGroup) -> None:
    (message,) = ranks_1.run(forgetful_blueprint, Case("table_wise", gates=None))
    assert message.startswith("ec was sharded by TorchRec's EmbeddingCollectionSharder")
    assert message.endswith("shard with torchrec_fmp.sharders()")


def planned(sharding_type: str) -> dict[str, dict[str, str]]:
    """Sharding type that the planner chooses for each table of a gated model."""
    world_size = dist.get_world_size()
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world_size, compute_device="cpu"),
        constraints={
            table: ParameterConstraints(sharding_types=[sharding_type])
            for table in (*SEQUENCE_TABLES, *BAG_TABLES)
        },
    )
    model = build_model(Case(bags=True))
    plan = planner.collective_plan(model, sharders(), dist.group.WORLD)
    return {
        fqn: {table: sharding.sharding_type for table, sharding in module.items()}
        for fqn, module in plan.plan.items()
    }


@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise", "column_wise"])
def test_the_planner_places_the_tables_of_both_kinds_of_gated_collections(
    ranks_2: ProcessGroup, sharding_type: str
) -> None:
    for plan in ranks_2.run(planned, sharding_type):
        assert plan == {
            "ec": dict.fromkeys(SEQUENCE_TABLES, sharding_type),
            "ebc": dict.fromkeys(BAG_TABLES, sharding_type),
        }


def types_of_a_model_sharded_by_default() -> tuple[type, type]:
    model = build_model(Case())
    before = type(model.ec)
    dmp = DistributedModelParallel(model, sharders=fused_sharders())
    return before, type(get_unwrapped_module(dmp).ec)


def test_sharding_replaces_the_gated_collection_with_its_sharded_counterpart(
    ranks_1: ProcessGroup,
) -> None:
    assert ranks_1.run(types_of_a_model_sharded_by_default) == [
        (GatedEmbeddingCollection, ShardedGatedEmbeddingCollection)
    ]
