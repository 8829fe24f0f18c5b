"""The command line: exit statuses, one-line errors, and the path from raw files to a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.tiny_run import TINY, tiny, write_config
from torchrec_fmp.cli import doctor
from torchrec_fmp.cli.__main__ import main
from torchrec_fmp.data.dataset import Dataset
from torchrec_fmp.data.synthetic import SyntheticDataset

ROOT = Path(__file__).parents[2]
DATA = SyntheticDataset(**TINY["data"]["init_args"])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("torchrec-fmp: ")
    return str(line)


def rows(data: Dataset, split: str) -> pa.Table:
    source = data.source("train" if split == "train" else "test")
    return pa.concat_tables([source.read(group) for group in source.row_groups])


def parquet_data(directory: Path, train: pa.Table, **columns: int) -> dict[str, Any]:
    """Writes both splits and returns the section of the configuration that reads them."""
    for name, table in (("train", train), ("test", rows(DATA, "test"))):
        pq.write_table(table, directory / f"{name}.parquet")
    sparse = {column.name: column.num_embeddings for column in DATA.schema.sparse}
    return {
        "class_path": "torchrec_fmp.data.parquet.ParquetDataset",
        "init_args": {
            "train": [str(directory / "train.parquet")],
            "test": [str(directory / "test.parquet")],
            "label": DATA.schema.label,
            "dense": list(DATA.schema.dense),
            "sparse": sparse | columns,
        },
    }


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        ({"train__batchsize": 8}, [], r"Did you mean 'train\.batch_size'\?"),
        ({"data__init_args__rwos": 8}, [], "'rwos' is not accepted. Did you mean 'rows'"),
        ({}, ["--train.batchsize", "8"], r"Did you mean 'train\.batch_size'\?"),
        ({}, ["--seed", "-1"], "seed is -1"),
        ({"policy": {"class_path": "no.such.Policy"}}, [], "no.such.Policy"),
        ({}, ["stray"], "unrecognized arguments: stray"),
    ],
)
def test_invalid_configuration_exits_with_status_2_and_one_line_and_writes_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    overrides: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    config = write_config(tmp_path, tiny(**settings))
    assert main(["run", config, "--out", str(out), *overrides]) == 2
    with pytest.raises(AssertionError, match=rf"ConfigError: .*config\.yaml: .*{message}"):
        raise AssertionError(error_line(capsys))
    assert not out.exists()


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_unreadable_configuration_exits_with_status_2_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = str(tmp_path / name)
    assert main(["run", path, "--out", str(tmp_path / "out")]) == 2
    assert path.rstrip("/.") in error_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["rnu"], ["run"], ["run", "a.yaml"], ["doctor", "--fix"], ["prepare"]]
)
def test_invalid_arguments_exit_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_evaluate_compares_seeds_and_each_matches_a_run_with_that_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A penalty with state, which must not carry over from one seed to the next.
    penalty = {"class_path": "TargetPenalty", "init_args": {"keep": 0.5, "learning_rate": 0.01}}
    config = write_config(tmp_path, tiny(scorer__init_args__penalty=penalty))
    out, one = tmp_path / "out", tmp_path / "one"
    assert main(["evaluate", config, "--seeds", "2", "--out", str(out)]) == 0
    report = capsys.readouterr().out
    assert "test split, 2 seeds" in report and "Jaccard index" in report
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "stability.json"]
    stability = json.loads((out / "stability.json").read_text())
    assert stability["seeds"] == [0, 1]
    assert stability["metrics"].keys() == {"full", "pruned", "final"}
    assert stability["metrics"]["final"]["auc"]["sd"] > 0
    assert 0.5 < stability["predictions"]["full"]["consistency"] < 1
    assert main(["run", str(out / "config.yaml"), "--seed", "1", "--out", str(one)]) == 0
    result, run = json.loads((one / "result.json").read_text()), stability["runs"][1]
    assert run["kept"] == result["kept"]
    assert run["metrics"] == result["metrics"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "--seeds is 1; it must be at least 2 for a comparison"),
        (["--seed", "3"], "give --seeds instead of --seed"),
        (["--train.batchsize", "8"], r"Did you mean 'train\.batch_size'\?"),
    ],
)
def test_invalid_evaluate_arguments_exit_with_status_2_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    config = write_config(tmp_path, tiny())
    assert main(["evaluate", config, "--out", str(out), *arguments]) == 2
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error_line(capsys))
    assert not out.exists()


@pytest.mark.parametrize("verb", ["run", "evaluate"])
def test_a_run_directory_in_use_exits_with_status_1_and_is_unchanged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_text("precious")
    assert main([verb, write_config(tmp_path, tiny()), "--out", str(out)]) == 1
    assert "name a new one with --out" in error_line(capsys)
    assert [path.name for path in out.iterdir()] == ["result.json"]
    assert (out / "result.json").read_text() == "precious"


def test_too_few_rows_exit_with_status_1_and_say_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny(data__init_args__rows=50))
    assert main(["run", config, "--out", str(tmp_path / "out")]) == 1
    assert "Give more rows, a smaller batch_size, or another pretrain.fraction" in error_line(
        capsys
    )
    assert not (tmp_path / "out" / "result.json").exists()


def test_bad_input_exits_with_status_1_and_names_file_column_and_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = rows(DATA, "train")
    ids = table["main_0"].to_pylist()
    ids[4321] = 99
    table = table.set_column(table.schema.get_field_index("main_0"), "main_0", pa.array(ids))
    config = write_config(tmp_path, tiny(data=parquet_data(tmp_path, table)))
    assert main(["run", config, "--out", str(tmp_path / "out")]) == 1
    line = error_line(capsys)
    assert "train.parquet, column 'main_0', row 4321: id out of range (99)" in line
    assert "'replace'" in line
    assert not (tmp_path / "out" / "result.json").exists()


def test_replaced_input_is_counted_in_result_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = rows(DATA, "train")
    ids, dense = table["main_0"].to_pylist(), table["dense_0"].to_pylist()
    for row in (5, 4321, 4322):
        ids[row] = -1
    dense[7] = float("nan")
    for name, values in (("main_0", pa.array(ids)), ("dense_0", pa.array(dense, pa.float32()))):
        table = table.set_column(table.schema.get_field_index(name), name, values)
    config = write_config(
        tmp_path, tiny(data=parquet_data(tmp_path, table), train__bad_input="replace")
    )
    out = tmp_path / "out"
    assert main(["run", config, "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert {"main_0", "dense_0"} <= set(result["kept"])
    assert result["replaced"] == [
        {"column": "dense_0", "problem": "not finite in float32", "count": 1},
        {"column": "main_0", "problem": "negative id", "count": 3},
    ]
    report = capsys.readouterr().out
    assert "replaced   3 x main_0: negative id" in report


def test_from_raw_csv_to_a_pruned_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(DATA, "train")
    lines = [",".join(table.column_names)]
    lines += [",".join(map(str, row.values())) for row in table.to_pylist()]
    raw = tmp_path / "clicks.csv"
    raw.write_text("\n".join(lines) + "\n")
    prepared = tmp_path / "prepared"
    arguments = ["--label", "label", "--dense", "[dense_0,dense_noise_0]", "--out", str(prepared)]
    assert main(["prepare", "csv", str(raw), *arguments, "--log_dense", "false"]) == 0
    assert "2 dense and 5 sparse columns" in capsys.readouterr().out
    data = {
        "class_path": "torchrec_fmp.data.parquet.PreparedDataset",
        "init_args": {"path": str(prepared)},
    }
    out = tmp_path / "out"
    assert main(["run", write_config(tmp_path, tiny(data=data)), "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["planted"] is None
    assert result["features_total"] == 7
    assert set(DATA.truth.signal) <= set(result["kept"])
    assert result["metrics"]["final"]["auc"] > 0.8
    assert "features   " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--label", "label", "--test_fraction", "2"], 2, "test_fraction is 2"),
        ([], 2, "needs the name of the label column"),
        (["--label", "clicked"], 1, "clicked"),
    ],
)
def test_prepare_distinguishes_invalid_options_from_invalid_files(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    raw = tmp_path / "clicks.csv"
    raw.write_text("label,a\n1,x\n0,y\n")
    out = tmp_path / "prepared"
    assert main(["prepare", "csv", str(raw), "--out", str(out), *arguments]) == status
    assert message in error_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize("status", [0, 1])
def test_doctor_command_exits_with_the_doctors_status(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "main", lambda arguments: status)
    assert main(["doctor"]) == status


def test_running_the_module_runs_the_command(tmp_path: Path) -> None:
    arguments = ["run", str(tmp_path / "absent.yaml"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "torchrec_fmp.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("torchrec-fmp: FileNotFoundError: ")
    assert "absent.yaml" in line
    assert not (tmp_path / "out").exists()
