"""Each private name of TorchRec exists and means what the engine assumes."""

from __future__ import annotations

import copy

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.models.dlrm import DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mlp import MLP, Perceptron
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from tests.support.dlrm_model import FEATURES, TABLES, Case, batch, build, shard
from tests.support.process_group import ProcessGroup
from tests.support.sequence_model import SEQUENCE_TABLES, SequenceModel
from tests.support.sequence_model import Case as SequenceCase
from tests.support.sequence_model import shard as shard_sequences
from torchrec_fmp.embeddings import seams
from torchrec_fmp.embeddings.collections import feature_names
from torchrec_fmp.embeddings.local_shards import is_fused, sharded_collections
from torchrec_fmp.gates.sharded import sharders


class Renamed:
    """An object whose private attribute was renamed by an upgrade."""


def test_the_error_for_a_missing_name_names_owner_and_version() -> None:
    with pytest.raises(seams.SeamError, match=r"Renamed has no '_topology' in torchrec 1\."):
        seams.topology_of(Renamed())  # type: ignore[arg-type]


def test_a_missing_name_is_never_set_as_a_new_attribute() -> None:
    optimizer = Renamed()
    with pytest.raises(seams.SeamError, match="has no '_replicate_params'"):
        seams.set_clipped_parameters(optimizer, [])  # type: ignore[arg-type]
    assert not vars(optimizer)


def check_model() -> None:
    model = shard(Case(optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD))
    assert seams.sharding_env(model).process_group is torch.distributed.group.WORLD
    assert isinstance(seams.data_parallel_wrapper(model), DefaultDataParallelWrapper)
    (collection,) = sharded_collections(model).values()
    configs = seams.sharded_table_configs(collection)
    assert [config.name for config in configs] == list(TABLES)
    assert feature_names(configs) == FEATURES
    assert not seams.is_weighted(collection)  # type: ignore[arg-type]
    assert seams.device_of(collection) == torch.device("cpu")
    kernels = list(seams.kernels(collection))
    assert all(is_fused(kernel) for kernel in kernels)
    held = [table.name for kernel in kernels for table in seams.kernel_tables(kernel)]
    assert len(held) == sum(len(kernel.split_embedding_weights()) for kernel in kernels)
    assert set(held) <= set(TABLES)
    for _ in range(2):
        loss, _ = model(batch(1))
        loss.backward()
    for kernel in kernels:
        assert [int(counter) for counter in seams.step_counters(kernel)] == [2, 2]
    kernels[0].emb_module.set_optimizer_step(7)
    assert int(seams.step_counters(kernels[0])[0]) == 7


def test_seams_expose_the_group_tables_kernels_and_steps_of_a_sharded_model(
    ranks: ProcessGroup,
) -> None:
    ranks.run(check_model)


def outputs_in_two_orders(forget: bool) -> bool:
    """Whether a model that has seen one order of keys gives the same output for another."""
    model = shard(Case()).eval()
    first, reordered = batch(3), batch(3)
    features = first.sparse_features
    order = list(reversed(range(len(features.keys()))))
    reordered.sparse_features = features.permute(order)
    with torch.no_grad():
        _, (_, expected, _) = model(first)
        if forget:
            for collection in sharded_collections(model).values():
                seams.forget_input_order(collection)
        _, (_, found, _) = model(reordered)
    return torch.equal(found, expected)


def test_forgetting_the_input_order_lets_a_collection_accept_another_order(
    ranks_1: ProcessGroup,
) -> None:
    assert ranks_1.run(outputs_in_two_orders, True) == [True]
    assert ranks_1.run(outputs_in_two_orders, False) == [False]


def check_sequences() -> None:
    model = SequenceModel(bags=False)
    plain = model.ec
    sharded = sharded_collections(shard_sequences(SequenceCase(gates=None), model))["ec"]
    assert seams.sequence_options(sharded) == seams.sequence_options(plain)
    assert seams.sequence_options(plain)["need_indices"] is plain.need_indices()
    names = [config.name for config in seams.sharded_table_configs(sharded)]
    assert names == list(SEQUENCE_TABLES)


def test_seams_expose_the_options_and_tables_of_a_sequence_collection(
    ranks_1: ProcessGroup,
) -> None:
    ranks_1.run(check_sequences)


def sequences(**options: bool) -> EmbeddingCollection:
    tables = [
        EmbeddingConfig(name="t", embedding_dim=4, num_embeddings=3, feature_names=["f"]),
    ]
    return EmbeddingCollection(tables=tables, **options)


@pytest.mark.parametrize("option", ["need_indices", "use_gather_select"])
@pytest.mark.parametrize("value", [True, False])
def test_the_options_of_a_sequence_collection_recreate_it(option: str, value: bool) -> None:
    options = seams.sequence_options(sequences(**{option: value}))
    assert options[option] is value
    assert seams.sequence_options(sequences(**options)) == options


def planner(**options: object) -> EmbeddingShardingPlanner:
    return EmbeddingShardingPlanner(
        topology=Topology(world_size=2, compute_device="cpu"), batch_size=64, debug=False, **options
    )


