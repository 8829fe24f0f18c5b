"""Scorers that learn masks with the model rank signal above noise, and leave no mask behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scorers.test_scorers import NOISE, SIGNAL
from tests.support.process_group import ProcessGroup
from tests.support.scoring import hooks_left, make_pretraining, sequence_pretraining
from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.scorers.adafs import AdaFsScorer
from torchrec_fmp.scorers.autofield import AutoFieldScorer
from torchrec_fmp.scorers.concrete_dropout import ConcreteDropoutScorer
from torchrec_fmp.scorers.lpfs import LpfsScorer
from torchrec_fmp.scorers.optfs import OptFsScorer
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.scorers.shuffle_gate import ShuffleGateScorer

# Learning rates suit the few steps of a test; AdaFS is soft because its hard cut takes longer.
SCORERS: list[Scorer] = [
    AutoFieldScorer(learning_rate=2e-2, every=1),
    AdaFsScorer(keep=1.0, learning_rate=5e-3),
    ConcreteDropoutScorer(learning_rate=0.1),
    LpfsScorer(learning_rate=0.1),
    OptFsScorer(learning_rate=5e-2, penalty=1e-3, last_temperature=5.0),
    ShuffleGateScorer(learning_rate=5e-2, penalty=0.2),
]


def name(scorer: Scorer) -> str:
    return type(scorer).__name__


def score(config_path: str, scorer: Scorer) -> tuple[Mapping[str, float], dict[str, Any]]:
    """The scores, and the state that the scorer left behind."""
    pretraining = make_pretraining(config_path)
    model = pretraining.job.model
    state = torch.get_rng_state()
    scores = scorer.score(pretraining)
    return scores.scores, {
        "random": torch.equal(torch.get_rng_state(), state),
        "hooks": hooks_left(model) + [*model._forward_pre_hooks],
        "gates": set(scores.gates.values()),
        "trained": pretraining.trained_rows == pretraining.rows,
    }


@pytest.mark.parametrize("scorer", SCORERS, ids=name)
def test_a_learned_mask_ranks_signal_above_noise_on_all_ranks_and_is_removed(
    run_ranks: ProcessGroup, tmp_path: Path, scorer: Scorer
) -> None:
    path = write_config(tmp_path, tiny(pretrain__batch_size=32 // run_ranks.world_size))
    outcomes = run_ranks.run(score, path, scorer)
    for scores, left in outcomes:
        assert scores == outcomes[0][0]
        assert left == {"random": True, "hooks": [], "gates": {1.0}, "trained": True}
    scores = outcomes[0][0]
    signal, noise = ([scores[f] for f in group] for group in (SIGNAL, NOISE))
    assert min(signal) > max(noise), scores


def score_sequences(scorer: Scorer) -> Mapping[str, float]:
    return scorer.score(sequence_pretraining()).scores


@pytest.mark.parametrize("scorer", SCORERS, ids=name)
def test_sequence_features_get_distinct_scores(ranks_2: ProcessGroup, scorer: Scorer) -> None:
    first, second = ranks_2.run(score_sequences, scorer)
    assert first == second
    assert sorted(first) == ["r", "s", "u", "v"]
    assert len(set(first.values())) == 4


@pytest.mark.parametrize("scorer", [type(scorer) for scorer in SCORERS])
def test_a_learning_rate_that_is_not_positive_is_refused(scorer: type[Any]) -> None:
    with pytest.raises(ValueError, match="learning_rate is 0; it must be positive"):
        scorer(learning_rate=0)
