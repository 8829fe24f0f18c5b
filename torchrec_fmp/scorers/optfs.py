"""OptFS: a gate on each value of each feature, aggregated per feature."""

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
# Features with more values share gates, so that no rank stores one number per table row.
_MOST_GATES = 2**16


class OptFsScorer(Scorer):
    """Gates each value by sigmoid(t c) / sigmoid(0.5); the score is the mean over the values.

    Lyu et al. 2023, "Optimizing Feature Set for Click-Through Rate Prediction" (WWW,
    arXiv:2301.10909), and its code (fuyuanlyu/OptFS, modules/mask.py and maskTrainer.py), also in
    ERASE: c starts at 0.5 and learns jointly with the model. The penalty is `penalty` times the
    sum of all sigmoid(t c). The temperature t grows exponentially from 1 to `last_temperature`,
    here by step instead of by epoch. The official code prunes values; here a feature's score is
    the mean of sigmoid(c) over the examples of pretraining.

    A pooled bag is scaled by the mean gate of its values; a single value is scaled by its gate. In
    a feature with more than 65,536 values, value v has gate v mod 65,536. A dense column has one
    gate.

    Args:
        learning_rate: learning rate of Adam for c.
        penalty: penalty of each gate, in the loss's unit; ERASE's value for MovieLens, the
            smallest among its data sets.
        last_temperature: temperature t at the last step; ERASE's gamma.

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
        position = {feature: index for index, feature in enumerate(features)}
        rows = 0
        for batch in pretraining.batches():
            means = gates.means(batch.sparse_features, 1.0)
            for feature, mean_B in means.items():
                total[position[feature]] += mean_B.detach().double().sum()
            rows += len(batch.labels)
        for column in pretraining.job.schema.dense:
            total[position[column]] = rows * gates.c[gates.offsets[column]].detach().sigmoid()
        dist.all_reduce(total, group=ranks.group)
        return scores_of(model, total / (rows * ranks.world_size))


class _ValueGates:
    """One number per value of each feature, all in one parameter."""

    def __init__(self, schema: Schema, device: torch.device) -> None:
        sizes = {column.name: min(column.num_embeddings, _MOST_GATES) for column in schema.sparse}
        sizes |= dict.fromkeys(schema.dense, 1)
        self.sizes: Mapping[str, int] = sizes
        ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        self.offsets: Mapping[str, int] = dict(zip(sizes, starts, strict=True))
        self.c = nn.Parameter(torch.full((ends[-1],), _START, device=device))

    def of(self, block: Block, temperature: float) -> Tensor:
        """sigmoid(t c) of the block's keys: (K,) for dense columns, otherwise (B, K)."""
        if block.ids is None:
            positions = [self.offsets[feature] for feature in block.features]
            return (temperature * self.c[positions]).sigmoid()
        means = self.means(block.ids, temperature)
        return torch.stack([means[feature] for feature in block.features], dim=1)

    def means(self, ids: KeyedJaggedTensor, temperature: float) -> dict[str, Tensor]:
        """Feature -> (B,) mean of sigmoid(t c) over each bag; 1 for an empty bag."""
        means = {}
        for feature, bags in ids.to_dict().items():
            if feature not in self.sizes:
                continue
            positions = bags.values() % self.sizes[feature] + self.offsets[feature]
            lengths = bags.lengths()
            rows = torch.arange(len(lengths), device=positions.device).repeat_interleave(lengths)
            gates = (temperature * self.c[positions]).sigmoid()
            sums = gates.new_zeros(len(lengths)).index_add(0, rows, gates)
            means[feature] = torch.where(lengths > 0, sums / lengths.clamp(min=1), 1.0)
        return means
