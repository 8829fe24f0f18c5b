"""Early stopping: pretraining ends when the decision about every feature is stable."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Adam

from torchrec_fmp.gates.feature_gates import FeatureGates
from torchrec_fmp.gates.schedule import GateSchedule
from torchrec_fmp.gates.scores import by_feature, gate_scores
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.selection.feature_scores import FeatureScores

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StableDecision:
    """Ends pretraining once the policy's decision has not changed for some time.

    At each check the policy decides four times: from the gates; from each of two halves of the
    data; and from the gates with `log_alpha` extrapolated to the end of pretraining at its average
    rate since the penalty reached full strength. A half is a copy of every `log_alpha` that learns
    only from the gradients of every other step, at twice the rate, so that it moves as far. The
    decision is stable when all four decisions about every feature agree over `patience` consecutive
    checks. Without the extrapolation, gates that have had no time to close would agree that all
    features are kept.

    A check costs four decisions and no forward pass. Pretraining ends at the latest when its rows
    end.

    Args:
        checks: number of checks, evenly spaced over the steps with the full penalty.
        patience: number of consecutive checks that must agree.

    Raises:
        ValueError: if `patience` is below 1 or above `checks`.
    """

    checks: int = 20
    patience: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.patience <= self.checks:
            raise ValueError(
                f"patience is {self.patience}; it must be at least 1 and at most {self.checks}, "
                "the number of checks"
            )


class WatchedGates:
    """The gates' schedule, with regular checks of whether the policy's decision is stable.

    Args:
        stop: rule for ending pretraining.
        schedule: schedule of the gates.
        pretraining: pretraining whose policy decides.
        optimizer: optimizer of the gates.
        floor: number of steps before the penalty reaches full strength.
    """

    def __init__(
        self,
        stop: StableDecision,
        schedule: GateSchedule,
        pretraining: Pretraining,
        optimizer: Adam,
        floor: int,
    ) -> None:
        self._schedule = schedule
        self._pretraining = pretraining
        self._gates = pretraining.gates
        self._floor = floor
        self._at_floor = self._log_alphas()
        self._every = max(1, (pretraining.steps - floor) // stop.checks)
        self._halves = [Half(self._gates, optimizer) for _ in range(2)]
        # [check][opinion][feature]: whether the feature is kept. Each decision is an opinion.
        self._opinions: deque[list[list[bool]]] = deque(maxlen=stop.patience)
        self.is_stable = False

    def loss_term(self, step: int) -> Tensor:
        return self._schedule.loss_term(step)

    def update(self, step: int) -> None:
        """Steps the gates and one of the halves, and checks the decision when a check is due."""
        if not self._gates[0].is_open:
            self._halves[step % 2].step()
        self._schedule.update(step)
        past = step + 1 - self._floor
        if past == 0:
            self._at_floor = self._log_alphas()
        if past > 0 and past % self._every == 0:
            self._check(past)

    def confidence(self, scores: FeatureScores) -> dict[str, float]:
        """Feature -> the share of opinions in the last checks that match the gates' current one."""
        kept = self._opinion(scores)
        opinions = [opinion for check in self._opinions for opinion in check] or [kept]
        return {
            name: sum(opinion[i] == kept[i] for opinion in opinions) / len(opinions)
            for i, name in enumerate(scores.scores)
        }

    def _check(self, past: int) -> None:
        """Collects the opinions; the decision is stable if it is stable on every rank.

        Args:
            past: number of steps so far with the full penalty.
        """
        now = gate_scores(self._pretraining.job.model)
        others = [*(half.log_alphas for half in self._halves), self._at_the_end(past)]
        self._opinions.append(
            [self._opinion(now)]
            + [self._opinion(_rescored(now, self._gates, log_alphas)) for log_alphas in others]
        )
        all_there_are = [opinion for check in self._opinions for opinion in check]
        agree = all(opinion == all_there_are[0] for opinion in all_there_are)
        ranks = self._pretraining.ranks
        stable = torch.tensor(
            float(agree and len(self._opinions) == self._opinions.maxlen), device=ranks.device
        )
        dist.all_reduce(stable, dist.ReduceOp.MIN, group=ranks.group)
        self.is_stable = bool(stable)
        if self.is_stable and ranks.speaks:
            steps, all_steps = self._floor + past, self._pretraining.steps
            _logger.info(
                "the decision is stable after %d of %d pretraining steps (%d rows)",
                steps,
                all_steps,
                steps * self._pretraining.batch_size * ranks.world_size,
            )

    def _opinion(self, scores: FeatureScores) -> list[bool]:
        features = self._pretraining.decide(scores).features
        return [features[name].kept for name in scores.scores]

    def _log_alphas(self) -> list[Tensor]:
        return [module.log_alpha.detach().clone() for module in self._gates]

    def _at_the_end(self, past: int) -> list[Tensor]:
        """`log_alpha` extrapolated to the end of pretraining, at its mean rate since the floor."""
        ahead = (self._pretraining.steps - self._floor) / past
        return [
            torch.lerp(start, now, ahead).clamp_(*module.config.log_alpha_bounds)
            for start, now, module in zip(
                self._at_floor, self._log_alphas(), self._gates, strict=True
            )
        ]


class Half:
    """Copies of the gates' `log_alpha` that learn from a part of the steps.

    Args:
        gates: gates that provide the gradients.
        optimizer: optimizer of the gates; the half's own optimizer has the same settings and twice
            the learning rate.
    """

    def __init__(self, gates: Sequence[FeatureGates], optimizer: Adam) -> None:
        self._gates = gates
        self.log_alphas: list[Tensor] = [
            torch.nn.Parameter(module.log_alpha.detach().clone()) for module in gates
        ]
        settings = optimizer.defaults
        self._optimizer = Adam(self.log_alphas, **{**settings, "lr": 2 * settings["lr"]})

    @torch.no_grad()
    def step(self) -> None:
        """Steps by the gates' current gradients."""
        for log_alpha, module in zip(self.log_alphas, self._gates, strict=True):
            log_alpha.grad = module.log_alpha.grad
        self._optimizer.step()
        for log_alpha, module in zip(self.log_alphas, self._gates, strict=True):
            log_alpha.grad = None
            log_alpha.clamp_(*module.config.log_alpha_bounds)


@torch.no_grad()
def _rescored(
    scores: FeatureScores, gates: Sequence[FeatureGates], log_alphas: Sequence[Tensor]
) -> FeatureScores:
    """The scores of `gate_scores`, computed from `log_alphas` instead of the gates' `log_alpha`."""
    values = [
        module.config.distribution.deterministic(log_alpha)
        for log_alpha, module in zip(log_alphas, gates, strict=True)
    ]
    return replace(scores, scores=by_feature(gates, log_alphas), gates=by_feature(gates, values))


def warn_of_undecided(confidence: Mapping[str, float], speaks: bool) -> None:
    """Warns, on the rank that speaks, which features were undecided when pretraining ended."""
    undecided = {name: share for name, share in confidence.items() if share < 1}
    if speaks:
        listed: Sequence[str] = [f"{name} ({share:.2f})" for name, share in undecided.items()]
        _logger.warning(
            "pretraining reached its last row before the decision was stable; undecided features, "
            "each with the share of agreement in the last checks: %s",
            ", ".join(listed) or "none, but the checks agreed for too short a time",
        )
