"""The training loop and the gates' schedule in it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_fmp.distributed.ranks import Ranks
from torchrec_fmp.gates.feature_gates import FeatureGates, GateConfig
from torchrec_fmp.gates.penalty import Penalty, PenaltyTerm
from torchrec_fmp.gates.schedule import GateSchedule
from torchrec_fmp.loggers.jsonl import MetricsLog
from torchrec_fmp.training.train import TrainingDiverged, train

ROWS = 4
NO_LOG = MetricsLog(None, interval=1)


class Recorded(Penalty, PenaltyTerm):
    """Records the strengths, and pulls every log_alpha down by 1."""

    def __init__(self) -> None:
        self.strengths: list[float] = []

    def start(self) -> PenaltyTerm:
        return self

    def __call__(self, gates: Sequence[FeatureGates], strength: float) -> Tensor:
        self.strengths.append(strength)
        return torch.stack([module.log_alpha.sum() for module in gates]).sum()


class Regression(nn.Module):
    """Loss (w - mean of the dense input)^2, through a gate in training."""

    def __init__(self, gates: FeatureGates | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.gates = gates
        self.open_states: list[bool] = []

    def forward(self, batch: Batch) -> tuple[Tensor, None]:
        if self.gates is not None:
            self.open_states.append(self.gates.is_open)
        return (self.weight - batch.dense_features.mean()) ** 2, None


def batches(*values: float) -> list[Batch]:
    nothing = KeyedJaggedTensor.from_lengths_sync(
        keys=["a"],
        values=torch.zeros(0, dtype=torch.int64),
        lengths=torch.zeros(ROWS, dtype=torch.int32),
    )
    return [Batch(torch.full((ROWS, 1), value), nothing, torch.zeros(ROWS)) for value in values]


def ranks(world_size: int = 1) -> Ranks:
    # No part of the loop communicates.
    return Ranks(0, world_size, torch.device("cpu"), cast(torch.distributed.ProcessGroup, None))


def schedule(gates: FeatureGates, steps: int, open_steps: int, ramp_steps: int) -> GateSchedule:
    return GateSchedule(
        [gates], SGD([gates.log_alpha], lr=0.1), Recorded(), steps, open_steps, ramp_steps
    )


def gates_of(*features: str) -> FeatureGates:
    return FeatureGates(features, GateConfig(), name="gates")


@pytest.mark.parametrize(
    ("open_steps", "ramp_steps", "strengths"),
    [
        (2, 3, [0, 0, 0.25, 0.5, 0.75, 1, 1]),
        (0, 0, [1, 1, 1, 1, 1, 1, 1]),
        (0, 1, [0.5, 1, 1, 1, 1, 1, 1]),
        (6, 0, [0, 0, 0, 0, 0, 0, 1]),
    ],
)
def test_gates_are_open_then_ramped_up_then_fully_penalized(
    open_steps: int, ramp_steps: int, strengths: list[float]
) -> None:
    gates = gates_of("a")
    penalty = Recorded()
    plan = GateSchedule([gates], SGD([gates.log_alpha], lr=0.1), penalty, 7, open_steps, ramp_steps)
    states = []
    for step in range(7):
        plan.loss_term(step)
        states.append(gates.is_open)
    assert penalty.strengths == strengths
    assert states == [step < open_steps for step in range(7)]


def test_the_gate_optimizer_does_not_step_while_gates_are_open() -> None:
    gates = gates_of("a", "b")
    start = gates.log_alpha.detach().clone()
    plan = schedule(gates, steps=4, open_steps=2, ramp_steps=1)
    moved = []
    for step in range(4):
        plan.loss_term(step).backward()
        plan.update(step)
        # No gradient may be left over for the first step in which the gates learn.
        assert gates.log_alpha.grad is None
        moved.append((start - gates.log_alpha.detach()).tolist())
    assert moved[0] == moved[1] == [0.0, 0.0]
    assert moved[2] == pytest.approx([0.1, 0.1])
    assert moved[3] == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize(
    ("steps", "open_steps", "ramp_steps"), [(0, 0, 0), (3, 2, 1), (3, 3, 0), (3, -1, 0)]
)
def test_a_schedule_without_a_fully_penalized_step_is_refused(
    steps: int, open_steps: int, ramp_steps: int
) -> None:
    with pytest.raises(ValueError, match=f"leave none of {steps} pretraining steps"):
        schedule(gates_of("a"), steps, open_steps, ramp_steps)


def test_every_batch_trains_the_model_once_and_is_counted_over_all_ranks() -> None:
    model = Regression().eval()
    progress = train(
        model,
        SGD(model.parameters(), lr=0.5),
        batches(1.0, 2.0, 3.0),
        phase="continue",
        total=3,
        ranks=ranks(world_size=2),
        log=NO_LOG,
    )
    # A step at rate 1/2 on a square lands on the batch's mean.
    assert float(model.weight) == 3.0
    assert model.training
    assert (progress.steps, progress.samples) == (3, 3 * ROWS * 2)
    assert 0 < progress.step_ms < 1e3 * progress.seconds
    assert 0 <= progress.input_share < 1


def test_a_phase_without_batches_takes_no_step() -> None:
    model = Regression()
    progress = train(
        model,
        SGD(model.parameters(), lr=0.5),
        [],
        phase="continue",
        total=0,
        ranks=ranks(),
        log=NO_LOG,
    )
    assert (progress.steps, progress.samples) == (0, 0)
    assert math.isnan(progress.step_ms)


def test_the_schedule_sets_the_gates_before_the_forward_and_its_term_is_in_the_gradient() -> None:
    gates = gates_of("a")
    model = Regression(gates)
    train(
        model,
        SGD([model.weight], lr=0.5),
        batches(1.0, 1.0, 1.0),
        phase="pretrain",
        total=3,
        ranks=ranks(),
        log=NO_LOG,
        extra=schedule(gates, steps=3, open_steps=1, ramp_steps=0),
    )
    assert model.open_states == [True, False, False]
    start = GateConfig().initial_log_alpha
    assert float(gates.log_alpha) == pytest.approx(start - 2 * 0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_training_and_names_phase_and_step(value: float) -> None:
    model = Regression()
    with pytest.raises(TrainingDiverged, match=f"loss is {value} in step 1 of pretrain on rank 0"):
        train(
            model,
            SGD(model.parameters(), lr=0.5),
            batches(1.0, value, 1.0),
            phase="pretrain",
            total=3,
            ranks=ranks(),
            log=NO_LOG,
        )


def test_the_log_covers_every_step_including_those_after_the_last_interval(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    model = Regression()
    train(
        model,
        SGD(model.parameters(), lr=0.5),
        batches(1.0, 3.0, 4.0),
        phase="continue",
        total=3,
        ranks=ranks(),
        log=MetricsLog(str(path), interval=2),
    )
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"phase": "continue", "step": 2, "samples": 2 * ROWS, "loss": (1 + 4) / 2},
        {"phase": "continue", "step": 3, "samples": 3 * ROWS, "loss": 1.0},
    ]
