"""The training loop, shared by all phases."""

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
    """Extra work in each training step, such as learning gates under their penalty."""

    def loss_term(self, step: int) -> Tensor | None:
        """Called before the step's forward; returns a term to add to the loss, or None."""

    def update(self, step: int) -> None:
        """Called after the step's backward."""


@dataclass(frozen=True)
class Progress:
    """Steps, samples and time of a phase.

    Args:
        steps: number of steps.
        samples: number of samples over all ranks.
        step_ms: median time of a step without its wait for input; NaN without steps.
        seconds: wall time of the loop.
        input_share: share of the wall time spent waiting for the reader.
    """

    steps: int
    samples: int
    step_ms: float
    seconds: float
    input_share: float


def total_progress(parts: Sequence[Progress]) -> Progress:
    """Progress of a phase trained in parts; `step_ms` is the parts' mean, weighted by steps."""
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
        model: model that takes a batch and returns `(loss, (loss, logits, labels))`; its tables'
            optimizer is fused into the backward pass.
        optimizer: optimizer of the other parameters.
        batches: this rank's batches; their number is the same on every rank.
        phase: name of the phase, for the log and the progress bar.
        total: number of batches.
        ranks: process group.
        log: log that receives one line per logging interval, and one for the remaining steps.
        extra: extra work in each step, such as learning the gates in pretraining.

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
        # Before the forward, because it also sets the gates' state for this step.
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
