"""A run with several prunes, and training in between."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import get_unwrapped_module

from tests.run.test_pipeline import this_rank
from tests.support.process_group import ProcessGroup
from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.gates.penalty import TargetPenalty
from torchrec_fmp.run.config import load_config
from torchrec_fmp.run.directory import RunDirectory
from torchrec_fmp.run.pipeline import Pipeline
from torchrec_fmp.run.result import result_of
from torchrec_fmp.scorers.hard_concrete import HardConcreteScorer
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.schedules.gradual import Gradual
from torchrec_fmp.selection.selection import Selection
from torchrec_fmp.strict import ConfigError
from torchrec_fmp.training.job import Job

HALF = {"class_path": "TopFraction", "init_args": {"fraction": 0.5}}


def config_with(directory: Path, ranks: ProcessGroup, prunes: int, **settings: Any) -> str:
    schedule = {"class_path": "Gradual", "init_args": {"prunes": prunes}}
    base = {
        "schedule": schedule,
        "policy": HALF,
        "pretrain__batch_size": 32 // ranks.world_size,
        # 9 features: 3 signals, one of them dense, 2 copies, 4 of noise.
        "data__init_args__copies": 2,
    }
    return write_config(directory, tiny(**{**base, **settings}))


class Watched(Pipeline):
    """Records the jobs that each phase begins with, and the rows that are read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gated: list[list[str]] = []
        self.spans: list[tuple[int, int]] = []

    def _pretraining(self, job: Job, number: int = 1) -> Pretraining:
        names = [name for _, module in feature_gates(job.model) for name in module.features]
        self.gated.append(names)
        assert set(names) == {*job.schema.sparse_names, *job.schema.dense}
        first = self.state.rows["pretrain"]
        pretraining = super()._pretraining(job, number)
        read = pretraining._rows.read

        def noted(start: int, stop: int) -> Iterator[Batch]:
            self.spans.append((first + start, first + stop))
            yield from read(start, stop)

        pretraining._rows = replace(pretraining._rows, read=noted)
        return pretraining

    def _train(self, job: Job, phase: Any, rows: Any, extra: Any = None) -> None:
        if phase == "continue":
            assert not any(feature_gates(job.model))
            leftover = [type(m) for m in get_unwrapped_module(job.model).modules()]
            assert not any("torchrec_fmp.gates" in kind.__module__ for kind in leftover)
            self.spans.append((rows[0].start, rows[0].reader.rows))
        super()._train(job, phase, rows, extra)


def figures(config_path: str, directory: str) -> tuple[Any, ...]:
    """Result, digest of the selection, gated features, rows that are read, and parities."""
    config, _ = load_config(config_path)
    ranks = this_rank()
    pipeline = Watched(config, ranks, RunDirectory(directory, writes=ranks.speaks))
    outcome = pipeline.run()
    result = result_of(outcome, config, ranks)
    parities = [manifest["parity_max_abs"] for manifest in outcome.state.manifests]
    return result, outcome.selection.digest(), pipeline.gated, pipeline.spans, parities


