"""Code shared by scorers that train additional parameters or examine the trained model.

Such parameters are outside of DistributedDataParallel, so their gradients are averaged over ranks
here to keep them equal on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec.datasets.utils import Batch

from torchrec_fmp.distributed.ranks import Ranks
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.probe import observed


def average(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The mean over ranks, in place. Collective."""
    dist.all_reduce(tensor, group=ranks.group)
    return tensor.div_(ranks.world_size)


def generator(seed: int, step: int, ranks: Ranks) -> torch.Generator:
    """A noise generator that depends only on (seed, step, rank), not on earlier draws."""
    state = np.random.SeedSequence((seed, step, ranks.rank)).generate_state(1, np.uint64)
    return torch.Generator(device=ranks.device).manual_seed(int(state[0] >> np.uint64(1)))


def gumbel(like: Tensor, seed: int, step: int, ranks: Ranks) -> Tensor:
    """Standard Gumbel noise in the shape of `like`, a function of (seed, step, rank)."""
    noise = generator(seed, step, ranks)
    exponential = torch.empty_like(like, requires_grad=False).exponential_(generator=noise)
    return -exponential.log()


def check_learning(learning_rate: float, every: int = 1) -> None:
    """Raises ValueError if the learning rate or interval of a scorer's parameters is invalid."""
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"the scorer's learning_rate is {learning_rate}; it must be positive")
    if every < 1:
        raise ValueError(f"every is {every}; it must be at least 1 step")


def check_batches(batches: int) -> int:
    """Returns a scorer's configured number of validation batches.

    Raises:
        ValueError: if it is below 1.
    """
    if batches < 1:
        raise ValueError(f"batches is {batches}; it must be at least 1")
    return batches


def validation_batches(pretraining: Pretraining, batches: int) -> Iterator[Batch]:
    """Up to `batches` batches on each rank that pretraining never reads.

    Raises:
        ValueError: if there are none.
    """
    rows = batches * pretraining.batch_size * pretraining.ranks.world_size
    count = 0
    for batch in pretraining.validation_batches(rows):
        count += 1
        yield batch
    if not count:
        raise ValueError(
            f"the rows after pretraining do not fill one batch of {pretraining.batch_size}, but "
            "the scorer needs rows that pretraining does not train on. Lower pretrain.batch_size "
            "or pretrain.fraction"
        )


class JointSteps:
    """Trains parameters on the model's loss, in the same step as the model.

    Args:
        pretraining: pretraining whose `train` calls this.
        parameters: parameters that are equal on every rank.
        optimizer: optimizer of the parameters.
        penalty: loss term that depends only on the parameters.
    """

    def __init__(
        self,
        pretraining: Pretraining,
        parameters: Sequence[nn.Parameter],
        optimizer: Optimizer,
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        self._ranks = pretraining.ranks
        self._parameters = parameters
        self._optimizer = optimizer
        self._penalty = penalty
        self.step = 0
        """Step number of the next forward."""

    def loss_term(self, step: int) -> Tensor | None:
        self.step = step
        return None if self._penalty is None else self._penalty()

    def update(self, step: int) -> None:
        for parameter in self._parameters:
            assert parameter.grad is not None
            average(parameter.grad, self._ranks)
        self._optimizer.step()
        self._optimizer.zero_grad()


class BilevelSteps:
    """Trains parameters on validation batches while the model learns from training batches.

    First-order DARTS, as ERASE and ShuffleGate train their gates: every `every` steps, after the
    model's step, the loss of a validation batch is differentiated with respect to the parameters.
    This reads as many validation rows as it needs; if there are fewer, it reads them again.

    Args:
        pretraining: pretraining whose `train` calls this.
        parameters: parameters that are equal on every rank.
        optimizer: optimizer of the parameters.
        every: number of model steps per step of the parameters.
        penalty: term of the validation loss that depends only on the parameters.
    """

    def __init__(
        self,
        pretraining: Pretraining,
        parameters: Sequence[nn.Parameter],
        optimizer: Optimizer,
        every: int,
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        self._pretraining = pretraining
        self._parameters = list(parameters)
        self._optimizer = optimizer
        self._every = every
        self._penalty = penalty
        self._batches = self._endless(-(-pretraining.steps // every))
        self.forwards = 0
        """Number of the next forward, validation forwards included; it determines the noise."""

    def loss_term(self, step: int) -> None:
        """Adds nothing: the penalty applies only to the validation loss."""

    def update(self, step: int) -> None:
        self.forwards += 1
        # The model's backward has left gradients on the parameters.
        self._optimizer.zero_grad()
        if step % self._every:
            return
        model = self._pretraining.job.model
        with observed(model):
            loss, _ = model(next(self._batches))
            if self._penalty is not None:
                loss = loss + self._penalty()
            gradients = torch.autograd.grad(loss, self._parameters)
        self.forwards += 1
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = average(gradient, self._pretraining.ranks)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _endless(self, count: int) -> Iterator[Batch]:
        while True:
            yield from validation_batches(self._pretraining, count)
