"""One component launches the same command on every scheduler."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("torchx", reason="torchx is not installed: pip install -e '.[launch]'")

from torchx import specs
from torchx.runner import get_runner

ROOT = Path(__file__).parents[2]
COMPONENT = f"{ROOT}/launch/components.py:fmp"

# Replaces torchrec_fmp.cli and records its arguments and environment.
STAND_IN = """
import json, os, sys
with open(f"rank{os.environ['RANK']}.json", "w") as file:
    json.dump({"argv": sys.argv[1:], "world": os.environ["WORLD_SIZE"],
               "python": sys.executable,
               "store": os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]}, file)
sys.exit(3 if "--fail" in sys.argv else 0)
"""


def _dry(args: Sequence[str], scheduler: str = "local_cwd") -> tuple[specs.Role, str]:
    """The role, and the scheduler's request as text."""
    cfg = {"partition": "p"} if scheduler == "slurm" else {}
    with get_runner() as runner:
        info = runner.dryrun_component(COMPONENT, list(args), scheduler, cfg)
    assert info._app is not None
    (role,) = info._app.roles
    return role, str(info)


def _torchx(cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """`torchx run` as from a shell without an activated virtual environment."""
    env = {**os.environ, "PATH": "/usr/local/bin:/usr/bin:/bin"}
    command = [sys.executable, "-m", "torchx.cli.main", "run", "-s", "local_cwd", *args]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A directory with the launch files and a stand-in for the package."""
    (tmp_path / "torchrec_fmp").mkdir()
    (tmp_path / "torchrec_fmp" / "cli.py").write_text(STAND_IN)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "components.py").write_text((ROOT / "launch/components.py").read_text())
    return tmp_path


def test_the_command_is_the_one_a_user_would_type() -> None:
    role, _ = _dry(["--config", "c.yaml", "--out", "d", "-j", "2x4", "--", "--gates.lr", "0.1"])
    command = shlex.split(role.args[-1])
    assert command[command.index("-m") :] == [
        *("-m", "torchrec_fmp.cli", "run", "c.yaml", "--out", "d", "--gates.lr", "0.1")
    ]
    assert command[command.index("--nproc_per_node") + 1] == "4"
    assert role.num_replicas == 2


def test_every_launch_has_its_own_run_directory() -> None:
    outs = [shlex.split(_dry(["--config", "c.yaml"])[0].args[-1])[-1] for _ in range(2)]
    assert outs == ["runs/${app_id}"] * 2
    _, request = _dry(["--config", "c.yaml"])
    assert "runs/fmp-" in request
    assert request != _dry(["--config", "c.yaml"])[1]


def test_config_is_required() -> None:
    with pytest.raises(SystemExit):
        _dry([])


@pytest.mark.parametrize("scheduler", ["local_cwd", "slurm"])
def test_a_comma_separated_list_reaches_every_scheduler_intact(scheduler: str) -> None:
    # Slurm cuts environment values at commas, so only arguments may hold lists.
    role, _ = _dry(["--config", "c.yaml", "--", "--drop", "a,b,c"], scheduler)
    assert shlex.split(role.args[-1])[-2:] == ["--drop", "a,b,c"]
    assert not any("," in value for value in role.env.values())


def test_resources_reach_the_scheduler() -> None:
    role, request = _dry(
        ["--config", "c.yaml", "--cpu", "8", "--gpu", "4", "--memMB", "1000"], "slurm"
    )
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (8, 4, 1000)
    assert "--cpus-per-task=8" in request


def test_workers_get_unchanged_arguments_and_the_environment_of_torchx(clone: Path) -> None:
    arguments = ["--names", "a b", "--text", "$HOME 'x' *"]
    done = _torchx(
        clone, "launch/components.py:fmp", "--config", "c.yaml", "--out", "d", "-j", "1x2", "--",
        *arguments,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        seen = json.loads((clone / f"rank{rank}.json").read_text())
        assert seen["argv"] == ["run", "c.yaml", "--out", "d", *arguments]
        assert seen["world"] == "2"
        assert seen["store"] == "1"
        assert Path(seen["python"]).parent == Path(sys.executable).parent


def test_a_failing_worker_fails_the_launch(clone: Path) -> None:
    done = _torchx(clone, "launch/components.py:fmp", "--config", "c.yaml", "--", "--fail")
    assert done.returncode == 1
    assert (clone / "rank0.json").exists()


@pytest.mark.slow
def test_the_demo_runs_on_two_ranks(tmp_path: Path) -> None:
    done = _torchx(
        ROOT, "-cfg", f"log_dir={tmp_path}/logs", "launch/components.py:fmp",
        "--config", "configs/demo.yaml", "--out", f"{tmp_path}/run", "-j", "1x2",
        "--", "--data.rows", "20000",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["world_size"] == 2
