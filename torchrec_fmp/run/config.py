"""The configuration of a run, composed of the dataclasses of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torchrec_fmp import data, gates, models, scorers
from torchrec_fmp.data.dataset import Dataset
from torchrec_fmp.data.subset import Random, Subset
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.penalty import Penalty
from torchrec_fmp.models.backbone import Backbone
from torchrec_fmp.planning.planner import PlannerConfig
from torchrec_fmp.planning.replan import Replan
from torchrec_fmp.reshard.reshard import MoveConfig
from torchrec_fmp.run.continuation import ContinuationConfig
from torchrec_fmp.run.former_names import FORMER_MODULES
from torchrec_fmp.scorers.hard_concrete import HardConcreteScorer
from torchrec_fmp.scorers.scorer import Scorer
from torchrec_fmp.selection import policies, schedules
from torchrec_fmp.selection.policies.best_size import BestSize
from torchrec_fmp.selection.policies.closed_gates import ClosedGates
from torchrec_fmp.selection.policies.policy import Policy
from torchrec_fmp.selection.schedules.one_shot import OneShot
from torchrec_fmp.selection.schedules.schedule import Schedule
from torchrec_fmp.strict import Loader, check_positive
from torchrec_fmp.training.train_config import TrainConfig


@dataclass(frozen=True)
class PretrainConfig:
    """The phase that scores features, on a part of the data.

    Args:
        fraction: fraction of the training rows; unused if `samples` is given.
        samples: number of training rows over all ranks, rounded down to whole batches on every
            rank.
        batch_size: rows per step on each rank; by default as in training. Smaller batches move the
            gates further on the same rows, and take longer.
        subset: rule that chooses the rows; the others are for continued training.
    """

    fraction: float = 0.2
    samples: int | None = None
    batch_size: int | None = None
    subset: Subset = field(default_factory=Random)

    def __post_init__(self) -> None:
        check_positive(self, "pretrain", "fraction")
        if self.fraction > 1:
            raise ValueError(f"pretrain.fraction is {self.fraction}; it must be at most 1")
        for name in ("samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"pretrain.{name} is {value}; it must be at least 1")

    def rows_of(self, rows: int) -> int:
        """Number of pretraining rows among `rows` training rows."""
        return int(self.fraction * rows) if self.samples is None else self.samples


@dataclass(frozen=True)
class RunConfig:
    """Configuration of a whole run.

    Args:
        data: data set.
        model: backbone.
        gates: initial values and noise of the gates.
        pretrain: rows that features are scored on.
        scorer: method that scores features; by default, gates that are trained with the model.
        policy: rule that decides which features are dropped.
        schedule: number of prunes: one, or several with training in between.
        parity_tolerance: largest difference allowed between gated and pruned logits.
        train: training options of both phases.
        planner: options that TorchRec's planner may choose from.
        replan: whether surviving tables move to the planner's new plan; see `prune`.
        move: settings for moving tables.
        continuation: state that training continues from after the prune.
        reference: whether to train the full model too, on all rows in their own order.
        seed: seed of weights, shuffling and, added to gates.seed, gate noise.
    """

    data: Dataset
    model: Backbone
    gates: GateConfig = field(default_factory=GateConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    scorer: Scorer = field(default_factory=HardConcreteScorer)
    policy: Policy = field(default_factory=ClosedGates)
    schedule: Schedule = field(default_factory=OneShot)
    parity_tolerance: float = 1e-6
    train: TrainConfig = field(default_factory=TrainConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    replan: Replan = "auto"
    move: MoveConfig = field(default_factory=MoveConfig)
    continuation: ContinuationConfig = field(default_factory=ContinuationConfig)
    reference: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.parity_tolerance >= 0:
            raise ValueError(f"parity_tolerance is {self.parity_tolerance}; it must be at least 0")
        if self.planner.replicates and self.train.embedding_optimizer != "adam":
            raise ValueError(
                "data_parallel tables train with the dense optimizer, which is Adam in a run. Its "
                f"states differ from those of {self.train.embedding_optimizer}, so tables could "
                "not move to or from other sharding types when the model is planned again. Set "
                "train.embedding_optimizer to adam, or choose other planner.sharding_types"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")
        stops = isinstance(self.scorer, HardConcreteScorer) and self.scorer.stop is not None
        if stops and isinstance(self.policy, BestSize):
            raise ValueError(
                "policy BestSize decides by validation losses, which are measured after "
                "pretraining has ended, but scorer.stop ends pretraining when the decision is "
                "stable: remove one of them"
            )
        if self.continuation.start == "rewound" and self.schedule.prunes > 1:
            raise ValueError(
                f"continuation.start is rewound and the schedule has {self.schedule.prunes} "
                "prunes: the weights of an early step belong to a model before the last prune. Use "
                "start: carried or reinitialized, or the schedule OneShot"
            )

    @property
    def pretrain_batch_size(self) -> int:
        """Rows per pretraining step on each rank."""
        return self.pretrain.batch_size or self.train.batch_size


def load_config(path: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, str]:
    """Reads a run's YAML file and applies overrides; see `Loader.load`."""
    return _LOADER.load(path, overrides)


_LOADER = Loader(
    RunConfig,
    "torchrec-fmp run",
    packages=(data, gates, models, policies, schedules, scorers),
    bases=(Dataset, Subset, Backbone, Penalty, Policy, Schedule, Scorer),
    defaults={
        "policy": ClosedGates,
        "pretrain.subset": Random,
        "schedule": OneShot,
        "scorer": HardConcreteScorer,
    },
    former=FORMER_MODULES,
)
