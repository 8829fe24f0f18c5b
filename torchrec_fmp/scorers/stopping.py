"""How much data is enough: pretraining ends when the decision about every feature is stable."""

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
    """Ends pretraining once the policy's decision has been the same for a while.

    At each check the policy is asked four times: by the gates; by two halves of the data; and by
    the gates as they will be when the rows of pretraining end, if they go on at their mean pace
    since the price is full. A half is a copy of every `log_alpha` that learns from the gradients of
    every other step alone, at twice the rate, so that it travels as far. The decision is stable
    when the opinions about every feature are the same over `patience` checks in a row. Without the
    fourth one, gates that have had no time to close would agree that all features stay.

    A check costs four decisions and no forward pass. Pretraining ends with its rows at the latest.

    Args:
        checks: evenly over the steps with the full price.
        patience: checks that have to agree.

    Raises:
        ValueError: if they could never agree.
    """

    checks: int = 20
    patience: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.patience <= self.checks:
            raise ValueError(
                f"patience is {self.patience}, it must be at least 1 and at most the "
                f"{self.checks} checks"
            )


class WatchedGates:
    """The gates' schedule, with a watch over what is decided by them.

    Args:
        stop: when to end.
        schedule: of the gates.
        pretraining: whose policy decides.
        optimizer: of the gates.
        floor: steps before the price is full.
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
        # Of each check and opinion, whether each feature stays.
        self._opinions: deque[list[list[bool]]] = deque(maxlen=stop.patience)
        self.is_stable = False

    def loss_term(self, step: int) -> Tensor:
        return self._schedule.loss_term(step)

    def update(self, step: int) -> None:
        """Steps the gates and one of the halves, and checks where it is time to."""
        if not self._gates[0].is_open:
            self._halves[step % 2].step()
        self._schedule.update(step)
        past = step + 1 - self._floor
        if past == 0:
            self._at_floor = self._log_alphas()
        if past > 0 and past % self._every == 0:
            self._check(past)

    def confidence(self, scores: FeatureScores) -> dict[str, float]:
        """Feature -> the share of the opinions of the last checks that are the gates' now."""
        kept = self._opinion(scores)
        opinions = [opinion for check in self._opinions for opinion in check] or [kept]
        return {
            name: sum(opinion[i] == kept[i] for opinion in opinions) / len(opinions)
            for i, name in enumerate(scores.scores)
        }

    def _check(self, past: int) -> None:
        """Asks for the opinions, and whether all ranks hold the decision for stable.

        Args:
            past: steps with the full price.
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
                "the decision is stable after %d of %d steps of pretraining, %d rows",
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
        """`log_alpha` at the end of pretraining's rows, if it goes on as since the floor."""
        ahead = (self._pretraining.steps - self._floor) / past
        return [
            torch.lerp(start, now, ahead).clamp_(*module.config.log_alpha_bounds)
            for start, now, module in zip(
                self._at_floor, self._log_alphas(), self._gates, strict=True
            )
        ]


class Half:
    """Copies of the gates' `log_alpha` that learn from some of the steps.

    Args:
        gates: whose gradients it learns from.
        optimizer: of the gates; a half has another of its settings and twice its rate.
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
        """Steps by the gradients that the gates have now."""
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
    """Those of `gate_scores`, by other `log_alpha` than the gates have."""
    values = [
        module.config.distribution.deterministic(log_alpha)
        for log_alpha, module in zip(log_alphas, gates, strict=True)
    ]
    return replace(scores, scores=by_feature(gates, log_alphas), gates=by_feature(gates, values))


def warn_of_undecided(confidence: Mapping[str, float], speaks: bool) -> None:
    """Says which features pretraining was too short for."""
    undecided = {name: share for name, share in confidence.items() if share < 1}
    if speaks:
        listed: Sequence[str] = [f"{name} ({share:.2f})" for name, share in undecided.items()]
        _logger.warning(
            "the rows of pretraining ended before the decision was stable; features and how far "
            "the last checks agree on them: %s",
            ", ".join(listed) or "all agree, but not for long enough",
        )