def model_of(*tables: str) -> nn.Module:
    configs = [
        EmbeddingBagConfig(
            name=name, embedding_dim=8, num_embeddings=10, feature_names=[f"f_{name}"]
        )
        for name in tables
    ]
    collection = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
    return nn.ModuleDict({"bags": collection})


def test_seams_expose_the_arguments_of_a_planner() -> None:
    constraints = {"a": ParameterConstraints(sharding_types=["row_wise"])}
    made = planner(constraints=constraints)
    assert seams.topology_of(made).world_size == 2
    assert seams.batch_size_of(made) == 64
    assert seams.constraints_of(made) is constraints
    estimators = seams.estimators_of(made)
    assert estimators is not None and len(estimators) == 2


def test_a_copied_planner_plans_by_its_own_constraints_and_keeps_no_model() -> None:
    constraints = {name: ParameterConstraints(sharding_types=["row_wise"]) for name in ("a", "b")}
    made = planner(constraints=constraints)
    old = model_of("a", "b")
    made.plan(old, list(sharders()))

    def table_wise(_: object) -> dict[str, ParameterConstraints]:
        return {"b": ParameterConstraints(sharding_types=["table_wise"])}

    other = seams.planner_copy(made, table_wise)
    plan = other.plan(model_of("b"), list(sharders())).plan["bags"]
    assert {name: it.sharding_type for name, it in plan.items()} == {"b": "table_wise"}  # type: ignore[attr-defined]
    again = made.plan(old, list(sharders())).plan["bags"]
    assert {it.sharding_type for it in again.values()} == {"row_wise"}  # type: ignore[attr-defined]


def test_the_priced_tensor_of_an_option_is_the_one_that_estimators_see() -> None:
    made = planner()
    model = model_of("a")
    (option, *_) = made._enumerator.enumerate(model, list(sharders()))
    priced = torch.empty(3, 5, device="meta")
    seams.set_priced_tensor(option, priced)
    assert option.tensor is priced


def keyed(parameter: nn.Parameter) -> KeyedOptimizerWrapper:
    return KeyedOptimizerWrapper({"p": parameter}, lambda params: torch.optim.SGD(params, lr=0.5))


def test_wrapped_and_combined_optimizers_are_found_and_replaced() -> None:
    first, second = keyed(nn.Parameter(torch.ones(2))), keyed(nn.Parameter(torch.ones(3)))
    assert isinstance(seams.wrapped_optimizer(first), torch.optim.SGD)
    warm = WarmupOptimizer(first, [WarmupStage(WarmupPolicy.LINEAR, max_iters=2)])
    assert seams.wrapped_optimizer(warm) is first
    warm.step()
    assert "warmup" in warm.state[seams.warmup_parameter(warm)]
    seams.set_wrapped_optimizer(warm, second)
    assert seams.wrapped_optimizer(warm) is second
    combined = CombinedOptimizer([("x", first)])
    seams.set_combined_optimizers(combined, [("y", second)])
    assert combined.optimizers == [("y", second)]


def test_only_the_parameters_that_were_set_are_clipped() -> None:
    parameter, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = GradientClippingOptimizer(
        keyed(parameter), GradientClipping.VALUE, max_gradient=1.0
    )
    assert not seams.clips_sharded_parameters(optimizer)
    seams.set_clipped_parameters(optimizer, [other])
    for held in (parameter, other):
        held.grad = torch.full((2,), 5.0)
    optimizer.step()
    assert other.grad is not None and parameter.grad is not None
    assert other.grad.tolist() == [1.0, 1.0] and parameter.grad.tolist() == [5.0, 5.0]


def test_optimizers_in_the_backward_pass_are_found_added_and_copied() -> None:
    parameter, fresh = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert seams.backward_classes(parameter) == seams.backward_optimizers(parameter) == []
    settings = {"lr": 0.25}
    added = seams.add_backward_optimizer(parameter, torch.optim.SGD, settings)
    assert seams.backward_classes(parameter) == [torch.optim.SGD]
    assert seams.backward_optimizers(parameter) == [(added, settings)]
    parameter.sum().backward()
    assert parameter.tolist() == [0.75, 0.75] and parameter.grad is None
    assert seams.backward_classes(copy.deepcopy(parameter)) == []
    seams.copy_fused_optimizer(parameter, fresh)
    assert seams.backward_classes(fresh) == [torch.optim.SGD]
    seams.set_fused_optimizer(fresh, torch.optim.Adam)
    assert seams.backward_classes(fresh) == [torch.optim.Adam]


def test_the_linear_layers_of_an_mlp_are_at_the_expected_fqns() -> None:
    mlp = MLP(3, [4, 5])
    perceptron = mlp.get_submodule(f"{seams.MLP_LAYERS}.0")
    assert isinstance(perceptron, Perceptron)
    assert isinstance(perceptron.get_submodule(seams.PERCEPTRON_LINEAR), nn.Linear)


def test_the_tests_use_torchrecs_own_model() -> None:
    assert type(build(Case(gated=False))) is DLRMTrain
