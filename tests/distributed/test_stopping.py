"""Pretraining ends when the decision is stable, on all ranks at once, and loses no row."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.process_group import ProcessGroup
from tests.distributed.scoring import make_pretraining, this_rank
from tests.tiny_run import tiny, write_config
from torchrec_fmp.config import ConfigError, load_config
from torchrec_fmp.gates.attach import gate_optimizer
from torchrec_fmp.gates.penalty import L0Penalty
from torchrec_fmp.pipeline import Pipeline
from torchrec_fmp.policies.closed_gates import ClosedGates
from torchrec_fmp.policies.policy import decide
from torchrec_fmp.policies.selection import Selection
from torchrec_fmp.scores.feature_scores import FeatureScores
from torchrec_fmp.scores.hard_concrete import HardConcreteScorer
from torchrec_fmp.scores.stopping import StableDecision, WatchedGates
from torchrec_fmp.train import GateSchedule

NOISE = ["noise_0", "noise_1", "noise_2", "dense_noise_0"]


def stopping(**stop: int) -> dict[str, Any]:
    return tiny(scorer__init_args__stop=stop)


class Recorded(WatchedGates):
    """Keeps the gradients of every step in which the gates learn."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gradients: dict[int, list[Tensor]] = {}

    def update(self, step: int) -> None:
        if not self._gates[0].is_open:
            grads = [module.log_alpha.grad for module in self._gates]
            self.gradients[step] = [grad.clone() for grad in grads if grad is not None]
        super().update(step)


def halves(config_path: str) -> tuple[list[Tensor], list[Tensor]]:
    """`log_alpha` of both halves after some steps, and by hand."""
    pretraining = make_pretraining(config_path)
    gates = pretraining.gates
    start = [module.log_alpha.detach().clone() for module in gates]
    optimizer = gate_optimizer(pretraining.job.model, 0.1)
    schedule = GateSchedule(gates, optimizer, L0Penalty(0.01), pretraining.steps, 3, 2)
    watched = Recorded(StableDecision(), schedule, pretraining, 0.1, 5)
    pretraining.train(12, extra=watched)
    by_hand = []
    for half in range(2):
        copies = [torch.nn.Parameter(log_alpha.clone()) for log_alpha in start]
        adam = torch.optim.Adam(copies, lr=0.2)
        for step, gradients in watched.gradients.items():
            if step % 2 == half:
                for copy, gradient in zip(copies, gradients, strict=True):
                    copy.grad = gradient
                adam.step()
        by_hand += [copy.detach() for copy in copies]
    assert sorted(watched.gradients) == list(range(3, 12))
    return [each.detach() for half in watched._halves for each in half.log_alphas], by_hand


def test_each_half_learns_from_its_own_steps_alone_at_twice_the_rate(
    ranks: ProcessGroup, tmp_path: Path
) -> None:
    of_ranks = ranks.run(halves, write_config(tmp_path, tiny()))
    for found, by_hand in of_ranks:
        for log_alpha, expected in zip(found, by_hand, strict=True):
            assert torch.allclose(log_alpha, expected, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(of_ranks[0][0], of_ranks[-1][0], strict=True))
    count = len(of_ranks[0][0]) // 2
    first, second = of_ranks[0][0][:count], of_ranks[0][0][count:]
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def run(config_path: str) -> tuple[Selection, dict[str, int]]:
    """The selection, and the rows that each phase has trained on."""
    config, _ = load_config(config_path)
    outcome = Pipeline(config, this_rank()).run()
    return outcome.selection, {name: it.samples for name, it in outcome.progress.items()}


def test_a_clear_decision_ends_pretraining_early_and_the_rows_left_are_trained_on(
    ranks: ProcessGroup, tmp_path: Path
) -> None:
    of_ranks = ranks.run(run, write_config(tmp_path, stopping(checks=40, patience=3)))
    selection, samples = of_ranks[0]
    assert all(other == (selection, samples) for other in of_ranks)
    assert selection.dropped == NOISE
    assert all(decision.confidence == 1 for decision in selection.features.values())
    # Half of the 10,000 rows are for pretraining, of which gates are open or ramped up in 0.4.
    assert 0.4 * 5000 < samples["pretrain"] < 4900
    # What does not fill a batch of 100 of every rank, of either part of the rows, is left out.
    left_out = 10_000 - samples["pretrain"] - samples["continue"]
    assert 0 <= left_out < 2 * 100 * len(of_ranks) + 32 * len(of_ranks)
    assert Selection.from_json(selection.to_json()) == selection


def undecided(config_path: str) -> tuple[FeatureScores, int, int, Sequence[str]]:
    """Scores of a policy that changes its mind about one feature at every second question."""
    pretraining = make_pretraining(config_path)
    asked = 0

    def change(scores: FeatureScores) -> Selection:
        nonlocal asked
        asked += 1
        gate = float(asked % 2)
        changed = FeatureScores(scores.scores, {**scores.gates, "main_0": gate}, scores.collections)
        return decide(changed, ClosedGates())

    pretraining.decide = change
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torchrec_fmp.scores.stopping")
    logger.addHandler(handler)
    scorer = HardConcreteScorer(L0Penalty(0.015), 0.2, 0.3, stop=StableDecision(10, 2))
    scores = scorer.score(pretraining)
    logger.removeHandler(handler)
    return scores, pretraining.trained_rows, pretraining.rows, lines


def test_without_a_stable_decision_all_rows_are_used_and_the_undecided_feature_is_named(
    ranks: ProcessGroup, tmp_path: Path
) -> None:
    of_ranks = ranks.run(undecided, write_config(tmp_path, tiny()))
    for scores, trained_rows, rows, lines in of_ranks:
        assert trained_rows == rows
        assert scores.confidence["main_0"] < 1
        assert scores.confidence["main_1"] == 1
        assert scores.confidence == of_ranks[0][0].confidence
        if lines:
            assert len(lines) == 1
            assert "main_0 (0." in lines[0]
            assert "main_1" not in lines[0]
    assert of_ranks[0][3]


@pytest.mark.parametrize(("checks", "patience"), [(5, 6), (5, 0)])
def test_checks_that_could_never_agree_are_refused(checks: int, patience: int) -> None:
    with pytest.raises(ValueError, match="patience"):
        StableDecision(checks, patience)


def test_a_policy_that_decides_when_pretraining_has_ended_cannot_end_it(tmp_path: Path) -> None:
    config = stopping(checks=6) | {"policy": {"class_path": "BestSize"}}
    with pytest.raises(ConfigError, match=r"BestSize decides by validation losses"):
        load_config(write_config(tmp_path, config))
