"""Models with compiled parts: gates, prune and continued training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import get_unwrapped_module

from tests.support.dlrm_model import (
    DENSE,
    Case,
    FixedPlanner,
    adam,
    batch,
    build,
    kept_dense,
    logits,
    plain_name,
    select,
    shard,
    train,
)
from tests.support.process_group import ProcessGroup
from torchrec_fmp.embeddings.compiled import compiled as compiled_again
from torchrec_fmp.gates.attach import attach_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.pruning.outputs import Forward, call
from torchrec_fmp.pruning.prune import prune
from torchrec_fmp.selection.selection import FeatureDecision, Selection
from torchrec_fmp.surgery.blueprint import blueprint
from torchrec_fmp.surgery.cut import cut

GATES = {"a": 0.0, "c": 0.5, "e": 0.0, "y": 0.0, "z": 0.5}

EBC = "model.sparse_arch.embedding_bag_collection"

Moment = Literal["before the gates", "before sharding", "after sharding"]
_graphs: list[int] = []


def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A backend that records each graph's number of nodes and runs the graph unchanged."""
    _graphs.append(len(graph.graph.nodes))
    return graph.forward


class Outcome(NamedTuple):
    """Result of training, a prune and continued training on one rank.

    Args:
        losses: losses before and after the prune.
        parity: parity in the manifest.
        before: logits of the old model with its gates at the selection's values.
        after: logits of the pruned model.
        wrapped: fqns of the wrapped modules of the pruned model.
        parameters: fqns in the old model, except the gates', and in the pruned model.
        graphs: number of graphs compiled by the end of the steps before and after the prune.
    """

    losses: list[float]
    parity: float | None
    before: Tensor
    after: Tensor
    wrapped: list[str]
    parameters: tuple[list[str], list[str]]
    graphs: tuple[int, int]


Backend = str | Callable[..., Any]


def compile_parts(
    model: nn.Module, places: tuple[str, ...], in_place: bool, backend: Backend = counting
) -> None:
    for place in places:
        parent, _, name = place.rpartition(".")
        module = model.get_submodule(place)
        if in_place:
            module.compile(backend=backend)
        else:
            compiled = torch.compile(module, backend=backend)
            setattr(model.get_submodule(parent), name, compiled)


def wrapped(model: nn.Module) -> list[str]:
    named = get_unwrapped_module(model).named_modules()
    return [fqn for fqn, module in named if isinstance(module, OptimizedModule)]


def parameters(model: nn.Module) -> list[str]:
    names = {plain_name(name) for name, _ in model.named_parameters()}
    return sorted(name for name in names if not name.endswith("log_alpha"))


def eagerly(model: nn.Module, some: Batch) -> Any:
    with torch.compiler.set_stance("force_eager"):
        return model(some)


def run(
    places: tuple[str, ...],
    moment: Moment,
    in_place: bool = False,
    forward: Forward = call,
    steps: tuple[int, int] = (2, 3),
    backend: Backend = counting,
) -> Outcome:
    """Compiles parts of the model at `moment`, then trains, prunes and continues, with `steps`."""
    torch._dynamo.reset()
    _graphs.clear()
    model = build(Case(gated=False))
    if moment == "before the gates":
        compile_parts(model, places, in_place, backend)
    attach_gates(model, GateConfig(), {"model.dense_arch": DENSE})
    if moment == "before sharding":
        compile_parts(model, places, in_place, backend)
    dmp = shard(Case(), model)
    if moment == "after sharding":
        compile_parts(get_unwrapped_module(dmp), places, in_place, backend)
    optimizer = adam(dmp)
    losses = train(dmp, optimizer, range(steps[0]))
    graphs = len(_graphs)
    selection = select(GATES)
    dense = kept_dense(selection)
    new, new_optimizer, manifest = prune(
        dmp,
        optimizer,
        selection,
        planner=FixedPlanner(first_rank=1),
        batch=batch(7),
        forward=forward,
    )
    with torch.compiler.set_stance("default" if forward is call else "force_eager"):
        before, after = logits(dmp, 8, selection, DENSE), logits(new, 8, None, dense)
    if in_place:
        compile_parts(get_unwrapped_module(new), places, in_place, backend)
    losses += train(new, new_optimizer, range(2, 2 + steps[1]), dense)
    names = (parameters(dmp), parameters(new))
    counts = (graphs, len(_graphs))
    return Outcome(losses, manifest.parity_max_abs, before, after, wrapped(new), names, counts)


