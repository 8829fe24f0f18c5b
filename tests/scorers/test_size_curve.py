"""The size curve: validation losses of the model without the features that a size drops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.support.process_group import ProcessGroup
from tests.support.scoring import hooks_left, logits_of, make_pretraining
from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.scorers.features import features_of
from torchrec_fmp.scorers.learning import average, validation_batches
from torchrec_fmp.scorers.size_curve import with_losses
from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.best_size import BestSize
from torchrec_fmp.selection.policies.top_fraction import TopFraction

SIGNAL = ("dense_0", "main_0", "main_1")


def curve(config_path: str) -> Mapping[int, Sequence[float]]:
    pretraining = make_pretraining(config_path)
    pretraining.train()
    model = pretraining.job.model
    features = features_of(model)
    ranked = [*SIGNAL, *(name for name in features if name not in SIGNAL)]
    scores = FeatureScores(
        {name: -float(rank) for rank, name in enumerate(ranked)}, dict.fromkeys(features, 1.0)
    )
    assert with_losses(scores, TopFraction(0.5), pretraining) is scores
    batch = next(pretraining.batches(1))
    before = logits_of(pretraining, batch)
    losses = with_losses(scores, BestSize(batches=4), pretraining).losses
    assert torch.equal(logits_of(pretraining, batch), before)
    assert hooks_left(model) == []
    model.eval()
    with torch.no_grad():
        whole = [
            average(model(batch)[0].double(), pretraining.ranks).item()
            for batch in validation_batches(pretraining, 4)
        ]
    assert torch.allclose(torch.tensor(losses[len(features)]), torch.tensor(whole), atol=1e-6)
    return losses


def test_ranks_agree_on_the_curve_and_signal_lowers_it(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    of_ranks = run_ranks.run(curve, write_config(tmp_path, tiny()))
    losses = of_ranks[0]
    assert all(other == losses for other in of_ranks)
    means = {size: sum(values) / len(values) for size, values in losses.items()}
    assert sorted(losses) == list(range(1, 8))
    assert all(len(values) == 4 for values in losses.values())
    assert means[1] > means[3]
