"""The training loop: one for every phase."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.datasets.utils import Batch
from tqdm import tqdm

from torchrec_fmp.distributed.ranks import Ranks
from torchrec_fmp.loggers.jsonl import MetricsLog


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite."""


class Steps(Protocol):
    """What else is learned in each step, beside the model: gates, say, and their penalty."""

    def loss_term(self, step: int) -> Tensor | None:
        """Called before the step's forward; what to add to the loss, if anything."""

    def update(self, step: int) -> None:
        """Called behind the step's backward."""


@dataclass(frozen=True)
class Progress:
    """What a phase took.

    Args:
        steps: number of them.
        samples: over all ranks.
        step_ms: median of a step without its wait for input, NaN without steps.
        seconds: wall time of the loop.
        input_share: share of it that was spent waiting for the reader.
    """

    steps: int
    samples: int
    step_ms: float
    seconds: float
    input_share: float


def total_progress(parts: Sequence[Progress]) -> Progress:
    """Of a phase that was trained in parts; `step_ms` is the mean of theirs, by steps."""
    steps = sum(part.steps for part in parts)
    seconds = sum(part.seconds for part in parts)
    trained = [part for part in parts if part.steps]
    waited = sum(part.input_share * part.seconds for part in parts)
    return Progress(
        steps=steps,
        samples=sum(part.samples for part in parts),
        step_ms=sum(part.step_ms * part.steps for part in trained) / steps if steps else math.nan,
        seconds=seconds,
        input_share=waited / seconds if seconds > 0 else 0.0,
    )


def train(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    *,
    phase: str,
    total: int,
    ranks: Ranks,
    log: MetricsLog,
    extra: Steps | None = None,
) -> Progress:
    """Trains on every batch once.

    Args:
        model: takes a batch, returns `(loss, (loss, logits, labels))`; its tables' optimizer is
            fused into the backward pass.
        optimizer: of the other parameters.
        batches: this rank's, the same number on every rank.
        phase: for the log and the progress bar.
        total: number of batches.
        ranks: the group.
        log: gets one line a logging interval, and one for what is left at the end.
        extra: what else learns in each step, as the gates do in pretraining.

    Raises:
        TrainingDiverged: if the loss is not finite; names phase and step.
    """
    model.train()
    step_seconds: list[float] = []
    samples = 0
    start = time.perf_counter()
    quiet = None if ranks.speaks else True
    for step, batch in enumerate(
        tqdm(batches, desc=phase, total=total, disable=quiet, leave=False)
    ):
        step_start = time.perf_counter()
        optimizer.zero_grad()
        # Before the forward: it also puts the gates into their state for this step.
        term = None if extra is None else extra.loss_term(step)
        loss, _ = model(batch.to(ranks.device))
        (loss if term is None else loss + term).backward()
        optimizer.step()
        if extra is not None:
            extra.update(step)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"the loss is {value} in step {step} of {phase} on rank {ranks.rank}: "
                "lower the learning rates, or check the data's dense columns"
            )
        end = time.perf_counter()
        step_seconds.append(end - step_start)
        samples += batch.labels.numel() * ranks.world_size
        log.step(phase, step, value, samples)
    log.flush()
    seconds = time.perf_counter() - start
    return Progress(
        steps=len(step_seconds),
        samples=samples,
        step_ms=1e3 * statistics.median(step_seconds) if step_seconds else math.nan,
        seconds=seconds,
        input_share=1 - sum(step_seconds) / seconds if seconds > 0 else 0.0,
    )
