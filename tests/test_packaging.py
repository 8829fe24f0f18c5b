"""pyproject.toml, the Makefile and the doctor agree, and the package complies with them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from torchrec_fmp.cli import doctor
from torchrec_fmp.distributed import versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Packages that a user installs beforehand or through an extra.
PLATFORM = {"torch", "torchrec", "fbgemm_gpu", "torchmetrics"}
DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn"}


def _requirements(lines: list[str]) -> dict[str, Requirement]:
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def _makefile_line(variable: str) -> str:
    match = re.search(rf"^{variable} \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match is not None, variable
    return match[1]


def _makefile(variable: str) -> str:
    (word,) = _makefile_line(variable).split()
    return word


def _pairs(variable: str) -> list[tuple[str, str]]:
    """(torch, torchrec) of each word of a variable."""
    found = [tuple(word.split("+")) for word in _makefile_line(variable).split()]
    assert all(len(pair) == 2 for pair in found)
    return found  # type: ignore[return-value]


def _make(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *args], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_plain_install_touches_neither_torch_nor_torchrec_nor_fbgemm() -> None:
    names = set(_requirements(PROJECT["dependencies"]))
    assert not {name for name in names if re.match("torch|fbgemm|tensordict", name)}


def test_every_third_party_import_is_declared() -> None:
    declared = set(_requirements(PROJECT["dependencies"] + EXTRAS["scorers"])) | PLATFORM
    for path in (ROOT / "torchrec_fmp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            else:
                continue
            for module in (name.split(".")[0] for name in modules):
                known = module in sys.stdlib_module_names or module == "torchrec_fmp"
                assert known or DISTRIBUTIONS.get(module, module) in declared, (path.name, module)


def test_a_cpu_install_cannot_pull_the_cuda_build_of_fbgemm() -> None:
    assert not {"torchrec", "fbgemm-gpu"} & set(_requirements(EXTRAS["cpu"]))


@pytest.mark.parametrize(("torchrec", "torch"), versions.SUPPORTED.items())
def test_the_cpu_extra_admits_exactly_the_supported_versions(torchrec: str, torch: str) -> None:
    cpu = _requirements(EXTRAS["cpu"])
    assert cpu["torch"].specifier.contains(f"{torch}.1")
    assert cpu["fbgemm-gpu-cpu"].specifier.contains(f"{torchrec}.0")
    for outside in ("2.10.1", "2.15.0"):
        assert not cpu["torch"].specifier.contains(outside)
    for outside in ("1.5.0", "1.10.0"):
        assert not cpu["fbgemm-gpu-cpu"].specifier.contains(outside)


def test_the_cuda_extra_names_the_newest_supported_set() -> None:
    torchrec, torch = list(versions.SUPPORTED.items())[-1]
    assert [str(line) for line in EXTRAS["cuda"]] == [
        f"torch=={torch}.*",
        f"torchrec=={torchrec}.*",
        f"fbgemm-gpu=={torchrec}.*",
    ]


def test_the_makefile_installs_a_supported_pair_and_tests_the_oldest_and_the_newest() -> None:
    def minor(version: str) -> str:
        return ".".join(version.split(".")[:2])

    pairs = [(minor(torchrec), minor(torch)) for torch, torchrec in _pairs("VERSIONS")]
    every = list(versions.SUPPORTED.items())
    assert pairs == [every[0], every[-1]]
    assert (minor(_makefile("TORCHREC")), minor(_makefile("TORCH"))) in every


def test_the_doctor_knows_the_pins() -> None:
    assert EXTRAS["launch"] == [f"torchx=={versions.TORCHX}"]
    assert (
        str(_requirements(EXTRAS["cpu"])["torchmetrics"].specifier) == f"=={versions.TORCHMETRICS}"
    )


@pytest.mark.parametrize("version", [(3, 9), (3, 10), (3, 11), (3, 12), (3, 13)])
def test_the_doctor_and_pip_accept_the_same_pythons(version: tuple[int, int]) -> None:
    accepted = Requirement(f"python{PROJECT['requires-python']}").specifier
    dotted = ".".join(map(str, version))
    assert (doctor.check_python(version).level == "ok") == accepted.contains(dotted)


def test_setup_refuses_an_unsupported_python(tmp_path: Path) -> None:
    fake = tmp_path / "python3.13"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    done = _make("setup", f"PYTHON={fake}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert f"needs Python 3.10 to 3.12, but '{fake}' is none" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_setup_names_the_package_that_provides_venv(tmp_path: Path) -> None:
    fake = tmp_path / "python3"
    fake.write_text(
        f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n'
    )
    fake.chmod(0o755)
    done = _make("setup", f"PYTHON={fake}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    major, minor = sys.version_info[:2]
    assert f"apt-get install python{major}.{minor}-venv" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_default_setup_never_asks_pip_to_resolve_torchrec(tmp_path: Path) -> None:
    done = _make("-n", "setup", f"VENV={tmp_path}/venv", "TORCH=2.11.0", "TORCHREC=1.6.1")
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert len(installs) == 3, done.stdout
    assert "'fbgemm-gpu-cpu==1.6.*'" in installs[1]
    assert all(("torchrec==" in line) == ("--no-deps" in line) for line in installs)


def test_the_doctor_command_works_with_a_broken_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open')\n")
    done = subprocess.run(
        [sys.executable, "-m", "torchrec_fmp.cli", "doctor"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "import and run: ImportError: libtorch.so: cannot open" in done.stdout
