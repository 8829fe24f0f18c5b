"""OptFS: a gate on each value of each feature, aggregated to features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Adam
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_fmp.data.schema import Schema
from torchrec_fmp.scorers.features import features_of, scores_of
from torchrec_fmp.scorers.learning import JointSteps, check_learning
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.probe import Block, probed
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.selection.feature_scores import FeatureScores

_START = 0.5
# More values of a feature than this share gates, so that no rank holds a number for each row.
_MOST_GATES = 2**16


class OptFsScorer(Scorer):
    """The gate sigmoid(t c) / sigmoid(0.5) of each value; a feature's score is its values' mean.

    Lyu et al. 2023, "Optimizing Feature Set for Click-Through Rate Prediction" (WWW,
    arXiv:2301.10909), and its code (fuyuanlyu/OptFS, modules/mask.py and maskTrainer.py), which
    ERASE has too: c starts at 0.5 and learns jointly with the model under the penalty `penalty`
    times the sum of all sigmoid(t c); the temperature t grows exponentially from 1 to
    `last_temperature`, here by step and not by epoch. The official code prunes values; the field
    aggregate is the mean of sigmoid(c) over the examples of pretraining.

    A pooled bag is scaled by the mean gate of its values, which for one value is its gate. A value
    v of a feature with more than 65,536 of them has gate v mod 65,536. A dense column has one gate.

    Args:
        learning_rate: of Adam, for c.
        penalty: of each gate, in the loss's unit; ERASE's for MovieLens, the smallest of its data.
        last_temperature: gamma of ERASE.

    Raises:
        ValueError: if the learning rate is not positive.
    """

    def __init__(
        self,
        learning_rate: float = 1e-2,
        penalty: float = 1e-4,
        last_temperature: float = 2000.0,
    ) -> None:
        check_learning(learning_rate)
        self.learning_rate = learning_rate
        self.penalty = penalty
        self.last_temperature = last_temperature

    def score(self, pretraining: Pretraining) -> FeatureScores:
        model, ranks = pretraining.job.model, pretraining.ranks
        features = features_of(model)
        gates = _ValueGates(pretraining.job.schema, ranks.device)
        optimizer = Adam([gates.c], lr=self.learning_rate)

        def temperature() -> float:
            return self.last_temperature ** (steps.step / max(1, pretraining.steps - 1))

        def penalty() -> Tensor:
            return self.penalty * (temperature() * gates.c).sigmoid().sum()

        steps = JointSteps(pretraining, [gates.c], optimizer, penalty)
        scale = 1 / torch.tensor(_START).sigmoid().item()

        def gated(block: Block) -> Tensor:
            return block.scaled(scale * gates.of(block, temperature()))

        with probed(model, gated):
            pretraining.train(extra=steps)

        total = torch.zeros(len(features), dtype=torch.float64, device=ranks.device)
        place = {feature: index for index, feature in enumerate(features)}
        rows = 0
        for batch in pretraining.batches():
            means = gates.means(batch.sparse_features, 1.0)
            for feature, mean_B in means.items():
                total[place[feature]] += mean_B.detach().double().sum()
            rows += len(batch.labels)
        for column in pretraining.job.schema.dense:
            total[place[column]] = rows * gates.c[gates.offsets[column]].detach().sigmoid()
        dist.all_reduce(total, group=ranks.group)
        return scores_of(model, total / (rows * ranks.world_size))


class _ValueGates:
    """One number for each value of each feature, all in one parameter."""

    def __init__(self, schema: Schema, device: torch.device) -> None:
        sizes = {column.name: min(column.num_embeddings, _MOST_GATES) for column in schema.sparse}
        sizes |= dict.fromkeys(schema.dense, 1)
        self.sizes: Mapping[str, int] = sizes
        ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        self.offsets: Mapping[str, int] = dict(zip(sizes, starts, strict=True))
        self.c = nn.Parameter(torch.full((ends[-1],), _START, device=device))

    def of(self, block: Block, temperature: float) -> Tensor:
        """sigmoid(t c) of the block's keys, (K,) for dense columns and else (B, K)."""
        if block.ids is None:
            places = [self.offsets[feature] for feature in block.features]
            return (temperature * self.c[places]).sigmoid()
        means = self.means(block.ids, temperature)
        return torch.stack([means[feature] for feature in block.features], dim=1)

    def means(self, ids: KeyedJaggedTensor, temperature: float) -> dict[str, Tensor]:
        """Feature -> (B,) the mean of sigmoid(t c) over the bag; 1 for an empty bag."""
        means = {}
        for feature, bags in ids.to_dict().items():
            if feature not in self.sizes:
                continue
            places = bags.values() % self.sizes[feature] + self.offsets[feature]
            lengths = bags.lengths()
            rows = torch.arange(len(lengths), device=places.device).repeat_interleave(lengths)
            gates = (temperature * self.c[places]).sigmoid()
            sums = gates.new_zeros(len(lengths)).index_add(0, rows, gates)
            means[feature] = torch.where(lengths > 0, sums / lengths.clamp(min=1), 1.0)
        return means
