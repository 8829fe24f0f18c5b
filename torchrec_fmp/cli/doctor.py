"""Checks that the installed torch, torchrec and fbgemm fit together, and says how to fix them."""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torchrec_fmp.distributed.versions import (
    FBGEMM,
    FBGEMM_NIGHTLY,
    NEWEST,
    NIGHTLY,
    SUPPORTED,
    TORCHMETRICS,
    TORCHX,
    installed_versions,
)

Level = Literal["ok", "warning", "error"]

_TORCHREC_BY_TORCH = {torch: torchrec for torchrec, torch in SUPPORTED.items()}

# Runs in another interpreter: a shared library that does not fit can crash the process.
_PROBE = """
import json, sys
import torch, fbgemm_gpu, torchrec
offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
if offsets.tolist() != [0, 1, 3]:
    sys.exit(f"fbgemm's cumulative sum of [1, 2] is {offsets.tolist()}, not [0, 1, 3]")
print(json.dumps({
    "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
}))
"""
_PROBE_TIMEOUT_S = 300
_RUNTIME = "import and run"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        name: subject of the check.
        level: severity, "error" if training cannot work, "warning" if it may not.
        found: state that the check found.
        fix: command or step that fixes the problem; empty if there is none.
    """

    name: str
    level: Level
    found: str
    fix: str = ""


def main(arguments: Sequence[str] = ()) -> int:
    """Prints the report; returns 1 if there is an error, else 0."""
    argparse.ArgumentParser(prog="torchrec-fmp doctor").parse_args(arguments)
    findings = diagnose()
    sys.stdout.write(report(findings))
    return int(any(finding.level == "error" for finding in findings))


def report(findings: Sequence[Finding]) -> str:
    """The findings as lines for a person to read, each problem followed by its fix."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.name}: {finding.found}")
        if finding.fix:
            lines.append(f"{'':<8} fix: {finding.fix}")
    return "\n".join(lines) + "\n"


def diagnose() -> list[Finding]:
    """Checks the interpreter, the installed versions, and whether they import and run."""
    versions = installed_versions()
    return [
        check_python(sys.version_info[:2]),
        *check_versions(versions),
        *check_runtime(versions),
    ]


def check_python(version: tuple[int, ...]) -> Finding:
    """Checks whether this Python (major, minor) is supported."""
    found = ".".join(map(str, version))
    if (3, 10) <= version < (3, 13):
        return Finding("python", "ok", found)
    return Finding(
        "python",
        "error",
        f"{found}; supported: 3.10 to 3.12",
        "create a virtual environment with python3.11 and install into it",
    )


def check_versions(versions: Mapping[str, str | None]) -> list[Finding]:
    """Checks whether torch, torchrec, fbgemm, torchmetrics and torchx fit together.

    Args:
        versions: distribution name -> version, None or absent if not installed.
    """
    return [
        _check_torch(versions),
        _check_torchrec(versions),
        _check_fbgemm(versions),
        *_check_prereleases(versions),
        _check_torchmetrics(versions.get("torchmetrics")),
        _check_torchx(versions.get("torchx")),
    ]


