"""A prune that gives the smaller model new gates, and the prunes that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.optim.keyed import KeyedOptimizerWrapper

from tests.support.dlrm_model import (
    DENSE,
    DIM,
    FEATURES,
    Case,
    FixedPlanner,
    Piece,
    Tensors,
    adam,
    assemble,
    batch,
    build,
    dense_parameters,
    dense_state,
    kept_dense,
    logits,
    pieces,
    select,
    shard,
    train,
    trained,
)
from tests.support.process_group import ProcessGroup
from tests.support.runs import Run, assert_equal_runs
from torchrec_fmp.embeddings.local_shards import local_shards, sharded_collections
from torchrec_fmp.gates.attach import feature_gates, gate_optimizer
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.step_counter import StepCounter
from torchrec_fmp.pruning.prune import Pruned, prune
from torchrec_fmp.selection.selection import Selection

# Gates that each prune closes: of tables, of a feature of a shared table, and of dense columns. All
# other gates are 1 and scale nothing, so that the kept tensors stay bit-equal.
FIRST = {"a": 0.0, "x": 0.0}
SECOND = {"c": 0.0, "e": 0.0, "z": 0.0}
CASES = [
    Case(),
    Case("column_wise", optimizer=EmbOptimType.EXACT_ADAGRAD),
    Case("mixed_and_replicated"),
    Case("table_wise", kernel="dense"),
]


def left(gates: Mapping[str, float], gone: Sequence[str] = ()) -> Selection:
    decisions = select(gates).features
    return Selection({name: it for name, it in decisions.items() if name not in gone})


def pruned(
    dmp: DistributedModelParallel,
    optimizer: Optimizer,
    selection: Selection,
    case: Case,
    gates: GateConfig | None,
) -> Pruned:
    names = [name for _, module in feature_gates(dmp) for name in module.features]
    return prune(
        dmp,
        optimizer,
        selection,
        # Each table stays on the rank that holds it, so that ranks can compare what they have.
        planner=FixedPlanner(case.sharding, kernel=case.kernel),
        batch=batch(7, [name for name in DENSE if name in names]),
        gates=gates,
    )


def sampled_steps(
    dmp: DistributedModelParallel, optimizer: Optimizer, steps: Sequence[int], dense: Sequence[str]
) -> None:
    """Trains with sampled gates, which learn too."""
    of_gates = gate_optimizer(dmp, 0.1)
    for _, module in feature_gates(dmp):
        module.set_open(False)
    for step in steps:
        train(dmp, optimizer, [step], dense)
        of_gates.step()
        of_gates.zero_grad()


def first_columns(layer: str, features: Sequence[str], dense: Sequence[str]) -> list[object]:
    """Names of the inputs of a first layer's columns; empty for other layers."""
    if layer.startswith("model.dense_arch.model._mlp.0._linear.weight"):
        return list(dense)
    if layer.startswith("model.over_arch.model.0._mlp.0._linear.weight"):
        return [*range(DIM), *combinations(["dense", *features], 2)]
    return []


def check_carried(before: Tensors, after: Tensors, kept: Sequence[str], had: Sequence[str]) -> None:
    """Dense parameters and their states are unchanged, without the dropped columns."""
    assert after.keys() <= before.keys()
    for name, tensor in after.items():
        sources = first_columns(name, *split(had))
        expected = before[name]
        if sources and tensor.dim() > 0:
            places = [sources.index(column) for column in first_columns(name, *split(kept))]
            expected = expected[:, places]
        assert torch.equal(tensor, expected), name


def split(names: Sequence[str]) -> tuple[list[str], list[str]]:
    return [n for n in FEATURES if n in names], [n for n in DENSE if n in names]


def fused_steps(dmp: DistributedModelParallel) -> dict[str, int]:
    """Table -> step counter of its optimizer."""
    return {
        shard.table: int(shard.kernel.emb_module.iter.item())
        for collection in sharded_collections(dmp).values()
        for shard in local_shards(collection)
        if shard.is_fused
    }


def noise_steps(dmp: DistributedModelParallel) -> list[int]:
    return [module.value for module in dmp.modules() if isinstance(module, StepCounter)]


Pieces = list[tuple[str, Piece]]


