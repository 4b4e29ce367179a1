"""What is shown while a job runs, and the summary it leaves."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from launcher.progress import Progress
from launcher.summary import PARTS, Summary, SummaryError
from runtime.request import SpeculationStats


class Clock:
    """A clock that stands until it is told to go on."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def half_accepted() -> SpeculationStats:
    stats = SpeculationStats()
    stats.count(4, 2)
    return stats


def show(terminal: bool) -> tuple[io.StringIO, Console]:
    file = io.StringIO()
    return file, Console(file=file, force_terminal=terminal, width=120, color_system=None, _environ={})


def test_a_pipe_gets_a_line_now_and_then_and_a_last_one() -> None:
    clock = Clock()
    file, console = show(terminal=False)
    with Progress(200, resumed=50, console=console, clock=clock) as progress:
        for second in range(1, 26):
            clock.now = 100.0 + second
            progress.update(done=50 + second, tokens=1000 * second, failed=second // 20, stats=half_accepted())
    assert file.getvalue().splitlines() == [
        "60/200 requests (30%), 1,000.0 tokens/s, acceptance length 3.00",
        "70/200 requests (35%), 1,000.0 tokens/s, acceptance length 3.00, 1 failed",
        "75/200 requests (38%), 1,000.0 tokens/s, acceptance length 3.00, 1 failed",
    ]
    assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    clock = Clock()
    file, console = show(terminal=True)
    with Progress(200, resumed=50, console=console, clock=clock) as progress:
        assert progress.bar is not None and progress.bar.tasks[0].completed == 50
        clock.now += 2
        progress.update(done=80, tokens=300, stats=half_accepted())
        progress.bar.refresh()
        assert progress.bar.tasks[0].completed == 80
    assert " 80/200" in file.getvalue() and "150.0 tokens/s, acceptance length 3.00" in file.getvalue()
    assert file.getvalue().rstrip().endswith("80/200 requests (40%), 150.0 tokens/s, acceptance length 3.00")


def test_speed_is_of_the_last_while() -> None:
    clock = Clock()
    progress = Progress(10, console=show(terminal=False)[1], clock=clock)
    tokens = 0
    for second in range(1000):
        clock.now += 1
        tokens += 10 if second < 900 else 500
        progress.update(done=0, tokens=tokens)
    assert progress.speed() == pytest.approx(500) and len(progress.samples) < 40


@pytest.mark.parametrize("total", [0, 5])
def test_a_run_with_nothing_to_do(total: int) -> None:
    file, console = show(terminal=False)
    with Progress(total, resumed=total, console=console, clock=Clock()) as progress:
        progress.update(done=total, tokens=0, stats=SpeculationStats())
    share = " (100%)" if total else ""
    assert file.getvalue() == f"{total}/{total} requests{share}, 0.0 tokens/s\n"


def make_summary() -> Summary:
    return Summary(
        requests=10, failed=1, resumed=2, prompt_tokens=50, output_tokens=300, seconds=2.0, rounds=40,
        stats=half_accepted(), peak_memory_bytes={1: 7, 0: 5, 10: 9},
    )  # fmt: skip


def test_a_summary_in_full(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("an older one")
    make_summary().write(path)
    assert json.loads(path.read_text()) == {
        "requests": 10,
        "failed": 1,
        "resumed": 2,
        "prompt_tokens": 50,
        "output_tokens": 300,
        "seconds": 2.0,
        "tokens_per_second": 150.0,
        "rounds": 40,
        "num_draft_tokens": 4,
        "num_accepted_draft_tokens": 2,
        "drafted_per_position": [1, 1, 1, 1],
        "accepted_per_position": [1, 1, 0, 0],
        "acceptance_histogram": [0, 0, 1],
        "mean_acceptance_length": 3.0,
        "draft_acceptance_rate": 0.5,
        "certification": None,
        "seconds_by_part": dict.fromkeys(PARTS, 0.0),
        "peak_memory_bytes": {"0": 5, "1": 7, "10": 9},
    }
    assert list(json.loads(path.read_text())["peak_memory_bytes"]) == ["0", "1", "10"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_summary_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(SummaryError, match="cannot write the summary"):
        make_summary().write(tmp_path / "nowhere" / "summary.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SummaryError, match="cannot write the summary"):
        make_summary().write(tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_summary_names_every_part() -> None:
    with pytest.raises(ValueError, match="seconds_by_part has"):
        Summary(0, 0, 0, 0, 0, 0.0, 0, seconds_by_part={"draft": 1.0})
