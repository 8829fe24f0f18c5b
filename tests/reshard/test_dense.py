"""Dense parameters and optimizer states, without a process group."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.optim import LBFGS, SGD, Adafactor, Adam, Muon, Optimizer, SparseAdam, lr_scheduler
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_fmp.embeddings.fqns import own_tensors
from torchrec_fmp.embeddings.wrappers import Wrapper
from torchrec_fmp.reshard.dense import fill_dense
from torchrec_fmp.reshard.dense_optimizer import carry_optimizer, check_optimizer
from torchrec_fmp.surgery.cut_map import CutMap, TensorCut

COLUMNS = torch.tensor([0, 2])
CUT_MAP = CutMap(
    {
        "layer.weight": TensorCut(
            "layer.weight", torch.Size([2, 3]), COLUMNS, torch.tensor([1.0, 0.5])
        ),
        "layer.bias": TensorCut("layer.bias", torch.Size([2])),
        "seen": TensorCut("seen", torch.Size([])),
    }
)


class Model(nn.Module):
    """Stands in for a sharded model: named parameters, and no tables."""

    def __init__(self, inputs: int, device: str = "cpu") -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, 2, device=device)
        self.register_buffer("seen", torch.tensor(0))
        self.fused_optimizer = object()


class Gated(Wrapper):
    """The old model, with a gate."""

    inner = "gated"

    def __init__(self) -> None:
        super().__init__()
        self.gated = Model(3)
        self.gated.seen = torch.tensor(5)
        self.log_alpha = nn.Parameter(torch.ones(3))
        self.fused_optimizer = object()


def test_parameters_and_buffers_are_filled_and_tables_left_alone() -> None:
    old, new = Gated(), Model(2, "meta")
    old.gated.layer.bias.requires_grad_(False)
    new.layer.bias.requires_grad_(False)
    new.register_parameter("table", nn.Parameter(torch.empty(2, 2, device="meta")))
    table = TensorCut("table", torch.Size([2, 2]))
    cut_map = CutMap({**CUT_MAP.tensors, "table": table})
    fill_dense(new, dict(own_tensors(old)), cut_map)
    weight = old.gated.layer.weight
    assert torch.equal(new.layer.weight, weight[:, COLUMNS] * torch.tensor([1.0, 0.5]))
    assert new.layer.weight.requires_grad and new.layer.weight.is_leaf
    assert torch.equal(new.layer.bias, old.gated.layer.bias)
    assert not new.layer.bias.requires_grad
    assert new.seen == 5
    assert new.get_parameter("table").is_meta
    new.layer.bias.data.zero_()
    assert old.gated.layer.bias.any(), "the two models share memory"


def stepped(old: Gated, optimizer_class: type[Optimizer] = Adam, **settings: Any) -> Optimizer:
    optimizer = optimizer_class(old.parameters(), **settings)
    for parameter in old.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    return optimizer


def test_the_optimizer_keeps_the_old_parameters_until_the_commit() -> None:
    old, new = Gated(), Model(2)
    optimizer = stepped(old)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    states = dict(optimizer.state)
    commit = carry_optimizer(optimizer, old, new, CUT_MAP)  # type: ignore[arg-type]
    assert [group["params"] for group in optimizer.param_groups] == groups
    assert dict(optimizer.state) == states
    assert commit() is optimizer
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in new.parameters()]
    assert {id(p) for p in optimizer.state} == {id(p) for p in new.parameters()}


def test_states_are_cut_and_not_scaled() -> None:
    old, new = Gated(), Model(2)
    optimizer = stepped(old)
    before = optimizer.state[old.gated.layer.weight]
    carry_optimizer(optimizer, old, new, CUT_MAP)()  # type: ignore[arg-type]
    after = optimizer.state[new.layer.weight]
    assert torch.equal(after["exp_avg"], before["exp_avg"][:, COLUMNS])
    assert after["step"] == 1
    assert after["step"] is not before["step"]


def test_an_optimizer_that_has_not_stepped_stays_without_state() -> None:
    old, new = Gated(), Model(2)
    optimizer = SGD(old.parameters(), lr=0.5)
    carry_optimizer(optimizer, old, new, CUT_MAP)()  # type: ignore[arg-type]
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_state_of_another_shape_is_refused() -> None:
    old, new = Gated(), Model(2)
    optimizer = stepped(old)
    optimizer.state[old.gated.layer.weight]["factor"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"state 'factor' of layer\.weight has .* \(2,\)"):
        carry_optimizer(optimizer, old, new, CUT_MAP)  # type: ignore[arg-type]


def test_a_foreign_parameter_is_refused() -> None:
    old, new = Gated(), Model(2)
    optimizer = SGD([*old.parameters(), nn.Parameter(torch.ones(4, 5))], lr=0.1)
    with pytest.raises(ValueError, match=r"parameter of shape \(4, 5\) that the model does not"):
        carry_optimizer(optimizer, old, new, CUT_MAP)  # type: ignore[arg-type]


def test_the_fused_optimizer_is_replaced_by_the_new_models() -> None:
    old, new = Gated(), Model(2)
    commit = carry_optimizer(old.fused_optimizer, old, new, CUT_MAP)  # type: ignore[arg-type]
    assert commit() is new.fused_optimizer


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False, device=device)
        self.b = nn.Linear(3, 3, bias=False, device=device)
        self.b.weight = self.a.weight


def fill_tied(columns_of_b: torch.Tensor | None, columns_of_a: torch.Tensor | None = None) -> Tied:
    old, new = Tied(), Tied("meta")
    shape = torch.Size([3, 3])
    cuts = {
        "a.weight": TensorCut("a.weight", shape, columns_of_a),
        "b.weight": TensorCut("b.weight", shape, columns_of_b),
    }
    tensors = dict(old.named_parameters(remove_duplicate=False))
    fill_dense(new, tensors, CutMap(cuts))
    return new


def test_layers_that_share_a_parameter_still_share_it() -> None:
    new = fill_tied(None)
    assert new.a.weight is new.b.weight and not new.a.weight.is_meta


def test_cutting_a_shared_parameter_for_one_layer_only_is_refused() -> None:
    with pytest.raises(ValueError, match="a.weight and b.weight share a parameter"):
        fill_tied(COLUMNS)


def test_cutting_a_shared_parameter_differently_to_the_same_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="a.weight and b.weight share a parameter"):
        fill_tied(COLUMNS, torch.tensor([1, 2]))


REFUSED = (Adafactor, LBFGS)
OPTIMIZERS = [
    value
    for value in vars(torch.optim).values()
    if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
]
# In addition to each optimizer with its default settings.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "foreach": True},
        {"momentum": 0.9, "fused": True},
    ],
    "Adam": [{"amsgrad": True}, {"foreach": True}, {"fused": True}, {"lr": torch.tensor(0.01)}],
    "AdamW": [{"amsgrad": True, "fused": True}],
    "Adagrad": [{"initial_accumulator_value": 0.1, "lr_decay": 0.1}, {"fused": True}],
    "RMSprop": [{"centered": True, "momentum": 0.9}],
    "NAdam": [{"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "ASGD": [{"t0": 2.0}],
}
CASES = [
    pytest.param(kind, settings, id=f"{kind.__name__} {' '.join(settings)}".strip())
    for kind in OPTIMIZERS
    if kind not in REFUSED
    for settings in [{}, *VARIANTS.get(kind.__name__, [])]
]


def trained_by(kind: type[Optimizer], model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 2 or kind is not Muon]


def step(model: nn.Module, optimizer: Optimizer, seed: int, columns: Tensor | None = None) -> None:
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    inputs = inputs if columns is None else inputs[:, columns]
    layer = getattr(model, "gated", model).layer
    optimizer.zero_grad()
    loss = layer(inputs).square().sum()
    if hasattr(model, "log_alpha"):
        loss = loss + model.log_alpha.square().sum()
    loss.backward()
    if isinstance(optimizer, SparseAdam):
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad = parameter.grad.to_sparse()
    optimizer.step()


def successor(old: Gated) -> Model:
    new = Model(2)
    fill_dense(new, dict(own_tensors(old)), CUT_MAP)
    return new


def sliced(optimizer: Optimizer, old: Gated, kept: list[str]) -> dict[str, Any]:
    """The state dict of an optimizer of the kept parameters, cut by hand."""
    content = copy.deepcopy(optimizer.state_dict())
    names = {id(parameter): name for name, parameter in old.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    (group,) = content["param_groups"]
    state = {}
    for index, name in enumerate(kept):
        of_old = content["state"].get(order.index(f"gated.{name}"), {})
        state[index] = {
            key: value[:, COLUMNS] if torch.is_tensor(value) and value.dim() == 2 else value
            for key, value in of_old.items()
        }
    return {"state": state, "param_groups": [{**group, "params": list(range(len(kept)))}]}


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_every_optimizer_continues_like_one_that_was_given_the_cut_state(
    kind: type[Optimizer], settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    old = Gated()
    optimizer = kind(trained_by(kind, old), **settings)
    for seed in range(3):
        step(old, optimizer, seed)
    new = successor(old)
    other = copy.deepcopy(new)
    other_optimizer = kind(trained_by(kind, other), **settings)
    kept = [name for name, p in other.named_parameters() if p.dim() == 2 or kind is not Muon]
    other_optimizer.load_state_dict(sliced(optimizer, old, kept))
    carry_optimizer(optimizer, old, new, CUT_MAP)()  # type: ignore[arg-type]
    for seed in range(3, 8):
        step(new, optimizer, seed, COLUMNS)
        step(other, other_optimizer, seed, COLUMNS)
    for (name, parameter), reference in zip(
        new.named_parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(parameter, reference), name
        state, expected = optimizer.state[parameter], other_optimizer.state[reference]
        assert state.keys() == expected.keys()
        for key, value in state.items():
            assert type(value) is type(expected[key]), key
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected[key])), key


def test_an_optimizer_that_factors_its_state_is_refused_before_anything_is_built() -> None:
    old = Gated()
    optimizer = stepped(old, Adafactor)
    with pytest.raises(ValueError, match=r"state 'row_var' of layer\.weight has .* \(2, 1\), not"):
        check_optimizer(optimizer, old, CUT_MAP)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Adafactor, RowWiseAdagrad])
def test_a_parameter_that_is_not_cut_keeps_a_state_of_any_shape(kind: type[Optimizer]) -> None:
    old, new = Gated(), Model(3)
    whole = {"layer.weight": TensorCut("layer.weight", torch.Size([2, 3]))}
    optimizer = kind([old.gated.layer.weight], lr=0.1)
    old.gated.layer.weight.grad = torch.rand(2, 3)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[old.gated.layer.weight])
    carry_optimizer(optimizer, old, new, CutMap(whole))()  # type: ignore[arg-type]
    after = optimizer.state[new.layer.weight]
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_an_optimizer_with_its_own_list_of_parameters_is_refused() -> None:
    old = Gated()
    optimizer = LBFGS(old.parameters())
    with pytest.raises(TypeError, match="LBFGS keeps parameters in its attribute _params"):
        check_optimizer(optimizer, old, CUT_MAP)  # type: ignore[arg-type]


def one_cycle(optimizer: Optimizer) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.3], total_steps=9)


def by_step(optimizer: Optimizer) -> Any:
    return lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def by_function(optimizer: Optimizer) -> Any:
    return lr_scheduler.LambdaLR(optimizer, [lambda n: 1 / (n + 1), lambda n: 0.9**n])


def on_plateau(optimizer: Optimizer) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)


def scheduled(schedule: Callable[[Optimizer], Any], carries: bool) -> list[Any]:
    """Settings of two groups under a scheduler in eight steps; after three, a gate is cut."""
    torch.manual_seed(0)
    old = Gated()
    model: nn.Module = old
    layer = old.gated.layer
    optimizer = Adam(
        [
            {"params": [layer.weight, old.log_alpha], "weight_decay": 0.1},
            {"params": [layer.bias], "lr": 0.2},
        ],
        lr=0.05,
    )
    scheduler, found = schedule(optimizer), []
    for seed in range(8):
        if seed == 3 and carries:
            model = successor(old)
            carry_optimizer(optimizer, old, model, CUT_MAP)()  # type: ignore[arg-type]
        step(model, optimizer, seed, COLUMNS if model is not old else None)
        scheduler.step(*([1.0] if schedule is on_plateau else []))
        found.append([(g["lr"], g["betas"], g["weight_decay"]) for g in optimizer.param_groups])
    return found


@pytest.mark.parametrize("schedule", [by_step, by_function, one_cycle, on_plateau])
def test_schedulers_and_param_groups_continue_as_if_nothing_had_been_cut(
    schedule: Callable[[Optimizer], Any],
) -> None:
    rates = scheduled(schedule, True)
    assert rates == scheduled(schedule, False)
    assert rates[3] != rates[7]


def test_a_keyed_optimizer_keeps_custom_keys_and_renames_fqns() -> None:
    old, new = Gated(), Model(2)
    named = dict(old.named_parameters())
    mine = {
        "the weight": named["gated.layer.weight"],
        "model.gated.layer.bias": named["gated.layer.bias"],
        "log_alpha": named["log_alpha"],
    }
    optimizer = KeyedOptimizerWrapper(mine, lambda parameters: Adam(parameters))
    optimizer.init_state()
    carry_optimizer(optimizer, old, new, CUT_MAP)()  # type: ignore[arg-type]
    assert {name: id(p) for name, p in optimizer.params.items()} == {
        "the weight": id(new.layer.weight),
        "model.layer.bias": id(new.layer.bias),
    }
    assert optimizer.state_dict()["state"].keys() == {"the weight", "model.layer.bias"}


def test_an_in_backward_optimizer_of_a_dense_layer_is_carried_with_its_cut_state() -> None:
    torch.manual_seed(0)
    old = Gated()
    layer = old.gated.layer
    _apply_optimizer_in_backward(Adam, layer.parameters(), {"lr": 0.1})
    for in_backward in layer.weight._in_backward_optimizers:
        in_backward.param_groups[0]["lr"] = 0.02
    nothing = SGD([old.log_alpha], lr=0.1)
    for seed in range(3):
        step(old, nothing, seed)
    new = successor(old)
    other = Model(2)
    other.load_state_dict(new.state_dict())
    reference = Adam(
        [{"params": [other.layer.weight], "lr": 0.02}, {"params": [other.layer.bias]}], lr=0.1
    )
    for mine, parameter in ((layer.weight, other.layer.weight), (layer.bias, other.layer.bias)):
        (in_backward,) = mine._in_backward_optimizers
        reference.state[parameter] = {
            name: value[:, COLUMNS].clone() if value.dim() == 2 else value.clone()
            for name, value in in_backward.state[mine].items()
        }
    none = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    for seed in range(3, 8):
        step(new, none, seed, COLUMNS)
        step(other, reference, seed, COLUMNS)
    assert new.layer.weight.grad is None
    assert torch.equal(new.layer.weight, other.layer.weight)
    assert torch.equal(new.layer.bias, other.layer.bias)
