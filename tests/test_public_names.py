"""The public names of the package resolve lazily, and to the objects that they name."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from types import FunctionType, ModuleType

import pytest

import torchrec_fmp


def submodules() -> list[ModuleType]:
    names = pkgutil.walk_packages(torchrec_fmp.__path__, "torchrec_fmp.")
    return [importlib.import_module(module.name) for module in names]


def in_a_new_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_the_objects_of_their_modules_even_with_all_modules_imported() -> None:
    modules = submodules()
    assert len(modules) > 30
    for name in torchrec_fmp.__all__:
        value = getattr(torchrec_fmp, name)
        assert not isinstance(value, ModuleType), name
        assert value.__name__ == name
        assert value.__module__.startswith("torchrec_fmp.")
    assert isinstance(torchrec_fmp.prune, FunctionType)


def test_all_public_names_are_listed_by_dir() -> None:
    assert set(torchrec_fmp.__all__) <= set(dir(torchrec_fmp))
    assert len(set(torchrec_fmp.__all__)) == len(torchrec_fmp.__all__)


def test_type_checkers_see_the_names_that_exist_at_run_time() -> None:
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(torchrec_fmp))
    declared = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    homes = {name: f"torchrec_fmp.{home}" for name, home in torchrec_fmp._HOMES.items()}
    assert declared == homes


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="'torchrec_fmp' has no attribute 'prnue'"):
        _ = torchrec_fmp.prnue


def test_importing_the_package_and_its_command_line_does_not_import_torch() -> None:
    in_a_new_process(
        "import sys, torchrec_fmp, torchrec_fmp.cli\n"
        "assert not {'torch', 'torchrec', 'fbgemm_gpu', 'pyarrow'} & sys.modules.keys()"
    )