def check(plain: Outcome, compiled: Outcome) -> None:
    """The backend runs the same as eager mode, so the losses are equal except for rounding."""
    assert plain.graphs == (0, 0)
    assert compiled.graphs[0] > 0 and compiled.graphs[1] > compiled.graphs[0]
    check_pruned(plain, compiled)


def check_pruned(plain: Outcome, compiled: Outcome) -> None:
    assert compiled.losses == pytest.approx(plain.losses, abs=1e-6)
    assert compiled.parity is not None and compiled.parity <= 1e-6
    torch.testing.assert_close(compiled.after, compiled.before, rtol=0, atol=1e-6)
    old, new = compiled.parameters
    # Only the fqns of the dropped tables are missing.
    assert set(new) < set(old)
    assert {name.split(".")[-2] for name in set(old) - set(new)} == {"t_seven", "t_last"}


@pytest.mark.parametrize("moment", ["before the gates", "after sharding"])
def test_wrapped_dense_parts_are_pruned_and_compiled_again(
    ranks: ProcessGroup, moment: Moment
) -> None:
    places = ("model.over_arch", "model.dense_arch")
    for plain, compiled in zip(
        ranks.run(run, (), moment), ranks.run(run, places, moment), strict=True
    ):
        check(plain, compiled)
        assert sorted(compiled.wrapped) == sorted(places)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_parts_compiled_by_inductor_are_pruned_and_compiled_again(ranks_1: ProcessGroup) -> None:
    places = ("model.over_arch",)
    ((plain,), (compiled,)) = (
        ranks_1.run(run, (), "after sharding", False, call, (1, 1)),
        ranks_1.run(run, places, "after sharding", False, call, (1, 1), "inductor"),
    )
    check_pruned(plain, compiled)
    assert compiled.wrapped == [*places]


@pytest.mark.slow
def test_a_wrapped_dlrm_with_its_tables_is_pruned_and_compiled_again(ranks_1: ProcessGroup) -> None:
    ((plain,), (compiled,)) = (
        # Tracing TorchRec's lookups is slow, so each model is traced only once.
        ranks_1.run(run, (), "before sharding", False, eagerly, (1, 1)),
        ranks_1.run(run, ("model",), "before sharding", False, eagerly, (1, 1)),
    )
    check(plain, compiled)
    assert compiled.wrapped == ["model"]


def test_dense_parts_compiled_in_place_are_plain_after_the_prune_and_can_be_compiled_again(
    ranks_1: ProcessGroup,
) -> None:
    places = ("model.over_arch", "model.dense_arch")
    ((plain,), (compiled,)) = (
        ranks_1.run(run, (), "after sharding"),
        ranks_1.run(run, places, "after sharding", True),
    )
    check(plain, compiled)
    assert compiled.wrapped == []


def test_the_blueprint_of_a_module_compiled_in_place_is_plain_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].compile(backend=counting)
    assert blueprint(model).model[0]._compiled_call_impl is None  # type: ignore[index]
    assert "0 was compiled in place" in caplog.text


def test_a_compiled_root_module_is_cut_by_its_own_fqns_and_wrapped_again() -> None:
    model = attach_gates(torch.nn.Sequential(build(Case(gated=False)), nn.Identity()))
    wrapped = torch.compile(model, backend=counting)
    assert isinstance(wrapped, nn.Module)
    taken = blueprint(wrapped)
    made = cut(taken, Selection({"a": FeatureDecision(0.0, 0.0, False, "test")}))
    weight = "0.model.over_arch.model.0._mlp.0._linear.weight"
    assert made.cut_map.tensors[weight].source == weight
    assert made.model.get_parameter(weight).shape == made.cut_map.tensors[weight].shape
    again = compiled_again(made.model, taken.compilers)
    assert isinstance(again, OptimizedModule)
    assert again.get_parameter(f"_orig_mod.{weight}").shape == made.cut_map.tensors[weight].shape


def test_a_compiled_collection_is_refused() -> None:
    model = build(Case(gated=False))
    compile_parts(model, (EBC,), in_place=False)
    with pytest.raises(TypeError, match=f"{EBC} is a collection that torch.compile wraps"):
        attach_gates(model)
