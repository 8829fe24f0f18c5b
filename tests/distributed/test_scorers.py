"""Every scorer ranks planted signal above noise, alike on all ranks, and leaves no trace."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.process_group import ProcessGroup
from tests.distributed.scoring import (
    hooks_left,
    logits_of,
    make_pretraining,
    sequence_pretraining,
)
from tests.tiny_run import tiny, write_config
from torchrec_fmp.scores.permutation import PermutationScorer
from torchrec_fmp.scores.scorer import Scorer
from torchrec_fmp.scores.sfs import SfsScorer
from torchrec_fmp.scores.taylor import TaylorScorer

SIGNAL = ("main_0", "main_1", "dense_0")
NOISE = ("noise_0", "noise_1", "noise_2", "dense_noise_0")
TRAIN_FIRST: list[Scorer] = [SfsScorer(10), TaylorScorer(10), PermutationScorer(10)]


def name(scorer: Scorer) -> str:
    return type(scorer).__name__


def score(config_path: str, scorer: Scorer) -> tuple[Mapping[str, float], dict[str, Any]]:
    """The scores, and what the scorer left behind."""
    pretraining = make_pretraining(config_path)
    model = pretraining.job.model
    state = torch.get_rng_state()
    scores = scorer.score(pretraining)
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks_left(model) == []
    assert scores.collections
    return scores.scores, {
        "trained_rows": pretraining.trained_rows,
        "rows": pretraining.rows,
        "gates": scores.gates,
        "logits": logits_of(pretraining, next(pretraining.batches(1))),
    }


def train(config_path: str) -> torch.Tensor:
    """Logits of the model that no scorer has seen, after pretraining."""
    pretraining = make_pretraining(config_path)
    pretraining.train()
    return logits_of(pretraining, next(pretraining.batches(1)))


def assert_ranked(scores: Mapping[str, float]) -> None:
    assert min(scores[f] for f in SIGNAL) > max(scores[f] for f in NOISE), scores


@pytest.mark.parametrize("scorer", TRAIN_FIRST, ids=name)
def test_a_scorer_of_the_trained_model_finds_the_signal_and_leaves_the_model_as_trained(
    ranks: ProcessGroup, tmp_path: Path, scorer: Scorer
) -> None:
    path = write_config(tmp_path, tiny(pretrain__batch_size=32 // ranks.world_size))
    outcomes = ranks.run(score, path, scorer)
    for (scores, left), logits in zip(outcomes, ranks.run(train, path), strict=True):
        assert_ranked(scores)
        assert scores == outcomes[0][0]
        assert left["trained_rows"] == left["rows"]
        assert torch.equal(left["logits"], logits)


def score_sequences(scorer: Scorer) -> Mapping[str, float]:
    pretraining = sequence_pretraining()
    scores = scorer.score(pretraining).scores
    assert hooks_left(pretraining.job.model) == []
    return scores


@pytest.mark.parametrize("scorer", TRAIN_FIRST, ids=name)
def test_features_of_sequences_are_scored(ranks: ProcessGroup, scorer: Scorer) -> None:
    outcomes = ranks.run(score_sequences, scorer)
    assert sorted(outcomes[0]) == ["r", "s", "u", "v"]
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert all(score != 0 for score in outcomes[0].values())


@pytest.mark.parametrize("scorer", [SfsScorer, TaylorScorer, PermutationScorer])
def test_a_scorer_of_no_batches_is_refused(scorer: type[Any]) -> None:
    with pytest.raises(ValueError, match="batches is 0, it must be at least 1"):
        scorer(0)


def test_validation_rows_that_do_not_fill_a_batch_are_an_error(
    ranks_1: ProcessGroup, tmp_path: Path
) -> None:
    # 9,600 of 10,000 rows are for pretraining.
    path = write_config(tmp_path, tiny(pretrain__fraction=0.96, pretrain__batch_size=480))
    with pytest.raises(AssertionError, match="do not fill one batch of 480"):
        ranks_1.run(score, path, SfsScorer(10))
