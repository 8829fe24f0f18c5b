"""Every scorer ranks planted signal above noise, alike on all ranks, and leaves no trace."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.process_group import ProcessGroup, RankError
from tests.support.scoring import hooks_left, logits_of, make_pretraining, sequence_pretraining
from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.scorers.cardinality import CardinalityScorer
from torchrec_fmp.scorers.lasso import LassoScorer
from torchrec_fmp.scorers.mutual_information import MutualInformationScorer
from torchrec_fmp.scorers.permutation import PermutationScorer
from torchrec_fmp.scorers.random import RandomScorer
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.scorers.sfs import SfsScorer
from torchrec_fmp.scorers.tabular import Sample, gathered
from torchrec_fmp.scorers.taylor import TaylorScorer
from torchrec_fmp.scorers.trees import GradientBoostedTreesScorer, RandomForestScorer

SIGNAL = ("main_0", "main_1", "dense_0")
NOISE = ("noise_0", "noise_1", "noise_2", "dense_noise_0")
OF_MODEL: list[Scorer] = [SfsScorer(10), TaylorScorer(10), PermutationScorer(10)]
OF_ROWS: list[Scorer] = [
    MutualInformationScorer(),
    GradientBoostedTreesScorer(n_estimators=20),
    # In unbounded trees, a dense noise column is almost as important as a signal.
    RandomForestScorer(max_depth=4),
    LassoScorer(),
]
FLOORS: list[Scorer] = [RandomScorer(), CardinalityScorer()]


def name(scorer: Scorer) -> str:
    return type(scorer).__name__


def score(config_path: str, scorer: Scorer) -> tuple[Mapping[str, float], dict[str, Any]]:
    """The scores, and the state that the scorer left behind."""
    pretraining = make_pretraining(config_path)
    model = pretraining.job.model
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    scores = scorer.score(pretraining)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert hooks_left(model) == []
    assert scores.collections
    return scores.scores, {
        "trained_rows": pretraining.trained_rows,
        "rows": pretraining.rows,
        "gates": scores.gates,
        "logits": logits_of(pretraining, next(pretraining.batches(1))),
    }


def train(config_path: str) -> torch.Tensor:
    """Logits of a model after pretraining without a scorer."""
    pretraining = make_pretraining(config_path)
    pretraining.train()
    return logits_of(pretraining, next(pretraining.batches(1)))


@pytest.fixture(scope="module")
def trained() -> dict[int, list[torch.Tensor]]:
    """Number of ranks -> results of `train` on each rank, computed once for all scorers."""
    return {}


def assert_ranked(scores: Mapping[str, float]) -> None:
    assert min(scores[f] for f in SIGNAL) > max(scores[f] for f in NOISE), scores


@pytest.mark.parametrize("scorer", OF_MODEL + OF_ROWS + FLOORS, ids=name)
def test_a_scorer_without_gates_finds_the_signal_and_keeps_the_trained_model(
    run_ranks: ProcessGroup, tmp_path: Path, scorer: Scorer, trained: dict[int, list[torch.Tensor]]
) -> None:
    path = write_config(tmp_path, tiny(pretrain__batch_size=32 // run_ranks.world_size))
    if run_ranks.world_size not in trained:
        trained[run_ranks.world_size] = run_ranks.run(train, path)
    outcomes = run_ranks.run(score, path, scorer)
    for (scores, left), logits in zip(outcomes, trained[run_ranks.world_size], strict=True):
        if scorer not in FLOORS:
            assert_ranked(scores)
        assert scores == outcomes[0][0]
        assert left["trained_rows"] == left["rows"]
        assert torch.equal(left["logits"], logits)


def score_sequences(scorer: Scorer) -> Mapping[str, float]:
    pretraining = sequence_pretraining()
    scores = scorer.score(pretraining).scores
    assert hooks_left(pretraining.job.model) == []
    return scores


def test_the_random_order_is_determined_by_the_seed(ranks_1: ProcessGroup, tmp_path: Path) -> None:
    (first, _), (again, _), (other, _) = (
        ranks_1.run(score, write_config(tmp_path, tiny(seed=seed)), RandomScorer())[0]
        for seed in (3, 3, 4)
    )
    assert sorted(first.values()) == list(range(7))
    assert first == again != other


def test_large_tables_come_first_and_dense_columns_last(
    ranks_1: ProcessGroup, tmp_path: Path
) -> None:
    ((scores, _),) = ranks_1.run(score, write_config(tmp_path, tiny()), CardinalityScorer())
    assert (scores["main_0"], scores["main_1"], scores["dense_0"]) == (8, 16, 1)


@pytest.mark.parametrize("scorer", OF_MODEL, ids=name)
def test_features_of_sequences_are_scored(run_ranks: ProcessGroup, scorer: Scorer) -> None:
    outcomes = run_ranks.run(score_sequences, scorer)
    assert sorted(outcomes[0]) == ["r", "s", "u", "v"]
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert all(score != 0 for score in outcomes[0].values())


def sample_and_rows(config_path: str, rows: int) -> tuple[Sample | None, list[np.ndarray]]:
    """Sample that rank 0 gathers, and this rank's first 4 batches: labels, dense values, ids."""
    pretraining = make_pretraining(config_path)
    batches = list(pretraining.batches(4))
    labels = np.concatenate([batch.labels.numpy() for batch in batches])
    dense = np.concatenate([batch.dense_features.numpy() for batch in batches])
    bags = [batch.sparse_features for batch in batches]
    ids = np.concatenate([bag.values().view(len(bag.keys()), -1).T.numpy() for bag in bags])
    return gathered(pretraining, rows), [labels, dense, ids]


def test_rank_0_gathers_the_rows_of_all_ranks_up_to_a_limit(
    ranks_2: ProcessGroup, tmp_path: Path
) -> None:
    # 4 batches of 16 on each of 2 ranks.
    path = write_config(tmp_path, tiny(pretrain__batch_size=16))
    (sample, mine), (nothing, others) = ranks_2.run(sample_and_rows, path, 100)
    assert nothing is None
    for got, one, other in zip(
        (sample.labels, sample.values, sample.ids), mine, others, strict=True
    ):
        assert np.array_equal(got, np.concatenate([one, other]))
    assert sample.matrix.shape == (128, len(sample.features)) == (128, 7)


def test_rows_of_one_class_are_an_error_on_all_ranks(ranks_2: ProcessGroup) -> None:
    with pytest.raises(RankError, match="all [0-9]+ rows .* have the same label") as failure:
        ranks_2.run(score_sequences, MutualInformationScorer())
    assert "no answer" not in str(failure.value)


@pytest.mark.parametrize("scorer", [SfsScorer, TaylorScorer, PermutationScorer])
def test_a_scorer_with_zero_batches_is_refused(scorer: type[Any]) -> None:
    with pytest.raises(ValueError, match="batches is 0; it must be at least 1"):
        scorer(0)


def test_validation_rows_that_do_not_fill_a_batch_are_an_error(
    ranks_1: ProcessGroup, tmp_path: Path
) -> None:
    # 9,600 of 10,000 rows are for pretraining.
    path = write_config(tmp_path, tiny(pretrain__fraction=0.96, pretrain__batch_size=480))
    with pytest.raises(RankError, match="do not fill one batch of 480"):
        ranks_1.run(score, path, SfsScorer(10))
