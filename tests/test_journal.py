"""The journal: nothing lost and nothing twice, wherever a process or a disk ends."""

import errno
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher.batch import Scan, scan
from launcher.journal import DuplicateRow, ForeignOutput, Journal, JournalError, OutputInUse, TornRow, row_id
from launcher.results import error_row

ROOT = Path(__file__).parent.parent
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_scan(directory: Path, requests: int, name: str = "in.jsonl") -> Scan:
    path = directory / name
    path.write_text("".join(json.dumps({"custom_id": f"id {i}"}) + "\n" for i in range(requests)))
    return scan(path)


def make_row(index: int, text: str = "text") -> dict[str, Any]:
    return {"id": row_id(index), "custom_id": f"id {index}", "response": {"body": text}, "error": None}


def indices(output: Path) -> list[int]:
    """The requests that have a row, in the file's order, read without the journal's help."""
    return [int(json.loads(line)["id"].removeprefix("quasar-")) for line in output.read_bytes().splitlines()]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_a_job_in_two_halves(tmp_path: Path, output: Path, seed: int) -> None:
    draw = random.Random(seed)
    found = make_scan(tmp_path, 100)
    order = draw.sample(range(100), 100)
    with Journal.open(output, found, "model x") as journal:
        assert (journal.remaining, journal.resumed) == (100, 0)
        journal.append([])
        journal.append([make_row(order[0])])
        journal.append(make_row(i, "ü\u2028\n" * draw.randrange(9)) for i in order[1:40])
        journal.append([error_row(order[40], None, "code", "message")])
        assert (journal.remaining, journal.failed) == (59, 1)
    with Journal.open(output, found, "model x") as journal:
        assert (journal.remaining, journal.resumed, journal.failed) == (59, 41, 1)
        assert [i for i in range(100) if journal.done(i)] == sorted(order[:41])
        journal.append(make_row(i) for i in range(100) if not journal.done(i))
        assert journal.remaining == 0
    assert indices(output) == order[:41] + sorted(order[41:])
    assert len(output.read_text().splitlines()) == 100  # by any reader's idea of a line


