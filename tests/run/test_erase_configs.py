"""Each ERASE configuration runs on what the command in its header prepares from raw files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_prepare_formats import AVAZU_HEADER, criteo_line
from tests.run.test_pipeline import this_rank
from tests.support.process_group import ProcessGroup
from torchrec_fmp.cli.__main__ import main
from torchrec_fmp.models.mlp import MlpBackbone
from torchrec_fmp.run.config import load_config
from torchrec_fmp.run.pipeline import Pipeline
from torchrec_fmp.run.result import result_of

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ["erase_movielens", "erase_criteo", "erase_avazu"]
ROWS = 1000
# Small batches, so that each phase has some steps on the smaller data.
SMALL = ["--train.batch_size", "64", "--pretrain.batch_size", "8"]


def write_movielens(directory: Path) -> None:
    users = [f"{i}::{'FM'[i % 2]}::{25 + i % 3}::{i % 5}::zip{i}" for i in range(50)]
    movies = [f"{i}::Film {i} (19{50 + i})::Drama|War" for i in range(20)]
    ratings = [f"{i // 20}::{i % 20}::{1 + i % 5}::{978300000 + i}" for i in range(ROWS)]
    (directory / "ml-1m").mkdir()
    for name, lines in (("users", users), ("movies", movies), ("ratings", ratings)):
        (directory / "ml-1m" / f"{name}.dat").write_text("\n".join(lines))


def write_criteo(directory: Path) -> None:
    lines = [
        criteo_line(i % 3 // 2, "" if i % 4 == 0 else str(i), f"{i % 7:x}") for i in range(ROWS)
    ]
    (directory / "train.txt").write_text("\n".join(lines))


def write_avazu(directory: Path) -> None:
    hours = [f"1410{21 + i // 300}{i % 24:02}" for i in range(ROWS)]
    lines = [f"{i},{i % 3 // 2},{hour}" + f",s{i % 9}" * 21 for i, hour in enumerate(hours)]
    (directory / "train.csv").write_text("\n".join([AVAZU_HEADER, *lines]))


def prepare_command(config: Path) -> list[str]:
    """The arguments in the configuration's header."""
    comment = "".join(re.findall(r"^# ?(.*\n)", config.read_text(), re.MULTILINE))
    (command,) = re.findall(r"torchrec-fmp (prepare (?:.*\\\n)*.*)\n", comment)
    return shlex.split(command.replace("\\\n", " "))


def run(config_path: str, directory: str) -> dict[str, Any]:
    data = ["--data.path", f"{directory}/data/{Path(config_path).stem}"]
    config, _ = load_config(config_path, [*SMALL, *data])
    ranks = this_rank()
    return result_of(Pipeline(config, ranks).run(), config, ranks)


@pytest.mark.parametrize(
    ("name", "write", "fields"),
    [
        ("erase_movielens", write_movielens, 9),
        ("erase_criteo", write_criteo, 39),
        ("erase_avazu", write_avazu, 22),
    ],
)
def test_the_configuration_runs_on_what_its_command_prepares(
    ranks_1: ProcessGroup,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[Path], None],
    fields: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    config = CONFIGS / f"{name}.yaml"
    assert main(prepare_command(config)) == 0
    (result,) = ranks_1.run(run, str(config), str(tmp_path))
    assert result["features_total"] == fields
    assert result["samples"]["pretrain"] + result["samples"]["continue"] >= 600
    assert set(result["metrics"]) == {"full", "pruned", "final"}
    assert all(0 <= metrics["auc"] <= 1 for metrics in result["metrics"].values())


@pytest.mark.parametrize("name", NAMES)
def test_the_docs_give_the_command_of_the_configuration(name: str) -> None:
    docs = (CONFIGS.parent / "docs" / "erase.md").read_text()
    assert shlex.join(["torchrec-fmp", *prepare_command(CONFIGS / f"{name}.yaml")]) in docs


@pytest.mark.parametrize("name", NAMES)
def test_the_protocol_is_erases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data" / name / "schema.json").write_text(
        '{"label": "y", "dense": [], "sparse": [{"name": "a", "num_embeddings": 2}]}'
    )
    config, _ = load_config(str(CONFIGS / f"{name}.yaml"))
    train, model = config.train, config.model
    assert (train.batch_size, train.shuffle, train.embedding_optimizer) == (4096, True, "adam")
    assert (train.learning_rate, train.embedding_learning_rate) == (1e-3, 1e-3)
    assert isinstance(model, MlpBackbone)
    assert (model.embedding_dim, model.layers, model.dropout) == (8, (16, 16), 0.2)
    assert config.reference
