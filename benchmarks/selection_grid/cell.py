"""One cell: a data set, a backbone, a scorer and a seed, at every kept fraction.

The features are scored once. For each fraction a run of its own is then brought to where the
scoring left the model, and prunes and continues from there.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from torchrec_fmp.data.reader import Reader
from torchrec_fmp.distributed.ranks import Ranks, process_group
from torchrec_fmp.loggers.jsonl import MetricsLog
from torchrec_fmp.models.backbone import table_name
from torchrec_fmp.planning.planner import make_planner
from torchrec_fmp.run.config import RunConfig, load_config
from torchrec_fmp.run.outcome import Outcome
from torchrec_fmp.run.pipeline import Pipeline
from torchrec_fmp.selection.policies.top_fraction import TopFraction
from torchrec_fmp.training.job import build_job
from torchrec_fmp.training.metrics import evaluate
from torchrec_fmp.training.train import train

from .data import planted
from .scored_once import ScoredOnce, shards_of
from .settings import STRONG

FULL = "full"


@dataclass(frozen=True)
class Cell:
    """What is run in one process.

    Args:
        data: name of the data set.
        prepared: its directory.
        backbone: name of the backbone.
        scorer: name of the scorer; `FULL` trains the unpruned model on all rows once.
        seed: of the run.
        fractions: of the features to keep, each pruned from the same scores.
        config: the sections of the run's YAML, without `data` and `seed`.
    """

    data: str
    prepared: Path
    backbone: str
    scorer: str
    seed: int
    fractions: tuple[float, ...]
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.data}-{self.backbone}-{self.scorer}-{self.seed}"

    @property
    def digest(self) -> str:
        """Equal for cells that differ in nothing but the seed, wherever their data lie."""
        text = json.dumps([self.data, self.fractions, self.config], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Row:
    """The measurements at one kept fraction; those of the full model at 1.

    Args:
        auc: AUC of the final model on the test split; logloss and ne likewise.
        pruned_auc: AUC before continued training; pruned_logloss and pruned_ne likewise.
        selection_seconds: wall time of choosing rows, pretraining and scoring; no seconds contain
            the evaluation.
        prune_seconds: wall time of the prune.
        continue_seconds: wall time of the training after it, or of the full model.
        selection_samples: rows that were trained on until the features were scored.
        selection_forwards: rows that went through the model for it, in training or not.
        continue_samples: rows that were trained on afterwards.
        table_bytes_before: weights of all tables.
        table_bytes_after: of those that stay.
        kept: JSON list of the features that stay.
        scores: JSON object, feature -> score.
        parity_max_abs: of the logits before and after the prune.
        signal_precision: planted signals that are `STRONG`, as a share of the features that stay.
        signal_recall: the share of the `STRONG` signals that stays.
        noise_dropped: the share of the planted noise that goes.
        jobs: cells that ran at the same time; timings are honest with 1.
        commit: of the code.
        config_digest: of `Cell.digest`.
    """

    data: str
    backbone: str
    scorer: str
    seed: int
    fraction: float
    auc: float
    logloss: float
    ne: float
    pruned_auc: float | None
    pruned_logloss: float | None
    pruned_ne: float | None
    selection_seconds: float
    prune_seconds: float
    continue_seconds: float
    selection_samples: int
    selection_forwards: int
    continue_samples: int
    features_total: int
    features_kept: int
    table_bytes_before: int
    table_bytes_after: int
    kept: str
    scores: str
    parity_max_abs: float | None
    signal_precision: float | None
    signal_recall: float | None
    noise_dropped: float | None
    device: str
    threads: int
    jobs: int
    commit: str
    config_digest: str


def run_cell(cell: Cell, jobs: int, commit: str) -> list[Row]:
    """The rows of a cell, in a process group of one rank."""
    config = load(cell)
    with process_group() as ranks:
        where: dict[str, Any] = {
            "data": cell.data,
            "backbone": cell.backbone,
            "scorer": cell.scorer,
            "seed": cell.seed,
            "device": ranks.device.type,
            "threads": torch.get_num_threads(),
            "jobs": jobs,
            "commit": commit,
            "config_digest": cell.digest,
        }
        measured = full(config, ranks) if cell.scorer == FULL else pruned(cell, config, ranks)
        truth = planted(cell.prepared)
        return [Row(**where, **figures, **_found(figures["kept"], truth)) for figures in measured]


def load(cell: Cell) -> RunConfig:
    """The run's configuration, read as any user's.

    Raises:
        ConfigError: if it cannot be used.
    """
    data = {"class_path": "PreparedDataset", "init_args": {"path": str(cell.prepared)}}
    content = {**cell.config, "data": data, "seed": cell.seed}
    with tempfile.NamedTemporaryFile("w", prefix=f"{cell.name}-", suffix=".yaml") as file:
        # A round trip makes lists of tuples, which safe YAML does not have.
        yaml.safe_dump(json.loads(json.dumps(content)), file)
        file.flush()
        config, _ = load_config(file.name)
    return config


def pruned(cell: Cell, config: RunConfig, ranks: Ranks) -> Iterator[dict[str, Any]]:
    """The figures of a run at each fraction."""
    scorer = ScoredOnce(config.scorer, len(cell.fractions))
    seconds: float | None = None
    for fraction in cell.fractions:
        run = replace(config, scorer=scorer, policy=TopFraction(fraction))
        outcome = Pipeline(run, ranks).run()
        if seconds is None:
            # Only the first run has scored.
            seconds = outcome.seconds["pretrain"] - scorer.copy_seconds
        yield {**_figures(fraction, outcome, scorer), "selection_seconds": seconds}


def _figures(fraction: float, outcome: Outcome, scorer: ScoredOnce) -> dict[str, Any]:
    selection = outcome.selection
    before = {f"pruned_{name}": value for name, value in asdict(outcome.metrics["pruned"]).items()}
    return {
        "fraction": fraction,
        **asdict(outcome.metrics["final"]),
        **before,
        "prune_seconds": outcome.seconds["prune"],
        "continue_seconds": outcome.seconds["continue"],
        "selection_samples": scorer.trained_rows,
        "selection_forwards": scorer.forward_rows,
        "continue_samples": outcome.progress["continue"].samples,
        "features_total": len(selection.features),
        "features_kept": len(selection.kept),
        "table_bytes_before": outcome.table_bytes[0],
        "table_bytes_after": outcome.table_bytes[1],
        "kept": json.dumps(selection.kept),
        "scores": json.dumps({name: d.score for name, d in selection.features.items()}),
        "parity_max_abs": outcome.parity_max_abs,
    }


def full(config: RunConfig, ranks: Ranks) -> list[dict[str, Any]]:
    """The figures of the unpruned model, trained without gates on all rows once."""
    settings, schema = config.train, config.data.schema
    names = [table_name(name) for name in schema.sparse_names]
    planner = make_planner(config.planner, names, settings.batch_size, ranks.device.type)
    train_reader, test_reader = (
        Reader(
            config.data.source(split),
            schema,
            seed=config.seed,
            shuffle=settings.shuffle and split == "train",
            bad_input=settings.bad_input,
            workers=settings.workers,
        )
        for split in ("train", "test")
    )
    job = build_job(config.model, schema, settings, config.seed, ranks=ranks, planner=planner)
    start = time.perf_counter()
    progress = train(
        job.model,
        job.optimizer,
        train_reader.batches(settings.batch_size),
        phase=FULL,
        total=train_reader.rows // settings.batch_size,
        ranks=ranks,
        log=MetricsLog(None, settings.log_interval),
    )
    seconds = time.perf_counter() - start
    metrics = evaluate(job.model, test_reader.padded_batches(settings.batch_size), ranks)
    table_bytes = sum(shard.weight.nbytes for shard in shards_of(job, ranks))
    return [
        {
            "fraction": 1.0,
            **asdict(metrics),
            **dict.fromkeys(("pruned_auc", "pruned_logloss", "pruned_ne", "parity_max_abs")),
            **dict.fromkeys(("selection_seconds", "prune_seconds"), 0.0),
            "continue_seconds": seconds,
            **dict.fromkeys(("selection_samples", "selection_forwards"), 0),
            "continue_samples": progress.samples,
            "features_total": len(schema.features),
            "features_kept": len(schema.features),
            "table_bytes_before": table_bytes,
            "table_bytes_after": table_bytes,
            "kept": json.dumps(schema.features),
            "scores": "{}",
        }
    ]


def _found(kept: str, truth: Mapping[str, Any] | None) -> dict[str, Any]:
    """How much of the planted truth a selection found."""
    if truth is None:
        return dict.fromkeys(("signal_precision", "signal_recall", "noise_dropped"))
    stays = set(json.loads(kept))
    strong = {name for name, worth in truth["contributions"].items() if worth > STRONG}
    noise = set(truth["noise"])
    return {
        "signal_precision": len(strong & stays) / len(stays),
        "signal_recall": len(strong & stays) / len(strong) if strong else None,
        "noise_dropped": len(noise - stays) / len(noise) if noise else None,
    }