def twice(case: Case) -> tuple[list[tuple[Pieces, Pieces]], list[float | None]]:
    """Pieces before and after each of two prunes, and their parities; checks the rest itself."""
    dmp, optimizer = trained(case)
    had = [*FEATURES, *DENSE]
    seen, parities = [], []
    for gates, config in [(FIRST, GateConfig()), (SECOND, None)]:
        gone = [name for name in (*FEATURES, *DENSE) if name not in had]
        selection = left(gates, gone)
        before = dense_state(dmp, optimizer), pieces(dmp), fused_steps(dmp), noise_steps(dmp)
        dmp, optimizer, manifest = pruned(dmp, optimizer, selection, case, config)
        check_carried(before[0], dense_state(dmp, optimizer), selection.kept, had)
        steps = fused_steps(dmp)
        assert steps.items() <= before[2].items()
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        of_gates = {module.log_alpha for _, module in feature_gates(dmp)}
        assert held == set(dense_parameters(dmp).values()) - of_gates
        seen.append((before[1], pieces(dmp)))
        parities.append(manifest.parity_max_abs)
        had = selection.kept
        dense = kept_dense(select(dict.fromkeys({*FEATURES, *DENSE} - set(had), 0.0)))
        if config is None:
            assert not any(feature_gates(dmp)) and not noise_steps(dmp)
            train(dmp, optimizer, range(6, 8), dense)
        else:
            assert noise_steps(dmp) == before[3] == [3, 3]
            assert {n for _, m in feature_gates(dmp) for n in m.features} == set(had)
            sampled_steps(dmp, optimizer, range(3, 6), dense)
    return seen, parities


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.sharding}-{case.kernel}")
def test_weights_optimizer_states_and_steps_survive_two_prunes_unchanged(
    ranks: ProcessGroup, case: Case
) -> None:
    outcomes = ranks.run(twice, case)
    for number in range(2):
        before = assemble(piece for outcome in outcomes for piece in [outcome[0][number][0]])
        after = assemble(piece for outcome in outcomes for piece in [outcome[0][number][1]])
        assert after.keys() < before.keys()
        for table, tensors in after.items():
            assert tensors.keys() == before[table].keys()
            for name, tensor in tensors.items():
                assert torch.equal(tensor, before[table][name]), f"{table}/{name}"
    for _, parities in outcomes:
        assert all(parity is not None and parity <= 1e-6 for parity in parities)


def after_one_prune(case: Case, planner: FixedPlanner, gated: bool) -> Run:
    """Three steps after a prune, with new, open gates or without gates."""
    dmp = shard(case)
    parameters = dense_parameters(dmp).values()
    optimizer = torch.optim.Adagrad(parameters, lr=0.1)
    train(dmp, optimizer, range(3))
    selection = select({**FIRST, "d": 0.5, "y": 0.7})
    config = GateConfig(initial_log_alpha=0.0) if gated else None
    torch.manual_seed(5)
    dmp, optimizer, _ = prune(
        dmp, optimizer, selection, planner=planner, batch=batch(7), gates=config
    )
    assert any(feature_gates(dmp)) == gated
    losses = train(dmp, optimizer, range(3, 6), kept_dense(selection))
    return losses, pieces(dmp), dense_state(dmp, optimizer), torch.get_rng_state()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mixed", FixedPlanner("table_wise", 1)),
        ("mixed", FixedPlanner("mixed_and_replicated")),
        ("mixed_and_replicated", FixedPlanner("row_wise")),
        ("row_wise", FixedPlanner("row_wise", kernel="dense")),
    ],
    ids=["fused", "to data-parallel", "from data-parallel", "to the dense kernel"],
)
def test_training_with_new_open_gates_equals_training_without_gates(
    ranks: ProcessGroup, old: str, new: FixedPlanner
) -> None:
    # The states of both optimizers have the same names, so tables can move between them.
    case = Case(old, optimizer=EmbOptimType.EXACT_ADAGRAD)
    with_gates = ranks.run(after_one_prune, case, new, True)
    assert_equal_runs(with_gates, ranks.run(after_one_prune, case, new, False))


def keyed() -> None:
    dmp = shard(Case())
    named = {name: p for name, p in dense_parameters(dmp).items() if "log_alpha" not in name}
    optimizer = KeyedOptimizerWrapper(named, lambda parameters: torch.optim.Adam(parameters))
    train(dmp, optimizer, range(2))
    dmp, optimizer, _ = pruned(dmp, optimizer, select(FIRST), Case(), GateConfig())
    expected = {name: p for name, p in dense_parameters(dmp).items() if "log_alpha" not in name}
    assert any("._module." in name for name in expected)
    assert optimizer.params.keys() == expected.keys()
    assert all(optimizer.params[name] is parameter for name, parameter in expected.items())


def test_keyed_optimizers_use_the_new_fqns_with_gates(ranks: ProcessGroup) -> None:
    ranks.run(keyed)


def without_dense_columns() -> list[float]:
    dmp, optimizer = trained(Case())
    first = dict.fromkeys(DENSE, 0.0)
    dmp, optimizer, manifest = pruned(dmp, optimizer, select(first), Case(), GateConfig())
    assert manifest.dense_columns == {"model.dense_arch": ()}
    sampled_steps(dmp, optimizer, range(3, 5), ())
    dmp, optimizer, manifest = pruned(dmp, optimizer, left({"b": 0.0}, DENSE), Case(), None)
    assert manifest.dense_columns == {"model.dense_arch": ()}
    return train(dmp, optimizer, range(5, 7), ())