def check_runtime(versions: Mapping[str, str | None]) -> list[Finding]:
    """Imports and runs torch, fbgemm and torchrec in another process: a crash is a finding."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        found = f"no answer in {_PROBE_TIMEOUT_S} seconds"
        return [Finding(_RUNTIME, "error", found, "try again when the machine is idle")]
    if done.returncode != 0:
        reason = _reason(done)
        return [Finding(_RUNTIME, "error", reason, _repair(reason, versions))]
    return _check_abilities(json.loads(done.stdout.splitlines()[-1]), versions)


def _minor(version: str | None) -> str | None:
    """The part "2.13" of "2.13.0+cpu"."""
    match = re.match(r"\d+\.\d+", version or "")
    return match[0] if match else None


def _check_prereleases(versions: Mapping[str, str | None]) -> list[Finding]:
    return [
        Finding(
            name,
            "warning",
            f"{version} is a nightly or pre-release, which is not tested",
            f"pip uninstall -y {name} && {_install(versions)}",
        )
        for name in ("torch", "torchrec", *FBGEMM, *NIGHTLY)
        if (version := versions.get(name))
        and (name in NIGHTLY or not re.fullmatch(r"\d+(\.\d+)*(\+\S+)?", version))
    ]


def _check_torchrec(versions: Mapping[str, str | None]) -> Finding:
    version = versions.get("torchrec")
    if version is None:
        return Finding("torchrec", "error", "not installed", _install(versions))
    if _minor(version) not in SUPPORTED:
        supported = ", ".join(SUPPORTED)
        found = f"{version}; supported: {supported}"
        return Finding("torchrec", "error", found, _install(versions))
    return Finding("torchrec", "ok", version)


def _check_torch(versions: Mapping[str, str | None]) -> Finding:
    version = versions.get("torch")
    if version is None:
        return Finding("torch", "error", "not installed", _install(versions))
    if _minor(version) not in _TORCHREC_BY_TORCH:
        supported = ", ".join(_TORCHREC_BY_TORCH)
        return Finding("torch", "error", f"{version}; supported: {supported}", _install(versions))
    torchrec = versions.get("torchrec")
    wanted = SUPPORTED.get(_minor(torchrec) or "")
    if wanted not in (None, _minor(version)):
        found = f"{version}, but torchrec {torchrec} needs torch {wanted}"
        return Finding("torch", "error", found, _install(versions))
    return Finding("torch", "ok", version)


def _check_fbgemm(versions: Mapping[str, str | None]) -> Finding:
    found = {name: versions[name] for name in (*FBGEMM, *FBGEMM_NIGHTLY) if versions.get(name)}
    listed = " and ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        return Finding("fbgemm", "error", "not installed", _install(versions))
    if len(found) > 1:
        return Finding(
            "fbgemm",
            "error",
            f"{listed} are installed, and each has overwritten files of the other",
            f"pip uninstall -y {' '.join(found)} && {_install(versions)}",
        )
    torchrec = versions.get("torchrec")
    (version,) = found.values()
    if _minor(torchrec) in SUPPORTED and _minor(version) != _minor(torchrec):
        return Finding(
            "fbgemm",
            "error",
            f"{listed}, but torchrec {torchrec} needs fbgemm {_minor(torchrec)}",
            _install(versions),
        )
    return Finding("fbgemm", "ok", listed)


def _check_torchmetrics(version: str | None) -> Finding:
    fix = f"pip install torchmetrics=={TORCHMETRICS}"
    if version is None:
        return Finding("torchmetrics", "error", "not installed, but torchrec imports it", fix)
    if version != TORCHMETRICS:
        return Finding("torchmetrics", "warning", f"{version}; torchrec pins {TORCHMETRICS}", fix)
    return Finding("torchmetrics", "ok", version)


def _check_torchx(version: str | None) -> Finding:
    if version is None:
        return Finding("torchx", "ok", "not installed; only launching with torchx needs it")
    if version != TORCHX:
        return Finding(
            "torchx",
            "warning",
            f"{version}; the launch component is tested with {TORCHX}",
            f"pip install torchx=={TORCHX}",
        )
    return Finding("torchx", "ok", version)


def _check_abilities(
    abilities: Mapping[str, Any], versions: Mapping[str, str | None]
) -> list[Finding]:
    findings = [Finding(_RUNTIME, "ok", "torch, fbgemm_gpu and torchrec")]
    gpus, without_cuda = abilities["gpus"], versions.get("fbgemm-gpu-cpu")
    if gpus and without_cuda:
        wanted = {**versions, "fbgemm-gpu": without_cuda, "fbgemm-gpu-cpu": None}
        fix = f"pip uninstall -y fbgemm-gpu-cpu && {_install(wanted)}"
        found = f"{gpus} GPUs, but this fbgemm is a build without CUDA"
        findings.append(Finding("cuda", "warning", found, fix))
    else:
        found = f"{gpus} GPUs" if gpus else "not available; training runs on the CPU"
        findings.append(Finding("cuda", "ok", found))
    if abilities["gloo"]:
        findings.append(Finding("gloo", "ok", "available"))
    else:
        fix = "install a torch that is built with gloo, such as a build from the package index"
        findings.append(Finding("gloo", "error", "missing from this torch", fix))
    return findings


def _repair(reason: str, versions: Mapping[str, str | None]) -> str:
    if any(finding.level == "error" for finding in check_versions(versions)):
        return "repair the versions named above first"
    missing = re.search(r"No module named '([\w]+)", reason)
    if missing and missing[1] not in ("torch", "torchrec", "fbgemm_gpu"):
        return f"pip install {missing[1]}"
    return _install(versions, reinstall=True)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"the process was killed by {signal.Signals(-done.returncode).name}"
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _install(versions: Mapping[str, str | None], reinstall: bool = False) -> str:
    """The command that installs a supported set, close to the installed versions.

    torch, the largest of the three packages, is kept if any torchrec fits it.
    """
    torch, torchrec = _minor(versions.get("torch")), _minor(versions.get("torchrec"))
    if torch in _TORCHREC_BY_TORCH:
        torchrec = _TORCHREC_BY_TORCH[torch]
    elif torchrec is None or torchrec not in SUPPORTED:
        torchrec = NEWEST
    torch = SUPPORTED[torchrec]
    pip = "pip install --force-reinstall" if reinstall else "pip install"
    if versions.get("fbgemm-gpu") and not versions.get("fbgemm-gpu-cpu"):
        return f"{pip} torch~={torch}.0 torchrec~={torchrec}.0 fbgemm-gpu~={torchrec}.0"
    # Only torchrec is installed without dependencies: they include the CUDA build of fbgemm.
    return (
        f"{pip} torch~={torch}.0 fbgemm-gpu-cpu~={torchrec}.0 tensordict pyre-extensions "
        f"torchmetrics=={TORCHMETRICS} && {pip} --no-deps torchrec~={torchrec}.0"
    )
