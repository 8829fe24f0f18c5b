"""Pretraining ends when the decision is stable, on all ranks at once, and loses no row."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from tests.run.test_pretraining_rows import ROWS, numbers, write_numbered
from tests.support.process_group import ProcessGroup
from tests.support.scoring import make_pretraining, this_rank
from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.distributed.ranks import Ranks
from torchrec_fmp.gates.attach import gate_optimizer
from torchrec_fmp.gates.penalty import L0Penalty
from torchrec_fmp.gates.schedule import GateSchedule
from torchrec_fmp.run.config import RunConfig, load_config
from torchrec_fmp.run.pipeline import Pipeline
from torchrec_fmp.scorers.hard_concrete import HardConcreteScorer
from torchrec_fmp.scorers.pretraining import Pretraining, PruneContext
from torchrec_fmp.scorers.stopping import StableDecision, WatchedGates
from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.closed_gates import ClosedGates
from torchrec_fmp.selection.policies.policy import decide
from torchrec_fmp.selection.policies.top_fraction import TopFraction
from torchrec_fmp.selection.selection import FeatureDecision, Selection
from torchrec_fmp.strict import ConfigError
from torchrec_fmp.training.job import Job

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
    """`log_alpha` of both halves after some steps, and its values computed by hand."""
    pretraining = make_pretraining(config_path)
    gates = pretraining.gates
    start = [module.log_alpha.detach().clone() for module in gates]
    optimizer = gate_optimizer(pretraining.job.model, 0.1)
    schedule = GateSchedule(gates, optimizer, L0Penalty(0.01), pretraining.steps, 3, 2)
    watched = Recorded(StableDecision(), schedule, pretraining, optimizer, 5)
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


def test_each_half_learns_only_from_its_own_steps_at_twice_the_rate(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    of_ranks = run_ranks.run(halves, write_config(tmp_path, tiny()))
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


def test_a_stable_decision_ends_pretraining_early_and_the_other_rows_are_trained_on(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    of_ranks = run_ranks.run(run, write_config(tmp_path, stopping(checks=40, patience=3)))
    selection, samples = of_ranks[0]
    assert all(other == (selection, samples) for other in of_ranks)
    assert selection.dropped == NOISE
    assert all(decision.confidence == 1 for decision in selection.features.values())
    # Pretraining has half of the 10,000 rows; gates are open or ramped up in 0.4 of them.
    assert 0.4 * 5000 < samples["pretrain"] < 4900
    # In each part of the rows, a rest that does not fill a batch of 100 per rank is left out.
    left_out = 10_000 - samples["pretrain"] - samples["continue"]
    assert 0 <= left_out < 2 * 100 * len(of_ranks) + 32 * len(of_ranks)
    assert Selection.from_json(selection.to_json()) == selection


def test_each_of_several_prunes_with_a_budget_may_end_early(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    budget = {"class_path": "TopBudget", "init_args": {"keep": 0.5, "unit": "hbm"}}
    gradual = {"class_path": "Gradual", "init_args": {"prunes": 2}}
    config = stopping(patience=2) | {"policy": budget, "schedule": gradual}
    of_ranks = run_ranks.run(run, write_config(tmp_path, config))
    selection, samples = of_ranks[0]
    assert all(other == (selection, samples) for other in of_ranks)
    assert all(decision.confidence is not None for decision in selection.features.values())
    assert samples["pretrain"] < 4900
    assert 10_000 - samples["pretrain"] - samples["continue"] < 3 * 100 * len(of_ranks)


def ends_as_soon_as_all_agree(config_path: str) -> None:
    """Tries sequences of answers about one feature: `a` keeps it and `b` drops it."""
    pretraining = make_pretraining(config_path)
    optimizer = gate_optimizer(pretraining.job.model, 0.1)
    schedule = GateSchedule(pretraining.gates, optimizer, L0Penalty(), pretraining.steps, 0, 0)
    everything = TopFraction(1.0)

    @settings(max_examples=200, deadline=None, database=None)
    @given(
        st.lists(st.sampled_from(["aaaa", "bbbb", "aaab", "abaa"]), max_size=9), st.integers(1, 4)
    )
    def check(checks: list[str], patience: int) -> None:
        answers = iter("".join(checks))

        def decide_as_told(scores: FeatureScores) -> Selection:
            features = dict(decide(scores, everything).features)
            if next(answers) == "b":
                features["main_0"] = FeatureDecision(0.0, 0.0, kept=False, reason="told")
            return Selection(features)

        pretraining._prune = PruneContext(decide=decide_as_told)
        watched = WatchedGates(StableDecision(9, patience), schedule, pretraining, optimizer, 0)
        for past, _ in enumerate(checks, 1):
            watched._check(past)
            window = "".join(checks[max(0, past - patience) : past])
            assert watched.is_stable == (past >= patience and len(set(window)) == 1)

    check()


def test_a_decision_is_stable_once_all_answers_of_enough_checks_agree(
    ranks_1: ProcessGroup, tmp_path: Path
) -> None:
    ranks_1.run(ends_as_soon_as_all_agree, write_config(tmp_path, tiny()))


def undecided(config_path: str) -> tuple[FeatureScores, int, int, Sequence[str]]:
    """Scores for a policy whose decision about one feature alternates with every call."""
    pretraining = make_pretraining(config_path)
    asked = 0

    def change(scores: FeatureScores) -> Selection:
        nonlocal asked
        asked += 1
        gate = float(asked % 2)
        changed = FeatureScores(scores.scores, {**scores.gates, "main_0": gate}, scores.collections)
        return decide(changed, ClosedGates())

    pretraining._prune = PruneContext(decide=change)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torchrec_fmp.scorers.stopping")
    logger.addHandler(handler)
    scorer = HardConcreteScorer(L0Penalty(0.015), 0.2, 0.3, stop=StableDecision(10, 2))
    scores = scorer.score(pretraining)
    logger.removeHandler(handler)
    return scores, pretraining.trained_rows, pretraining.rows, lines


def test_without_a_stable_decision_all_rows_are_used_and_the_undecided_feature_is_named(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    of_ranks = run_ranks.run(undecided, write_config(tmp_path, tiny()))
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


def rank_by_rank(config_path: str) -> int:
    """Number of trained rows if the decision alternates with every call on the last rank alone."""
    pretraining = make_pretraining(config_path)
    ranks, asked = this_rank(), 0

    def change(scores: FeatureScores) -> Selection:
        nonlocal asked
        asked += ranks.rank == ranks.world_size - 1
        policy = ClosedGates(0.5) if asked % 2 else TopFraction(1.0)
        return decide(scores, policy)

    pretraining._prune = PruneContext(decide=change)
    HardConcreteScorer(L0Penalty(0.015), 0.2, 0.3, stop=StableDecision(10, 2)).score(pretraining)
    return pretraining.trained_rows


def test_no_rank_ends_before_the_others(ranks_2: ProcessGroup, tmp_path: Path) -> None:
    trained = ranks_2.run(rank_by_rank, write_config(tmp_path, tiny()))
    assert trained == [78 * 32] * 2


def test_a_decision_is_not_stable_before_any_gate_has_closed(
    ranks_1: ProcessGroup, tmp_path: Path
) -> None:
    # With this start and rate, all gates are open in the first checks, and some are closing.
    config = tiny(
        gates__initial_log_alpha=1.5,
        scorer__init_args__learning_rate=0.04,
        scorer__init_args__stop={"checks": 20, "patience": 4},
    )
    ((selection, samples),) = ranks_1.run(run, write_config(tmp_path, config))
    assert selection.dropped == NOISE
    assert samples["pretrain"] > 0.8 * 5000


class Counted(Pipeline):
    """Records the numbers of the rows that it trains on."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        self.rows: dict[str, list[int]] = {"pretrain": [], "continue": []}

    def _pretraining(self, job: Job, number: int = 1) -> Pretraining:
        self._note(job, "pretrain")
        return super()._pretraining(job, number)

    def _train(self, job: Job, phase: str, *arguments: Any) -> None:
        self._note(job, phase)
        super()._train(job, phase, *arguments)

    def _note(self, job: Job, phase: str) -> None:
        def note(module: nn.Module, inputs: tuple[Batch]) -> None:
            if module.training:
                self.rows[phase] += numbers(inputs)

        job.model.register_forward_pre_hook(note)


