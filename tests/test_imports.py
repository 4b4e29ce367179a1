"""The order of the packages, what none of them may use, and how long a file may be."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import runtime

ROOT = Path(__file__).resolve().parents[1]
ORDER = ["configs", "runtime", "workers", "launcher"]  # each imports only itself and those to its left
LONGEST = 350  # lines
FOLDERS = [*ORDER, "tests", "bench", "k8s"]
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
PRODUCT = [path for path in FILES if path.relative_to(ROOT).parts[0] not in ("tests", "bench")]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported anywhere, functions included, and by name through importlib."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield node.module or ""
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), name(path))


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    allowed = ORDER[: ORDER.index(package) + 1] if package in ORDER else ORDER
    for module in imports(parse(path)):
        top = module.partition(".")[0]
        assert top not in FOLDERS or top in allowed, f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", [path for path in PRODUCT if path.is_relative_to(ROOT / "runtime")], ids=name)
def test_runtime_knows_no_network_and_no_launcher(path: Path) -> None:
    tops = {module.partition(".")[0] for module in imports(parse(path))}
    assert not tops & {"zmq", "deepspeed", "mpi4py"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_runs_what_came_from_outside(path: Path) -> None:
    tree = parse(path)
    assert not {module.partition(".")[0] for module in imports(tree)} & {"pickle", "cPickle", "dill", "cloudpickle", "marshal"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec")), f"line {node.lineno}"
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                assert keyword.arg != "trust_remote_code" or off, f"line {node.lineno}"
                unsafe = keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and not keyword.value.value
                assert not unsafe and keyword.arg != "allow_pickle", f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST, "a file holds one noun; this one wants to be two"


def test_the_package_under_test_is_this_one() -> None:
    assert runtime.__file__ is not None
    assert Path(runtime.__file__).resolve() == ROOT / "runtime" / "__init__.py"


def test_the_search_finds_imports_wherever_they_hide() -> None:
    tree = ast.parse("def f():\n  from zmq.sugar import x\n  import a, b.c\nimportlib.import_module('d.e')")
    assert sorted(imports(tree)) == ["a", "b.c", "d.e", "zmq.sugar"]
    assert len(PRODUCT) > 20


@pytest.mark.parametrize("module", ["bench.gpu", "bench.gpu_rounds", "runtime.engine", "workers.build"])
def test_a_device_needs_no_launcher_and_no_sockets(module: str) -> None:
    """What measures a GPU must run where only torch and transformers are installed."""
    code = f"import sys; sys.modules['zmq'] = sys.modules['deepspeed'] = sys.modules['mpi4py'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
