"""`TrainConfig`: training in every phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchrec_fmp.data.columns import BadInput
from torchrec_fmp.strict import check_positive


@dataclass(frozen=True)
class TrainConfig:
    """Training in both phases, and of the reference model.

    Args:
        batch_size: rows a step on each rank, outside of pretraining.
        learning_rate: of Adam, for the dense parameters.
        embedding_learning_rate: of the tables' optimizer.
        embedding_optimizer: of the tables, fused into the backward pass. With `adam` they may be
            data-parallel, and on CPU, where FBGEMM has no fused Adam, they must be:
            `torch.optim.Adam` trains these, and moves rows that a batch does not read by their
            momentum, where the fused one leaves them alone.
        shuffle: permute row groups and the rows in them; otherwise the data's order is kept.
        bad_input: raise at values that cannot be trained on, or replace and count them.
        workers: threads that decode ahead; they do not change the order.
        log_interval: steps between two lines of metrics.jsonl.
    """

    batch_size: int = 1024
    learning_rate: float = 5e-3
    embedding_learning_rate: float = 2e-2
    embedding_optimizer: Literal["rowwise_adagrad", "adam"] = "rowwise_adagrad"
    shuffle: bool = False
    bad_input: BadInput = "raise"
    workers: int = 1
    log_interval: int = 20

    def __post_init__(self) -> None:
        check_positive(self, "train", "batch_size", "learning_rate", "embedding_learning_rate")
        check_positive(self, "train", "log_interval")
        if self.workers < 0:
            raise ValueError(f"train.workers is {self.workers}, it must be at least 0")