def test_a_model_that_has_lost_all_dense_columns_is_pruned_again(ranks: ProcessGroup) -> None:
    for losses in ranks.run(without_dense_columns):
        assert torch.tensor(losses).isfinite().all()


def modes() -> dict[str, bool]:
    dmp, optimizer = trained(Case())
    get_unwrapped_module(dmp).get_submodule("model.dense_arch._module").eval()
    dmp, *_ = pruned(dmp, optimizer, select(FIRST), Case(), GateConfig())
    names = ("model.dense_arch._module", "model.dense_arch.gates", "model.over_arch")
    return {name: get_unwrapped_module(dmp).get_submodule(name).training for name in names}


def test_modules_behind_new_gates_keep_their_train_or_eval_mode(
    ranks_1: ProcessGroup,
) -> None:
    (found,) = ranks_1.run(modes)
    assert found == {
        "model.dense_arch._module": False,
        "model.dense_arch.gates": True,
        "model.over_arch": True,
    }


def compiled_layers() -> tuple[float, float]:
    """Change of the logits by closing a new gate, and difference from dropping its column."""
    dmp, optimizer = trained(Case())
    model = get_unwrapped_module(dmp).model
    model.dense_arch = torch.compile(model.dense_arch, backend="eager")
    dmp, optimizer, _ = pruned(dmp, optimizer, select(FIRST), Case(), GateConfig())
    sampled_steps(dmp, optimizer, range(3, 5), ("y", "z"))
    opened, closed = left({}, ("a", "x")), left({"z": 0.0}, ("a", "x"))
    expected = logits(dmp, 8, closed, ("y", "z"))
    changed = (expected - logits(dmp, 8, opened, ("y", "z"))).abs().max().item()
    dmp, *_ = pruned(dmp, optimizer, closed, Case(), None)
    return changed, (expected - logits(dmp, 8, None, ("y",))).abs().max().item()


def test_new_gates_are_inside_the_module_that_torch_compile_wraps(ranks_1: ProcessGroup) -> None:
    ((changed, difference),) = ranks_1.run(compiled_layers)
    assert changed > 1e-3
    assert difference <= 1e-6


def refused() -> tuple[str, bool]:
    """The error, and whether the old model computes the same afterwards."""
    case = Case("table_wise", gated=False)
    model = build(case)
    some = [EmbeddingBagCollectionSharder({"optimizer": EmbOptimType.EXACT_ADAGRAD})]
    plan = FixedPlanner("table_wise").plan(model, some)
    dmp = DistributedModelParallel(model, plan=plan, sharders=some)
    optimizer = adam(dmp)
    before = logits(dmp, 8, None, DENSE)
    selection = Selection({"a": select(FIRST).features["a"]})
    with pytest.raises(ValueError) as error:
        prune(dmp, optimizer, selection, planner=FixedPlanner("table_wise"), gates=GateConfig())
    return str(error.value), torch.equal(before, logits(dmp, 8, None, DENSE))


def test_gates_that_the_models_sharders_cannot_shard_are_refused(ranks_1: ProcessGroup) -> None:
    ((message, unchanged),) = ranks_1.run(refused)
    assert "shard it with torchrec_fmp.sharders()" in message
    assert unchanged


def different_gates() -> str:
    dmp, optimizer = trained(Case())
    config = GateConfig(seed=torch.distributed.get_rank())
    with pytest.raises(RuntimeError) as error:
        pruned(dmp, optimizer, select(FIRST), Case(), config)
    return str(error.value)


def test_gates_that_differ_between_ranks_are_refused_on_all(ranks_2: ProcessGroup) -> None:
    for message in ranks_2.run(different_gates):
        assert "an argument" in message


def drawn_noise() -> tuple[list[Tensor], list[Tensor]]:
    """Gate values of two training steps, and of two more after a prune that drops nothing."""
    dmp, optimizer = trained(Case(), steps=0)
    drawn: tuple[list[Tensor], list[Tensor]] = ([], [])
    for phase in drawn:

        def note(gates: nn.Module, _: object, values: Tensor, phase: list[Tensor] = phase) -> None:
            if gates.training:
                phase.append(values.detach())

        for _, module in feature_gates(dmp):
            module.set_open(False)
            module.register_forward_hook(note)
        train(dmp, optimizer, range(2))
        if phase is drawn[0]:
            dmp, optimizer, _ = pruned(dmp, optimizer, select({}), Case(), GateConfig())
    return drawn


def test_new_gates_do_not_repeat_the_noise_of_the_old_ones(ranks_1: ProcessGroup) -> None:
    ((first, second),) = ranks_1.run(drawn_noise)
    assert len(first) == len(second) == 4
    assert not any(torch.equal(a, b) for a in first for b in second if a.shape == b.shape)
