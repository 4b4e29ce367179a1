"""What every peer's program does: takes a job, loads, warms up, generates against the clock, says what came out.

Runs in the peer's environment, so it imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

Generate = Callable[[list[list[int]], int], list[list[int]]]  # up to `batch` prompts, new tokens of each -> continuations


@dataclass(frozen=True)
class Job:
    """model: what the peer loads. prompts: token ids. Every prompt is continued greedily by exactly max_tokens tokens,
    `batch` prompts at a time. speculation: none, ngram or model (which drafts with draft_model), drafts tokens a check."""

    model: str
    prompts: list[list[int]]
    max_tokens: int
    batch: int
    threads: int
    speculation: str
    drafts: int
    draft_model: str | None


@dataclass(frozen=True)
class Result:
    """outputs: the continuations. seconds: from the first prompt to the last token. peak_memory_bytes: resident."""

    outputs: list[list[int]]
    seconds: float
    load_seconds: float
    peak_memory_bytes: int


def run(load: Callable[[Job], Generate]) -> None:
    """Carries out the job in the file that is the first argument, and writes its result to the second.

    The first batch's short continuation is the warm-up.
    """
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    start = time.perf_counter()
    generate = load(job)
    generate(job.prompts[: job.batch], 8)
    ready = time.perf_counter()
    batches = [job.prompts[i : i + job.batch] for i in range(0, len(job.prompts), job.batch)]
    outputs = [output for batch in batches for output in generate(batch, job.max_tokens)]
    seconds = time.perf_counter() - ready
    Path(sys.argv[2]).write_text(json.dumps(asdict(Result(outputs, seconds, ready - start, peak_memory(os.getpid())))))


def peak_memory(process: int) -> int:
    """The most bytes that a process had in memory, and its children that still run."""
    status = Path(f"/proc/{process}/status").read_text()
    own = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    children = [int(word) for path in Path(f"/proc/{process}/task").glob("*/children") for word in path.read_text().split()]
    return own + sum(map(peak_memory, children))