def counted(config_path: str) -> dict[str, list[int]]:
    config, _ = load_config(config_path)
    pipeline = Counted(config, this_rank())
    pipeline.run()
    return pipeline.rows


def test_each_row_is_trained_on_once_in_pretraining_or_afterwards(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    # The only feature stays, whatever its gate: it is decided from the first check on.
    stop = {"checks": 20, "patience": 4}
    config = write_numbered(tmp_path, scorer__init_args__stop=stop)
    of_ranks = run_ranks.run(counted, config)
    world_size = run_ranks.world_size
    steps = 300 // (8 * world_size)
    ended = int(0.3 * steps) + int(0.1 * steps) + 4
    for rows in of_ranks:
        assert len(rows["pretrain"]) == 8 * ended < 8 * steps
    trained = [row for rows in of_ranks for part in rows.values() for row in part]
    assert len(trained) == len(set(trained))
    # The rows left out do not fill a batch, of pretraining's rest or of the other rows.
    assert len(trained) > ROWS - 2 * 8 * world_size


@pytest.mark.parametrize(("checks", "patience"), [(5, 6), (5, 0)])
def test_invalid_patience_is_refused(checks: int, patience: int) -> None:
    with pytest.raises(ValueError, match="patience"):
        StableDecision(checks, patience)


@pytest.mark.parametrize("stop", [{}, {"patience": 3}])
def test_the_composed_configuration_gives_the_same_stopping_rule(
    tmp_path: Path, stop: dict[str, int]
) -> None:
    config, composed = load_config(write_config(tmp_path, stopping(**stop)))
    (tmp_path / "again.yaml").write_text(composed)
    again, _ = load_config(str(tmp_path / "again.yaml"))
    for scorer in (config.scorer, again.scorer):
        assert isinstance(scorer, HardConcreteScorer)
        assert scorer.stop == StableDecision(**stop)


def test_a_policy_that_decides_after_pretraining_cannot_end_it(tmp_path: Path) -> None:
    config = stopping(checks=10) | {"policy": {"class_path": "BestSize"}}
    with pytest.raises(ConfigError, match=r"BestSize decides by validation losses"):
        load_config(write_config(tmp_path, config))
