"""`TrainConfig`: training options of every phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchrec_fmp.data.columns import BadInput
from torchrec_fmp.strict import check_positive


@dataclass(frozen=True)
class TrainConfig:
    """Training options of both phases and of the reference model.

    Args:
        batch_size: rows per step on each rank, except in pretraining.
        learning_rate: learning rate of Adam for the dense parameters.
        embedding_learning_rate: learning rate of the tables' optimizer.
        embedding_optimizer: optimizer of the tables, fused into the backward pass. With `adam`,
            tables may be data-parallel; on CPU they must be, because FBGEMM has no fused Adam
            there. `torch.optim.Adam` trains data-parallel tables; it also moves rows that a batch
            does not read, by their momentum, while the fused Adam leaves them unchanged.
        shuffle: whether to permute row groups and their rows; otherwise the data's order is kept.
        bad_input: action for values that cannot be trained on: raise, or replace and count them.
        workers: number of threads that decode ahead; they do not change the order.
        log_interval: number of steps between two lines of metrics.jsonl.
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
            raise ValueError(f"train.workers is {self.workers}; it must be at least 0")
