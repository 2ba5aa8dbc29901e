"""The house rules that no linter knows."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE_FOLDERS = ("operator", "agent", "crds")
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 500
COMMAND_LINES = {"__main__.py", "cli.py", "crdgen.py"}

# Taken apart, or this file would break its own rule.
PACKAGE_HOSTS = [
    ".".join(labels)
    for labels in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("proxy", "golang", "org"),
        ("sum", "golang", "org"),
        ("npmjs", "org"),
        ("deb", "debian", "org"),
    )
]


def modules() -> Iterator[tuple[Path, ast.Module, str]]:
    """Each module of the shipped code, parsed."""
    for folder in CODE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            yield path.relative_to(ROOT), ast.parse(text), text


def committed_files() -> list[Path]:
    """What git knows; without git (a source archive), all there is but the hidden folders."""
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode == 0:
        names = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        names = [
            path
            for path in ROOT.rglob("*")
            if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
        ]
    return [path for path in names if path.is_file()]


def test_operator_is_no_package() -> None:
    """With an __init__.py it would shadow the standard library's `operator`."""
    assert not (ROOT / "operator" / "__init__.py").exists()


@pytest.mark.parametrize("folder", [".", *CODE_FOLDERS])
def test_the_standard_librarys_operator_is_found(folder: str) -> None:
    """From the root and from inside, where Python looks first."""
    command = [sys.executable, "-c", "import operator; print(operator.__file__)"]
    found = subprocess.run(
        command, cwd=ROOT / folder, capture_output=True, text=True, check=True, timeout=60
    )
    assert ROOT not in Path(found.stdout.strip()).parents or ".venv" in found.stdout


def test_functions_and_files_are_short() -> None:
    """Whoever passes the budget splits; the list says where."""
    too_long = []
    for path, tree, text in modules():
        if (lines := text.count("\n")) > FILE_LINES_MAX:
            too_long.append(f"{path}: {lines} lines, at most {FILE_LINES_MAX}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES_MAX:
                    where = f"{path}:{node.lineno} {node.name}"
                    too_long.append(f"{where}: {lines} lines, at most {FUNCTION_LINES_MAX}")
    assert not too_long, "\n".join(["too long:", *too_long])


def test_every_module_says_what_it_is() -> None:
    """Packages also say what does not belong there."""
    silent = [
        str(path) for path, tree, text in modules() if text.strip() and not ast.get_docstring(tree)
    ]
    silent += [
        str(path) for path, _, text in modules() if path.name == "__init__.py" and not text.strip()
    ]
    assert not silent


def test_only_command_lines_print() -> None:
    """Everything else logs, or raises."""
    printing = [
        f"{path}:{node.lineno}"
        for path, tree, _ in modules()
        if path.name not in COMMAND_LINES
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not printing


def test_no_package_registry_is_named() -> None:
    """Where packages come from is the machine's business: mirrors must work untouched."""
    naming = []
    for path in committed_files():
        text = path.read_bytes().decode(errors="replace")
        naming += [f"{path.relative_to(ROOT)}: {host}" for host in PACKAGE_HOSTS if host in text]
    assert not naming


def test_no_module_is_a_drawer() -> None:
    """`utils` and its like collect what has no place."""
    drawers = {"utils.py", "util.py", "helpers.py", "misc.py"}
    assert not [str(path) for path, _, _ in modules() if path.name in drawers]
