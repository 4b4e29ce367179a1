"""Whole jobs as a user starts them: processes, launchers, files."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from launcher.results import stable

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LIMIT = 150  # seconds after which a job counts as hung


def launcher_command(launcher: str, ranks: int) -> list[str]:
    """How each launcher starts this many ranks of `launcher/main.py`."""
    port = free_port()
    return {
        "python": [sys.executable, "launcher/main.py"],
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port, "launcher/main.py"],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port, "launcher/main.py"],
        "mpirun": [
            "mpirun", "--allow-run-as-root", "--oversubscribe", "--mca", "btl_vader_single_copy_mechanism", "none",
            "-n", str(ranks), sys.executable, "launcher/main.py",
        ],
    }[launcher]  # fmt: skip


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def available(launcher: str) -> bool:
    return launcher != "mpirun" or shutil.which("mpirun") is not None


def start(command: list[str], directory: Path, *overrides: str, prompts: Path) -> subprocess.Popen[str]:
    """Starts a job in a process group of its own; its files are in `directory`."""
    words = [*command, "--config", "configs/demo/demo.yaml", "--input", str(prompts)]
    words += ["--output", str(directory / "out.jsonl"), "--summary", str(directory / "summary.json")]
    for override in ("engine.device=cpu", *overrides):
        words += ["--set", override]
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, everything it printed) of a job that ends by itself."""
    output, _ = job.communicate(timeout=LIMIT)
    return job.returncode, output


def run(launcher: str, ranks: int, directory: Path, *overrides: str, prompts: Path) -> dict[int, dict[str, Any]]:
    """Runs a job that must succeed; its rows by index, without what depends on time."""
    code, output = finish(start(launcher_command(launcher, ranks), directory, *overrides, prompts=prompts))
    assert code == 0, output
    return rows(directory)


def rows(directory: Path) -> dict[int, dict[str, Any]]:
    """The rows of a job's output by index. Fails on a second row for one request."""
    found: dict[int, dict[str, Any]] = {}
    for line in (directory / "out.jsonl").read_text().splitlines():
        row = stable(json.loads(line))
        index = int(row["id"].rpartition("-")[2])
        assert index not in found, f"request {index} has two rows"
        found[index] = row
    return found


def write_requests(path: Path, count: int, max_tokens: int = 24) -> Path:
    """Demo prompts as requests, every other one sampled with a seed, one with three continuations, the last one a chat."""
    demo = [json.loads(line) for line in (ROOT / "configs/demo/prompts.jsonl").read_text().splitlines()]
    completions = [line for line in demo if line["url"] == "/v1/completions"]
    chats = [line for line in demo if line["url"] != "/v1/completions"]
    with path.open("w") as file:
        for index in range(count):
            line = completions[index % len(completions)] if index < count - 1 else chats[0]
            line = line | {"custom_id": f"request-{index}"}
            line["body"] = line["body"] | {"max_tokens": max_tokens, "temperature": 0.8 * (index % 2), "seed": index}
            line["body"]["n"] = 3 if index == 1 else 1
            file.write(json.dumps(line) + "\n")
    return path
