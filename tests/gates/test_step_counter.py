"""The counter that keys the noise."""

from __future__ import annotations

import torch

from torchrec_fmp.gates.step_counter import StepCounter


def test_only_training_steps_are_counted_starting_at_0() -> None:
    steps = StepCounter()
    assert [steps.next() for _ in range(3)] == [0, 1, 2]
    steps.eval()
    assert [steps.next(), steps.next()] == [3, 3]
    assert steps.train().next() == 3


def test_the_state_dict_resumes_the_count() -> None:
    first, resumed = StepCounter(), StepCounter()
    for _ in range(7):
        first.next()
    state = first.state_dict()
    assert {name: value.item() for name, value in state.items()} == {"_extra_state": 7}
    resumed.load_state_dict(state)
    assert resumed.next() == 7


def test_the_count_stays_on_the_host() -> None:
    with torch.device("meta"):
        steps = StepCounter().to("meta")
        assert steps.state_dict()["_extra_state"].device == torch.device("cpu")
    assert not list(steps.buffers())