def test_a_run_prunes_in_several_steps_down_to_the_policys_selection(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    config = config_with(tmp_path, run_ranks, 3)
    out = tmp_path / "out"
    out.mkdir()
    outcomes = run_ranks.run(figures, config, str(out))
    assert len({digest for _, digest, *_ in outcomes}) == 1
    result, _, gated, spans, parities = outcomes[0]
    names = ["selection-1.json", "selection-2.json", "selection.json"]
    decided = [Selection.load(str(out / name)) for name in names]
    total = len(decided[0].features)
    assert total == result["features_total"] == 9
    # 9 * 0.5 rounds to 4, and 9 * (4 / 9) ** (1 / 3) = 6.9.
    assert [len(selection.kept) for selection in decided] == [7, 6, 4]
    assert [set(names) for names in gated] == [
        set(decided[0].features),
        set(decided[0].kept),
        set(decided[1].kept),
    ]
    for before, after in zip(decided, decided[1:], strict=False):
        assert set(after.kept) < set(before.kept)
        assert all(after.features[name] == before.features[name] for name in before.dropped)
    assert (result["kept"], result["dropped"]) == (decided[2].kept, decided[2].dropped)
    assert {"main_0", "main_1"} <= set(result["kept"])
    # Relative to the largest logit it is within 1e-6; otherwise the prune would be refused.
    assert all(0 <= parity <= 1e-5 for parity in parities)
    assert result["parity_max_abs"] == max(parities)
    manifests = [read(out / f"manifest{part}.json") for part in ("-1", "-2", "")]
    assert [set(m["dropped"]) for m in manifests] == [
        set(decided[0].dropped),
        set(decided[1].dropped) - set(decided[0].dropped),
        set(decided[2].dropped) - set(decided[1].dropped),
    ]
    for before, after in zip(manifests, manifests[1:], strict=False):
        for figure in ("table_bytes", "parameters", "tables"):
            assert before[figure]["after"] == after[figure]["before"]
    assert result["bytes"] == {
        "before": manifests[0]["table_bytes"]["before"],
        "after": manifests[2]["table_bytes"]["after"],
    }
    # A third of the 156 batches of 32 for each prune; the other rows are trained on later.
    rows = 32 // run_ranks.world_size * 52
    assert spans[:3] == [(0, rows), (rows, 2 * rows), (2 * rows, 3 * rows)]
    assert spans[3][0] == 3 * rows
    assert result["samples"]["pretrain"] == 156 * 32
    assert result["metrics"]["final"]["auc"] > 0.85


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_a_single_gradual_prune_equals_one_shot(ranks_1: ProcessGroup, tmp_path: Path) -> None:
    outcomes = []
    for schedule in (
        {"class_path": "OneShot"},
        {"class_path": "Gradual", "init_args": {"prunes": 1}},
    ):
        path = config_with(tmp_path, ranks_1, 1, schedule=schedule)
        ((result, digest, *_),) = ranks_1.run(figures, path, str(tmp_path))
        outcomes.append((result["metrics"], digest))
    assert outcomes[0] == outcomes[1]
    assert not list(tmp_path.glob("*-1.json"))


class Noting(HardConcreteScorer):
    """Records the target of each prune, and the share of all costs left before it."""

    def __init__(self, scorer: HardConcreteScorer) -> None:
        super().__init__(scorer.penalty, scorer.learning_rate, scorer.open_fraction)
        self.targets: list[float] = []
        self.left: list[float] = []

    def score(self, pretraining: Pretraining) -> FeatureScores:
        penalty = self.penalty.priced(pretraining.costs, pretraining.share)
        assert isinstance(penalty, TargetPenalty) and penalty.costs is not None
        assert penalty.start().multipliers == (0.0, 0.0)
        names = [name for module in pretraining.gates for name in module.features]
        left = sum(penalty.costs.get(name, 0.0) for name in names)
        self.targets.append(penalty.keep)
        self.left.append(left / sum(penalty.costs.values()))
        return super().score(pretraining)


def targets(config_path: str) -> tuple[list[float], list[float], list[int]]:
    """Of each prune: target, share of all costs left before it, and number of features after it."""
    config, _ = load_config(config_path)
    assert isinstance(config.scorer, HardConcreteScorer)
    scorer = Noting(config.scorer)
    outcome = Pipeline(replace(config, scorer=scorer), this_rank()).run()
    return scorer.targets, scorer.left, [len(s.kept) for s in outcome.state.selections]


def target(unit: str) -> dict[str, Any]:
    settings = {"keep": 0.5, "unit": unit, "learning_rate": 0.02}
    return {"class_path": "TargetPenalty", "init_args": settings}


def test_the_target_of_each_prune_is_a_share_of_all_features(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    path = config_with(tmp_path, run_ranks, 2, scorer__init_args__penalty=target("features"))
    for found, left, kept in run_ranks.run(targets, path):
        assert found == pytest.approx([0.5**0.5, 0.5])
        assert left == pytest.approx([1.0, 6 / 9])
        assert kept == [6, 4]


def test_a_target_in_bytes_is_a_share_of_the_first_models_bytes(
    ranks_2: ProcessGroup, tmp_path: Path
) -> None:
    budget = {"class_path": "TopBudget", "init_args": {"keep": 0.5, "unit": "bytes"}}
    penalty = target("bytes")
    path = config_with(tmp_path, ranks_2, 2, scorer__init_args__penalty=penalty, policy=budget)
    for found, left, kept in ranks_2.run(targets, path):
        assert found == pytest.approx([0.5**0.5, 0.5])
        assert left[0] == pytest.approx(1.0) and 0.5 <= left[1] < 1
        assert kept[1] < kept[0] < 9


def prunes_twice_and_learns(config_path: str) -> bool:
    config, _ = load_config(config_path)
    outcome = Pipeline(config, this_rank()).run()
    return len(outcome.state.manifests) == 2 and outcome.metrics["final"].auc > 0.8


def test_dense_optimizer_tables_are_pruned_in_several_steps(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    settings = {
        "train__embedding_optimizer": "adam",
        "train__embedding_learning_rate": 5e-3,
        "planner__sharding_types": ["data_parallel"],
    }
    path = config_with(tmp_path, run_ranks, 2, **settings)
    assert all(run_ranks.run(prunes_twice_and_learns, path))


def test_training_may_continue_from_new_weights_after_the_last_prune(
    ranks_1: ProcessGroup, tmp_path: Path
) -> None:
    path = config_with(tmp_path, ranks_1, 2, continuation={"start": "reinitialized"})
    assert ranks_1.run(prunes_twice_and_learns, path) == [True]


def test_rewinding_is_refused_with_several_prunes(ranks_1: ProcessGroup, tmp_path: Path) -> None:
    path = config_with(tmp_path, ranks_1, 2, continuation={"start": "rewound"})
    with pytest.raises(ConfigError, match="rewound and the schedule has 2 prunes: .* OneShot"):
        load_config(path)
    load_config(config_with(tmp_path, ranks_1, 1, continuation={"start": "rewound"}))


def too_few(config_path: str) -> str:
    config, _ = load_config(config_path)
    with pytest.raises(ValueError) as error:
        Pipeline(config, this_rank())
    return str(error.value)


def test_too_few_rows_for_each_prune_are_refused_before_anything_is_trained(
    ranks_1: ProcessGroup, tmp_path: Path
) -> None:
    path = config_with(tmp_path, ranks_1, 200)
    (message,) = ranks_1.run(too_few, path)
    assert "a batch of 32 on each of 1 ranks for each of 200 prunes" in message


def test_a_schedule_is_named_by_its_class_alone(ranks_1: ProcessGroup, tmp_path: Path) -> None:
    config, composed = load_config(config_with(tmp_path, ranks_1, 3))
    assert isinstance(config.schedule, Gradual) and config.schedule.prunes == 3
    assert "class_path: Gradual\n" in composed
    with pytest.raises(ConfigError, match="Did you mean 'Gradual'"):
        load_config(config_with(tmp_path, ranks_1, 3, schedule={"class_path": "Gradul"}))
