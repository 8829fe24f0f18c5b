"""Structure of the package, except the direction of imports, which `make lint` checks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

import torchrec_fmp

PACKAGE = Path(torchrec_fmp.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LOOSE = {"__init__.py", "paths.py", "strict.py"}
# Private names of projects other than TorchRec and FBGEMM, each in the one file that needs it.
ELSEWHERE = {
    "embeddings/compiled.py": {"_compiled_call_impl", "_modules", "_orig_mod"},  # torch
    "paths.py": {"_path_handlers"},  # iopath
    "reshard/itinerary.py": {"_fields"},  # of a NamedTuple, documented
    "strict.py": {"_actions"},  # argparse
}


@lru_cache(maxsize=1)
def own_names() -> frozenset[str]:
    """Attributes, functions and classes that the package itself defines or sets."""
    defined = set()
    for node in (node for file in FILES for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            defined.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
    return frozenset(defined)


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private attributes that are read from or set on anything except `self` and `cls`."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
            and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        ):
            yield node.attr


def strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@lru_cache(maxsize=1)
def seam_names() -> set[str]:
    """Private names that the module of seams touches, by attribute or by string."""
    tree = ast.parse((PACKAGE / "embeddings/seams.py").read_text())
    return {
        text for text in strings(tree) if text.startswith("_") and text.strip("_").isidentifier()
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_private_names_of_other_projects_are_used_only_in_their_designated_file(file: Path) -> None:
    place = str(file.relative_to(PACKAGE))
    if place == "embeddings/seams.py":
        return
    tree = ast.parse(file.read_text())
    ours = own_names() - seam_names() | ELSEWHERE.get(place, set())
    foreign = set(private_names(tree)) - ours
    assert not foreign
    assert not set(strings(tree)) & seam_names()


def test_only_paths_and_strict_configuration_are_top_level_modules() -> None:
    assert {file.name for file in PACKAGE.glob("*.py")} == LOOSE


def test_every_folder_has_a_docstring() -> None:
    for folder in {file.parent for file in FILES}:
        document = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert document, folder


def test_no_file_has_more_than_400_lines() -> None:
    long = {str(file.relative_to(PACKAGE)): n for file in FILES if (n := lines_of(file)) > 400}
    assert not long


def lines_of(file: Path) -> int:
    return len(file.read_text().splitlines())
