"""The public names: few, importable without transformers, and what the documents say they are."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import semq_state

ROOT = Path(__file__).parent.parent


def _exported() -> set[str]:
    tree = ast.parse((ROOT / "semq_state" / "__init__.py").read_text())
    return {
        alias.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
        if alias.asname
    }


def test_public_names_fit_one_screen() -> None:
    names = _exported()
    assert {"capture", "snapshot_of", "save", "load", "inspect", "restore", "verify"} <= names
    assert len(names) <= 44
    assert all(hasattr(semq_state, name) for name in names)


def test_functions_are_not_hidden_by_their_folders() -> None:
    import semq_state.capture.session
    import semq_state.restore.checks

    assert callable(semq_state.capture)
    assert callable(semq_state.restore)


def test_importing_needs_no_transformers() -> None:
    words = "import sys, semq_state; assert 'transformers' not in sys.modules; semq_state.capture"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_function_has_an_example() -> None:
    functions = {name for name in _exported() if not isinstance(getattr(semq_state, name), type)}
    for name in functions - {"supports", "calibrate"}:
        assert "Example:" in (getattr(semq_state, name).__doc__ or ""), name


def test_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert semq_state.__version__ == version("semq-state")


def test_no_pickle_and_no_eval_in_the_library() -> None:
    forbidden = {"pickle", "eval", "exec", "__import__", "globals", "marshal", "shelve"}
    for path in (ROOT / "semq_state").rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        imports = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert not forbidden & (names | imports), path
