"""The same run with several seeds, one after the other in one process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from tqdm import tqdm

from torchrec_fmp.distributed.ranks import Ranks
from torchrec_fmp.run.config import RunConfig
from torchrec_fmp.run.pipeline import Pipeline
from torchrec_fmp.run.stability import SeedRun
from torchrec_fmp.training.metrics import Predictions

# The pruned model before continued training is not yet a result to rely on.
_COMPARED = ("full", "final")


def run_seeds(
    configuration: Callable[[int], RunConfig], seeds: Sequence[int], ranks: Ranks
) -> tuple[list[SeedRun], Tensor]:
    """Runs the whole pipeline with each seed. Collective.

    At the end, rank 0 holds 8 bytes per seed and test row: the logits of two models.

    Args:
        configuration: function from a seed to a new configuration, because penalties keep state.
        seeds: seeds of the runs, at least one.
        ranks: process group.

    Returns:
        The runs, whose logits are on rank 0 only, and the (N,) labels of the test rows.

    Raises:
        ValueError: if there are too few rows, or rows that cannot be trained on.
        RuntimeError: if training diverges or a prune is refused; see `Pipeline.run`.
    """
    quiet = None if ranks.speaks else True
    runs = []
    for seed in tqdm(seeds, desc="seeds", disable=quiet, leave=False):
        run, labels = _run_seed(configuration(seed), ranks)
        runs.append(run)
    return runs, labels


def _run_seed(config: RunConfig, ranks: Ranks) -> tuple[SeedRun, Tensor]:
    logits: dict[str, Tensor] = {}
    labels: list[Tensor] = []

    def collect(name: str, predictions: Predictions) -> None:
        labels.append(predictions.labels)
        if ranks.speaks and name in _COMPARED:
            logits[name] = predictions.logits

    outcome = Pipeline(config, ranks, on_predictions=collect).run()
    return SeedRun(config.seed, outcome.selection, outcome.metrics, logits), labels[0]
