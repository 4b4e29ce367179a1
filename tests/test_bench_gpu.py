"""What measures a GPU runs dry on any machine, and goes on without packages that a GPU's image may lack."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.goals import GOALS, Reached

ROOT = Path(__file__).parent.parent
LACKING = "zmq,deepspeed,mpi4py,pydantic,llguidance,msgpack,psutil,rich,yaml,pytest,safetensors,transformers"
WITHOUT = """
import importlib, sys
from importlib.machinery import PathFinder
lacking = sys.argv[1].split(",")
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in lacking else super().find_spec(name, path, target)
sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
sys.argv = ["bench", "--dry-run"]
sys.exit(importlib.import_module("MODULE").main())
"""


def dry_run(module: str, lacking: str) -> tuple[int, str]:
    """The exit code and the output without these packages."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT.replace("MODULE", module), lacking]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.returncode, done.stdout


def test_kernels_need_torch_and_triton_alone() -> None:
    pytest.importorskip("triton")
    code, said = dry_run("bench.gpu", LACKING)
    assert code == 1
    assert "rounds and jobs left out: " in said and "tests left out: pytest" in said
    assert "ours, paged, int8 cache" in said and "tiny: 96 x 256" in said
    assert all(goal.what in said[said.index("the worst of") :] for goal in GOALS.values())


@pytest.mark.parametrize("jobs", [True, False])
def test_rounds_need_no_packages_for_messages(jobs: bool) -> None:
    """Nor do whole jobs need those of a launcher."""
    code, said = dry_run("bench.gpu_rounds", "zmq,deepspeed,mpi4py,llguidance,pytest" + ",msgpack,psutil" * (not jobs))
    assert code == 0 and said[said.index("rounds\n") :].count("\n| 64 | 2 | ") == 2
    assert ("whole jobs left out: " in said) != jobs and said.count(" + ngram | ") == 2 * jobs


def test_a_table_can_be_tuned() -> None:
    """By the steps that a card takes, and it comes out as a table that can be read."""
    pytest.importorskip("triton")
    from runtime.kernels.gpu.table import parse

    code, said = dry_run("bench.tune", LACKING)
    assert code == 0 and set(parse(said[said.index("{\n") :]).attention) == {16, 32}


def test_goals_go_by_the_worst() -> None:
    reached = Reached()
    for value in (0.9, 0.7, 0.85):
        reached.add("bandwidth", value)
        reached.add("idle", value / 20)
    lines = {line.split(" | ")[0]: line for line in reached.table().splitlines()}
    assert "| 70% | >= 80% | no |" in lines[f"| {GOALS['bandwidth'].what}"]
    assert "| 4% | <= 5% | yes |" in lines[f"| {GOALS['idle'].what}"]
    assert "| not measured | >= 1.60x | - |" in lines[f"| {GOALS['64'].what}"]
