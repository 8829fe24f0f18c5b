"""Every command and every snippet of the README runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Smaller data than the demo's; nothing else changes.
SMALL = ["--data.rows", "20000", "--data.test_rows", "4000"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line]


def small(command: str, out: Path) -> list[str]:
    """Words of the command, with less data for the demo and outputs below `out`."""
    words = shlex.split(command)
    words = [str(out / word) if word.startswith(("runs/", "data/")) else word for word in words]
    if words[0] == "torchx":
        words += ["--out", str(out / "runs/torchx"), "--", *SMALL]
    elif "configs/demo.yaml" in words:
        words += SMALL
    return words


@pytest.fixture
def environment() -> dict[str, str]:
    binaries = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def raw_file() -> str:
    lines = ["clicked,price,country,device"]
    lines += [f"{i % 2},{i}.5,c{i % 7},d{i % 3}" for i in range(200)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("make ")])
def test_command_of_the_readme_succeeds(
    command: str, environment: dict[str, str], raw_file: str, tmp_path: Path
) -> None:
    (tmp_path / "clicks.csv").write_text(raw_file)
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment["PYTHONPATH"] = str(ROOT)
    words = small(command, tmp_path)
    run = subprocess.run(
        words,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result = "stability.json" if "evaluate" in words else "result.json"
    for out in (word for word in words if "/runs/" in word):
        assert (Path(out) / result).exists()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_target_of_the_readme_runs_what_the_readme_says(
    command: str, environment: dict[str, str]
) -> None:
    shown = subprocess.run(
        [*shlex.split(command), "-n"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = {
        "make demo": "torchrec-fmp run configs/demo.yaml",
        "make test": "python -m pytest",
    }
    assert expected[command] in shown


def test_snippets_of_the_readme_run_and_find_the_features_that_matter(tmp_path: Path) -> None:
    (snippet,) = blocks("python")
    script = tmp_path / "snippet.py"
    script.write_text(snippet.replace("tcp://127.0.0.1:29500", f"file://{tmp_path}/store"))
    run = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    kept = re.findall(r"'(\w+)'", run.stdout.split("], loss ")[0])
    assert {"f0", "price"} <= set(kept) and len(kept) < 6, run.stdout


def test_every_path_named_in_the_readme_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    tree = README.split("## Where things are\n\n```\n")[1].split("```")[0]
    named = re.findall(r"(?<![\w/.])([a-z_]+(?:\.py|/))(?=\s)", tree)
    assert links and named
    missing = [link for link in links if not (ROOT / link).exists()]
    missing += [
        name
        for name in named
        if not (ROOT / name).exists() and not (ROOT / "torchrec_fmp" / name).exists()
    ]
    assert not missing
