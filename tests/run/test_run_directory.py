"""Everything that one run leaves behind can be read, edited and run again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.cli.__main__ import main
from torchrec_fmp.run.directory import RunDirectory
from torchrec_fmp.selection.selection import Selection


def run(directory: Path, config: str, *overrides: str) -> Path:
    out = directory / "out"
    assert main(["run", config, "--out", str(out), *overrides]) == 0
    return out


def read(directory: Path, name: str) -> dict[str, Any]:
    content = json.loads((directory / name).read_text())
    assert isinstance(content, dict)
    return content


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    return run(directory, write_config(directory, tiny(reference=True)))


@pytest.fixture(scope="module")
def result(tiny_run: Path) -> dict[str, Any]:
    return read(tiny_run, "result.json")


def test_a_run_leaves_these_files_and_no_others(tiny_run: Path) -> None:
    assert {path.name for path in tiny_run.iterdir()} == {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "result.json",
        "selection.json",
    }


def test_the_result_has_exactly_the_documented_members(result: dict[str, Any]) -> None:
    assert set(result) == {
        *("features_total", "features_kept", "kept", "dropped", "planted", "metrics", "bytes"),
        *("parameters", "step_ms", "seconds", "samples", "input_share", "replaced"),
        *("parity_max_abs", "world_size", "seed", "versions"),
    }
    members = {
        "planted": {"signal", "redundant", "noise"},
        "metrics": {"full", "pruned", "final"},
        "bytes": {"before", "after"},
        "parameters": {"before", "after"},
        "step_ms": {"full", "gated", "pruned"},
        "seconds": {"full", "pretrain", "prune", "continue"},
        "samples": {"pretrain", "continue"},
        "input_share": {"full", "pretrain", "continue"},
    }
    for name, expected in members.items():
        assert set(result[name]) == expected, name
    for figures in result["metrics"].values():
        assert set(figures) == {"auc", "logloss", "ne"}
    assert {"torch", "torchrec"} <= set(result["versions"])


def test_the_figures_of_a_result_are_consistent(result: dict[str, Any]) -> None:
    planted = result["planted"]
    features = planted["signal"] + planted["redundant"] + planted["noise"]
    assert sorted(result["kept"] + result["dropped"]) == sorted(features)
    assert result["features_total"] == len(features) == 7
    assert result["features_kept"] == len(result["kept"])
    assert 0 < result["bytes"]["after"] < result["bytes"]["before"]
    assert 0 < result["parameters"]["after"] < result["parameters"]["before"]
    # Half of 10,000 rows in full batches of 32, the rest in full batches of 100.
    assert result["samples"] == {"pretrain": 156 * 32, "continue": 50 * 100}
    assert result["parity_max_abs"] <= 1e-5
    assert (result["world_size"], result["seed"], result["replaced"]) == (1, 0, [])
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert all(step_ms > 0 for step_ms in result["step_ms"].values())
    assert all(0 <= share < 1 for share in result["input_share"].values())


def test_the_planted_signal_is_kept_and_the_noise_dropped(result: dict[str, Any]) -> None:
    assert result["kept"] == result["planted"]["signal"]
    assert result["metrics"]["pruned"]["auc"] > 0.9 < result["metrics"]["final"]["auc"]


def test_table_bytes_are_those_of_the_kept_tables(result: dict[str, Any], tiny_run: Path) -> None:
    config = yaml.safe_load((tiny_run / "config.yaml").read_text())
    manifest = read(tiny_run, "manifest.json")
    tables = set(manifest["plans"]["after"])
    assert tables == {f"t_{name}" for name in result["kept"] if not name.startswith("dense")}
    assert tables < set(manifest["plans"]["before"])
    row_bytes = 4 * config["model"]["init_args"]["embedding_dim"]
    assert result["bytes"]["after"] % row_bytes == 0


def test_the_manifest_describes_the_prune(result: dict[str, Any], tiny_run: Path) -> None:
    manifest = read(tiny_run, "manifest.json")
    assert set(manifest) == {
        *("dropped", "dense_columns", "tables", "table_bytes", "parameters", "plans"),
        *("estimates", "comparison", "moved_bytes", "copied_bytes", "staging", "parity_max_abs"),
    }
    assert manifest["dropped"] == result["dropped"]
    assert manifest["dense_columns"] == {"model.dense_arch": ["dense_0"]}
    assert manifest["table_bytes"] == result["bytes"]
    assert manifest["parameters"] == result["parameters"]
    assert manifest["parity_max_abs"] == result["parity_max_abs"]
    sharding = manifest["plans"]["after"]["t_main_0"]
    assert set(sharding) == {"sharding_type", "compute_kernel", "ranks"}
    assert manifest["estimates"]["after"]["step_ms"] < manifest["estimates"]["before"]["step_ms"]
    assert manifest["comparison"]["steps_left"] > 0
    # On one rank nothing moves, and the copied bytes include row-wise Adagrad's state.
    assert manifest["moved_bytes"] == 0
    assert manifest["copied_bytes"] > manifest["table_bytes"]["after"]
    assert manifest["staging"] == "none"


def test_metrics_lines_cover_every_phase_in_order(tiny_run: Path) -> None:
    lines = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert all(set(line) == {"phase", "step", "samples", "loss"} for line in lines)
    phases = list(dict.fromkeys(line["phase"] for line in lines))
    assert phases == ["full", "pretrain", "continue"]
    steps = [line["step"] for line in lines if line["phase"] == "pretrain"]
    assert steps == [*range(7, 156, 7), 156]
    assert [line["samples"] for line in lines if line["phase"] == "pretrain"][-1] == 156 * 32


def test_the_selection_states_every_feature_and_loads(
    result: dict[str, Any], tiny_run: Path
) -> None:
    selection = Selection.load(str(tiny_run / "selection.json"))
    assert (selection.kept, selection.dropped) == (result["kept"], result["dropped"])
    assert all(decision.reason for decision in selection.features.values())


def test_the_written_configuration_reproduces_the_run_bit_for_bit(
    tiny_run: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    out = run(tmp_path, str(tiny_run / "config.yaml"))
    again = read(out, "result.json")
    for name in ("metrics", "kept", "bytes", "parameters", "samples", "parity_max_abs"):
        assert again[name] == result[name], name
    for name in ("config.yaml", "selection.json", "metrics.jsonl", "manifest.json"):
        assert (out / name).read_text() == (tiny_run / name).read_text(), name


def test_the_reference_does_not_change_the_run(
    tiny_run: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    out = run(tmp_path, str(tiny_run / "config.yaml"), "--reference", "false")
    alone = read(out, "result.json")
    assert alone["metrics"]["full"] is None
    assert alone["step_ms"]["full"] is None
    assert alone["seconds"]["full"] is None
    assert alone["metrics"]["final"] == result["metrics"]["final"]
    assert (out / "selection.json").read_text() == (tiny_run / "selection.json").read_text()


def test_another_seed_gives_another_run(
    tiny_run: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    overrides = ["--seed", "5", "--reference", "false"]
    other = read(run(tmp_path, str(tiny_run / "config.yaml"), *overrides), "result.json")
    assert other["seed"] == 5
    assert other["metrics"]["final"] != result["metrics"]["final"]


def test_an_edited_selection_is_replayed_unchanged(tiny_run: Path, tmp_path: Path) -> None:
    content = read(tiny_run, "selection.json")
    content["main_1"] |= {"kept": False, "gate": 0.0, "reason": "by hand"}
    content["noise_0"] |= {"kept": True, "gate": 0.5, "reason": "by hand"}
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(content))
    out = run(
        tmp_path,
        str(tiny_run / "config.yaml"),
        *("--reference", "false", "--policy", "torchrec_fmp.selection.policies.from_file.FromFile"),
        *("--policy.path", str(edited)),
    )
    assert read(out, "result.json")["kept"] == ["main_0", "noise_0", "dense_0"]
    assert read(out, "selection.json") == content


@pytest.mark.parametrize("kind", ["file", "hidden file", "directory", "is a file"])
def test_a_non_empty_directory_or_a_file_is_refused(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "is a file":
        out.touch()
    else:
        out.mkdir()
        {"file": (out / "a").touch, "hidden file": (out / ".a").touch}.get(
            kind, (out / "a").mkdir
        )()
    with pytest.raises(FileExistsError, match="out exists and is not empty: .*--out"):
        RunDirectory(str(out), writes=True).create()


def test_a_new_or_empty_directory_is_created_with_its_parents(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    for _ in range(2):
        RunDirectory(str(out), writes=True).create()
    assert out.is_dir()


def test_a_rank_that_does_not_report_writes_nothing(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path / "out"), writes=False)
    directory.create()
    directory.write_text("a", "text")
    directory.write_json("b", {})
    assert not list(tmp_path.iterdir())


def test_json_has_null_where_a_figure_is_not_a_number(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path), writes=True)
    content = {"metrics": {"auc": float("nan")}, "list": [float("nan"), 1.0], "names": ("a",)}
    directory.write_json("result.json", content)
    assert read(tmp_path, "result.json") == {
        "metrics": {"auc": None},
        "list": [None, 1.0],
        "names": ["a"],
    }
