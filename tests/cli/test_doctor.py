"""The doctor accepts every supported set, and its fixes repair any other set."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_fmp.cli import doctor
from torchrec_fmp.cli.doctor import Finding

Versions = dict[str, str | None]

_PATCHES = ["0", "1", "0+cpu", "1+cu130"]
_TORCHES = ["2.10", "2.11", "2.12", "2.13", "2.14", "2.15"]
_TORCHRECS = ["1.5", "1.6", "1.7", "1.8", "1.9", "1.10"]


def _good(torchrec: str = "1.8", fbgemm: str = "fbgemm-gpu-cpu") -> Versions:
    return {
        "torch": f"{doctor.SUPPORTED[torchrec]}.0+cpu",
        "torchrec": f"{torchrec}.0",
        fbgemm: f"{torchrec}.0",
        "torchmetrics": "1.0.3",
        "torchx": "0.7.0",
    }


def _problems(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings if finding.level != "ok"}


def _errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "error"]


def _apply(fix: str, versions: Versions) -> Versions:
    """Versions that would be installed after the pip commands of `fix`."""
    after = dict(versions)
    for command in fix.split(" && "):
        if command.startswith("pip uninstall -y "):
            for name in command.removeprefix("pip uninstall -y ").split():
                after[name] = None
        else:
            assert command.startswith("pip install "), command
            for name, version in re.findall(r"(\S+)[~=]=(\S+)", command):
                after[name] = version
    return after


@pytest.mark.parametrize("torchrec", doctor.SUPPORTED)
@pytest.mark.parametrize("fbgemm", ["fbgemm-gpu", "fbgemm-gpu-cpu"])
@pytest.mark.parametrize("patch", _PATCHES)
def test_every_supported_set_is_accepted(torchrec: str, fbgemm: str, patch: str) -> None:
    versions = _good(torchrec, fbgemm) | {
        "torch": f"{doctor.SUPPORTED[torchrec]}.{patch}",
        "torchrec": f"{torchrec}.{patch}",
        fbgemm: f"{torchrec}.{patch}",
    }
    assert not _problems(doctor.check_versions(versions))


_installed = st.fixed_dictionaries(
    {
        "torch": st.sampled_from([None, *_TORCHES]),
        "torchrec": st.sampled_from([None, *_TORCHRECS]),
        "fbgemm-gpu": st.sampled_from([None, *_TORCHRECS]),
        "fbgemm-gpu-cpu": st.sampled_from([None, *_TORCHRECS]),
        "fbgemm-gpu-nightly": st.sampled_from([None, "2026.3"]),
        "torchmetrics": st.sampled_from([None, "1.0", "1.9"]),
    }
).map(lambda versions: {name: v and f"{v}.3" for name, v in versions.items()})


@given(_installed)
def test_a_set_is_accepted_if_and_only_if_it_is_a_supported_triple(versions: Versions) -> None:
    def minor(name: str) -> str:
        return ".".join((versions[name] or "").split(".")[:2])

    fbgemms = [name for name in versions if name.startswith("fbgemm") and versions[name]]
    whole = (
        doctor.SUPPORTED.get(minor("torchrec")) == minor("torch")
        and len(fbgemms) == 1
        and minor(fbgemms[0]) == minor("torchrec")
        and versions["torchmetrics"] is not None
    )
    assert whole == (not _errors(doctor.check_versions(versions)))


@given(_installed)
def test_the_fixes_lead_to_a_supported_set(versions: Versions) -> None:
    after = versions
    for finding in doctor.check_versions(versions):
        assert bool(finding.fix) == (finding.level != "ok")
        if finding.fix:
            after = _apply(finding.fix, after)
    assert not _problems(doctor.check_versions(after))


@given(_installed)
def test_a_supported_torch_is_kept(versions: Versions) -> None:
    torch = ".".join((versions["torch"] or "").split(".")[:2])
    if torch in doctor.SUPPORTED.values():
        for finding in doctor.check_versions(versions):
            assert "torch~=" not in finding.fix or f"torch~={torch}.0" in finding.fix


@pytest.mark.parametrize("torch", _TORCHES)
@pytest.mark.parametrize("torchrec", _TORCHRECS)
def test_a_mismatched_pair_is_named(torch: str, torchrec: str) -> None:
    if doctor.SUPPORTED.get(torchrec) == torch:
        return
    versions = _good() | {
        "torch": f"{torch}.0",
        "torchrec": f"{torchrec}.0",
        "fbgemm-gpu-cpu": f"{torchrec}.0",
    }
    text = doctor.report(_errors(doctor.check_versions(versions)))
    supported = torchrec in doctor.SUPPORTED and torch in doctor.SUPPORTED.values()
    assert (f"torch: {torch}.0, but torchrec {torchrec}.0 needs torch" in text) == supported
    assert (f"torch: {torch}.0; supported: " in text) == (torch in ("2.10", "2.15"))
    assert (f"torchrec: {torchrec}.0; supported: " in text) == (torchrec in ("1.5", "1.10"))


def test_a_mismatched_fbgemm_version_is_reported_with_the_right_one() -> None:
    problems = _problems(doctor.check_versions(_good() | {"fbgemm-gpu-cpu": "1.7.0"}))
    assert "fbgemm-gpu-cpu 1.7.0, but torchrec 1.8.0" in problems["fbgemm"].found
    assert "fbgemm-gpu-cpu~=1.8.0" in problems["fbgemm"].fix


def test_two_builds_of_fbgemm_are_both_removed_before_one_is_installed() -> None:
    problems = _problems(doctor.check_versions(_good() | {"fbgemm-gpu": "1.8.0"}))
    assert problems["fbgemm"].level == "error"
    assert problems["fbgemm"].fix.startswith("pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && ")


@pytest.mark.parametrize("missing", ["torch", "torchrec", "fbgemm-gpu-cpu", "torchmetrics"])
def test_each_missing_package_is_an_error(missing: str) -> None:
    problems = _problems(doctor.check_versions(_good() | {missing: None}))
    assert list(problems) == [missing.removesuffix("-gpu-cpu")]
    assert problems[missing.removesuffix("-gpu-cpu")].found.startswith("not installed")


def test_the_fix_for_a_cpu_install_never_lets_pip_resolve_torchrec() -> None:
    # torchrec's metadata would bring the CUDA build of fbgemm.
    problems = _problems(doctor.check_versions(_good() | {"torchrec": None}))
    assert "pip install --no-deps torchrec~=1.8.0" in problems["torchrec"].fix


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("torch", "2.13.0a0+git1234"),
        ("torch", "2.13.0.dev20260301"),
        ("torchrec", "1.8.0rc1"),
        ("torchrec-nightly", "2026.3.1"),
    ],
)
def test_a_nightly_or_prerelease_is_a_warning(name: str, version: str) -> None:
    problems = _problems(doctor.check_versions(_good() | {name: version}))
    assert [problem.level for problem in problems.values()] == ["warning"]
    assert f"pip uninstall -y {name}" in problems[name].fix


@pytest.mark.parametrize(("name", "pin"), [("torchmetrics", "1.0.3"), ("torchx", "0.7.0")])
def test_a_version_other_than_the_pinned_one_is_a_warning(name: str, pin: str) -> None:
    problems = _problems(doctor.check_versions(_good() | {name: "1.4.0"}))
    assert problems[name] == Finding(
        name, "warning", problems[name].found, f"pip install {name}=={pin}"
    )


@pytest.mark.parametrize(
    ("version", "level"),
    [((3, 9), "error"), ((3, 10), "ok"), ((3, 12), "ok"), ((3, 13), "error")],
)
def test_python_3_10_to_3_12_is_accepted(version: tuple[int, int], level: str) -> None:
    assert doctor.check_python(version).level == level


def _probe_gives(
    monkeypatch: pytest.MonkeyPatch, returncode: int, stdout: str = "", stderr: str = ""
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, returncode, stdout, stderr)

    monkeypatch.setattr(doctor.subprocess, "run", run)


@pytest.mark.parametrize(
    ("returncode", "stderr", "found", "fix"),
    [
        (-11, "", "SIGSEGV", "pip install --force-reinstall torch~=2.13.0"),
        (1, "Traceback\nOSError: undefined symbol: x", "undefined symbol: x", "--force-reinstall"),
        (1, "ModuleNotFoundError: No module named 'tensordict'", "tensordict", "pip install tenso"),
    ],
)
def test_a_crash_of_the_import_is_a_finding(
    returncode: int, stderr: str, found: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _probe_gives(monkeypatch, returncode, stderr=stderr)
    (finding,) = doctor.check_runtime(_good())
    assert finding.level == "error"
    assert found in finding.found
    assert fix in finding.fix


def test_a_real_crash_of_the_interpreter_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE", "import os; os.abort()")
    (finding,) = doctor.check_runtime(_good())
    assert (finding.level, "SIGABRT" in finding.found) == ("error", True)


def test_an_import_error_with_wrong_versions_says_to_fix_the_versions_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _probe_gives(monkeypatch, 1, stderr="ImportError: x")
    (finding,) = doctor.check_runtime(_good() | {"torch": "2.11.0"})
    assert finding.fix == "repair the versions named above first"


def test_the_cuda_build_is_suggested_for_a_gpu_with_the_cpu_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _probe_gives(monkeypatch, 0, stdout='noise\n{"gpus": 8, "gloo": true}\n')
    problems = _problems(doctor.check_runtime(_good()))
    assert _apply(problems["cuda"].fix, _good())["fbgemm-gpu"] == "1.8.0"
    assert not _problems(doctor.check_runtime(_good(fbgemm="fbgemm-gpu")))


def test_a_torch_without_gloo_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _probe_gives(monkeypatch, 0, stdout='{"gpus": 0, "gloo": false}')
    assert [finding.name for finding in _errors(doctor.check_runtime(_good()))] == ["gloo"]


def test_the_report_shows_each_fix_on_the_line_after_its_problem() -> None:
    ok, bad = Finding("a", "ok", "1"), Finding("b", "error", "2", "do it")
    assert doctor.report([ok, bad]) == "ok       a: 1\nerror    b: 2\n         fix: do it\n"


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("warning", 0), ("error", 1)])
def test_only_an_error_fails_the_command(
    level: Any, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda: [Finding("a", level, "1")])
    assert doctor.main() == code
    assert capsys.readouterr().out.startswith(level)


def test_this_environment_passes() -> None:
    assert not _errors(doctor.diagnose())


def test_the_doctor_runs_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['torchrec'] = None\n"
        "from torchrec_fmp.cli import doctor; doctor.check_versions(doctor.installed_versions())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
