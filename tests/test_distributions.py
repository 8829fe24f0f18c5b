"""The wheel built from the sdist installs and runs outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("torchrec_fmp", "pyproject.toml", "README.md", "LICENSE")
SMALL = ["--data.rows", "20000", "--data.test_rows", "4000"]


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist of a copy of the sources."""
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, sources / name)
    run("-m", "build", "--no-isolation", "--outdir", str(out), ".", cwd=sources)
    assert len(list(out.glob("*.tar.gz"))) == 1
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_has_every_module_the_type_marker_and_the_license(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "torchrec_fmp").rglob("*.py")}
    assert modules <= names
    assert "torchrec_fmp/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_installed_wheel_runs_the_demo_outside_of_the_checkout(
    wheel: Path, tmp_path: Path
) -> None:
    installed, config = tmp_path / "installed", tmp_path / "demo.yaml"
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed))
    run(*pip, str(wheel), cwd=tmp_path)
    shutil.copy(ROOT / "configs" / "demo.yaml", config)
    python_path = {"PYTHONPATH": str(installed)}
    where = "import torchrec_fmp.run.pipeline as module; print(module.__file__)"
    assert run("-c", where, cwd=tmp_path, **python_path).startswith(str(installed))
    command = ("-m", "torchrec_fmp.cli", "run", str(config), "--out", "out", *SMALL)
    run(*command, cwd=tmp_path, **python_path)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["features_total"] == 28
