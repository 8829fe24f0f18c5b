"""The torchx component that runs `torchrec-fmp run` on any scheduler."""

# No `from __future__ import annotations`: torchx reads the annotations as classes.
import shlex
import sys
from pathlib import Path

import torchx
from torchx import specs
from torchx.components import dist


def fmp(
    *overrides: str,
    config: str,
    out: str = f"runs/{specs.macros.app_id}",
    j: str = "1x1",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    image: str = torchx.IMAGE,
) -> specs.AppDef:
    """Runs `torchrec-fmp run CONFIG --out OUT OVERRIDES` model-parallel.

    Args:
        overrides: options of the config, after `--`, such as `--data.rows 20000`
        config: YAML file of the run
        out: run directory, visible to all nodes; by default a new one for each launch
        j: nodes x processes per node, such as 2x8
        cpu: cores per node
        gpu: GPUs per node
        memMB: memory per node in MB
        image: container image with this project, for schedulers that use one
    """
    app = dist.ddp(
        "run",
        config,
        "--out",
        out,
        *overrides,
        m="torchrec_fmp.cli",
        name="/fmp",
        image=image,
        j=j,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        # A restarted worker group on gloo reads the dead group's addresses from a shared store.
        env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    for role in app.roles:
        role.name = "fmp"
        # Finds `torchrun` in the environment that torchx is installed in, activated or not. If the
        # directory does not exist, as in a container, this has no effect.
        shell, script = role.args
        role.args = [shell, f'PATH={shlex.quote(_bin_directory())}:"$$PATH" {script}']
    return app


def _bin_directory() -> str:
    return str(Path(sys.executable).parent)