def test_the_sidecar_says_whose_rows_these_are(tmp_path: Path, output: Path) -> None:
    found = make_scan(tmp_path, 3)
    Journal.open(output, found, "model x").close()
    sidecar = json.loads((tmp_path / "out.jsonl.job").read_text())
    assert sidecar == {"version": 1, "input_sha256": found.sha256, "requests": 3, "fingerprint": "model x"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.job"]


@pytest.mark.parametrize("twin", ["path", "symlink", "hardlink"])
def test_one_output_serves_one_job_at_a_time(tmp_path: Path, output: Path, twin: str) -> None:
    found = make_scan(tmp_path, 3)
    other = output if twin == "path" else tmp_path / "twin.jsonl"
    with Journal.open(output, found, "x") as journal:
        if twin == "symlink":
            other.symlink_to(output)
        elif twin == "hardlink":
            other.hardlink_to(output)
        with pytest.raises(OutputInUse, match="another job is writing"):
            Journal.open(other, found, "x")
        journal.append([make_row(0)])
    if twin != "hardlink":  # whose sidecar would be another
        with Journal.open(other, found, "x") as journal:
            assert journal.resumed == 1


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize(
    ("requests", "fingerprint", "difference"),
    [
        (4, "model x", "input_sha256 was .* requests was 3 and is 4"),
        (3, "model y", "fingerprint was 'model x' and is 'mo"),
    ],
)
def test_results_of_another_job_are_left_alone(
    tmp_path: Path, output: Path, rows: int, requests: int, fingerprint: str, difference: str
) -> None:
    with Journal.open(output, make_scan(tmp_path, 3), "model x") as journal:
        journal.append(make_row(i) for i in range(rows))
    before = output.read_bytes()
    with pytest.raises(ForeignOutput, match=rf"{difference}.*give another output, or delete"):
        Journal.open(output, make_scan(tmp_path, requests, "other.jsonl"), fingerprint)
    assert output.read_bytes() == before


@pytest.mark.parametrize("sidecar", [None, b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_file_that_nobody_vouches_for_is_left_alone(tmp_path: Path, output: Path, sidecar: bytes | None) -> None:
    output.write_text("dear diary")
    if sidecar is not None:
        (tmp_path / "out.jsonl.job").write_bytes(sidecar)
    with pytest.raises(ForeignOutput, match="or delete"):
        Journal.open(output, make_scan(tmp_path, 3), "x")
    assert output.read_text() == "dear diary"


def test_the_input_is_no_output(tmp_path: Path) -> None:
    found = make_scan(tmp_path, 3)
    before = found.path.read_bytes()
    with pytest.raises(ForeignOutput):
        Journal.open(found.path, found, "x")
    assert found.path.read_bytes() == before


@pytest.mark.parametrize("where", ["nowhere/out.jsonl", ""])
def test_an_output_that_cannot_be_opened(tmp_path: Path, where: str) -> None:
    with pytest.raises(JournalError, match="cannot open the output"):
        Journal.open(tmp_path / where, make_scan(tmp_path, 3), "x")


def test_a_request_has_one_row(tmp_path: Path, output: Path) -> None:
    with Journal.open(output, make_scan(tmp_path, 5), "x") as journal:
        journal.append([make_row(1)])
        for rows in ([make_row(1)], [make_row(2), make_row(3), make_row(2)]):
            with pytest.raises(DuplicateRow, match="has a row"):
                journal.append(rows)
        assert journal.remaining == 4 and not journal.done(3)
        with pytest.raises(JournalError, match="names no request of this job"):
            journal.append([make_row(5)])
        journal.append([make_row(2)])  # a refused row changes nothing
    assert indices(output) == [1, 2]
    with pytest.raises(JournalError, match="is closed"):
        journal.append([make_row(3)])


# What a dying process leaves


@contextmanager
def half_done(rows: int, requests: int) -> Iterator[tuple[Path, Scan]]:
    """A directory of its own for each of hypothesis's examples."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        found = make_scan(directory, requests)
        with Journal.open(directory / "out.jsonl", found, "x") as journal:
            journal.append(make_row(i, "é" * i) for i in range(rows))
        yield directory / "out.jsonl", found


@settings(max_examples=60, deadline=None, database=None)
@example(1, b"", False)  # a row that is whole but for its newline was never reported
@given(st.integers(0, 10**9), st.binary(max_size=20).filter(lambda tail: b"\n" not in tail), st.booleans())
def test_a_torn_tail_is_cut_off_and_computed_again(cut: int, garbage: bytes, ended: bool) -> None:
    with half_done(6, 9) as (output, found):
        whole = output.read_bytes()
        kept = whole[: len(whole) - cut % (len(whole) + 1)]
        # A line that ends and still is no row is what a disk leaves that wrote the end of a row but not its middle.
        torn = garbage + b"\0\n" if ended else garbage
        output.write_bytes(kept + torn)
        survivors = kept.count(b"\n")
        with Journal.open(output, found, "x") as journal:
            assert journal.resumed == survivors and indices(output) == list(range(survivors))
            journal.append(make_row(i, "é" * i) for i in range(9) if not journal.done(i))
        assert indices(output) == list(range(9)) and output.read_bytes().startswith(whole)


@pytest.mark.parametrize("damage", [b"", b"\0" * 5, b'{"id": "quasar-000', b"[]"])
def test_a_torn_line_in_the_middle_is_named(damage: bytes) -> None:
    with half_done(4, 9) as (output, found):
        lines = output.read_bytes().splitlines()
        lines[2] = damage
        output.write_bytes(b"\n".join(lines) + b"\n")
        before = output.read_bytes()
        with pytest.raises(TornRow, match="line 3 is no row"):
            Journal.open(output, found, "x")
        assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        (make_row(1), DuplicateRow, "line 5 is a second row of request 1"),
        (make_row(9), JournalError, "line 5 has the id 'quasar-00000009'"),
        ({"id": "cmpl-7"}, JournalError, "line 5 has the id 'cmpl-7'"),
        ({}, JournalError, "line 5 has the id None"),
    ],
)
def test_rows_that_are_not_this_jobs_are_named(extra: Any, error: type[Exception], message: str) -> None:
    with half_done(4, 9) as (output, found):
        with output.open("a") as file:
            file.write(json.dumps(extra) + "\n")
        with pytest.raises(error, match=message):
            Journal.open(output, found, "x")


WORKER = """
import random, sys
from pathlib import Path
from launcher.batch import scan
from launcher.journal import Journal, row_id

draw = random.Random(int(sys.argv[2]))
directory = Path(sys.argv[1])
with Journal.open(directory / "out.jsonl", scan(directory / "in.jsonl"), "x") as journal:
    todo = [i for i in range(journal.num_requests) if not journal.done(i)]
    print("open", flush=True)
    while todo:
        some, todo = todo[: (n := draw.randrange(1, 4))], todo[n:]
        rows = [{"id": row_id(i), "text": "x" * draw.randrange(300_000), "error": None} for i in some]
        journal.append(rows)
        print(*some, flush=True)
"""


def test_killed_at_any_moment_nothing_is_lost_or_twice(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    requests, kills, finished, torn = 120, 8, set[int](), 0
    found = make_scan(tmp_path, requests)
    output = tmp_path / "out.jsonl"
    for attempt in range(kills + 1):
        command = [sys.executable, "-c", WORKER, str(tmp_path), str(draw.randrange(2**31))]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None and worker.stdout.readline() == "open\n"
            if attempt < kills:
                for _ in range(draw.randrange(4)):
                    finished.update(map(int, worker.stdout.readline().split()))
                # The moment is anywhere in an append; whichever it is, the same must hold.
                until = time.perf_counter() + draw.random() * 0.003
                while time.perf_counter() < until:
                    pass
                worker.kill()
            finished.update(int(index) for index in worker.stdout.read().split())
        data = output.read_bytes()
        torn += not data.endswith(b"\n")
        rows = [json.loads(line) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
        written = [int(row["id"].removeprefix("quasar-")) for row in rows]
        assert finished <= set(written), "a row that was reported is gone"
        assert len(written) == len(set(written)), "a row is there twice"
    print(f"{torn} of {kills} kills tore a row")
    assert worker.returncode == 0 and sorted(written) == list(range(requests))
    with Journal.open(output, found, "x") as journal:
        assert journal.remaining == 0


# What a full disk leaves


@pytest.mark.parametrize("written", [0, 1, 100, 10**9])
@pytest.mark.parametrize("truncates", [True, False])
def test_a_full_disk_is_an_error_and_can_be_repaired(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, written: int, truncates: bool
) -> None:
    found, real_write = make_scan(tmp_path, 9), os.write
    room = [written]

    def write(descriptor: int, data: Any) -> int:
        if not room[0]:
            raise FULL
        count = real_write(descriptor, data[: room[0]])
        room[0] -= min(room[0], count)
        return count

    def refuse(*_: Any) -> None:
        raise FULL

    with Journal.open(output, found, "x") as journal:
        journal.append([make_row(0), make_row(1)])
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            patch.setattr(os, "fsync", refuse)
            if not truncates:
                patch.setattr(os, "ftruncate", refuse)
            with pytest.raises(JournalError, match="No space left on device; 7 requests have no row yet"):
                journal.append([make_row(2), make_row(3)])
        assert not journal.done(2)
        with pytest.raises(JournalError, match="No space left"):
            journal.append([make_row(2)])
    with Journal.open(output, found, "x") as journal:
        # Rows that got there whole may count, though they were never reported; torn ones may not.
        assert journal.resumed == (2 if truncates else {0: 2, 1: 2, 100: 3, 10**9: 4}[written])
        journal.append(make_row(i) for i in range(9) if not journal.done(i))
    assert sorted(indices(output)) == list(range(9))


def test_a_real_limit_on_the_file(tmp_path: Path, output: Path) -> None:
    found = make_scan(tmp_path, 3)
    script = f"""
import resource
from launcher.batch import scan
from launcher.journal import Journal, JournalError, row_id
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
journal = Journal.open({str(output)!r}, scan({str(found.path)!r}), "x")
row = lambda i: {{"id": row_id(i), "text": "x" * 6_000, "error": None}}
journal.append([row(0)])
try:
    journal.append([row(1)])
except JournalError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "cannot write to" in done.stdout and "File too large; 2 requests" in done.stdout, done.stderr
    assert indices(output) == [0]
    with Journal.open(output, found, "x") as journal:
        assert journal.resumed == 1


@pytest.mark.parametrize("how", ["unlink", "rename", "replace"])
def test_rows_that_nobody_would_find_are_an_error(tmp_path: Path, output: Path, how: str) -> None:
    with Journal.open(output, make_scan(tmp_path, 9), "x") as journal:
        journal.append([make_row(0)])
        if how == "unlink":
            output.unlink()
        else:
            output.rename(tmp_path / "elsewhere.jsonl")
            if how == "replace":
                output.write_text("")
        with pytest.raises(JournalError, match=r"No such file|was moved or replaced"):
            journal.append([make_row(1)])
        assert not journal.done(1)
