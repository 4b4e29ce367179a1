"""The coordinator's process: requests from a file, plans to the ranks, results to the journal."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from configs import exits
from configs.schema import RunConfig
from launcher.answers import Answers
from launcher.batch import BadRequest, InputError, Scan, parse, scan
from launcher.defaults import Defaults, DefaultsError, read_defaults
from launcher.encoder import Encoder, copies
from launcher.journal import Journal, JournalError
from launcher.progress import Progress
from launcher.results import Writer, error_row
from launcher.summary import PARTS, Summary, SummaryError
from launcher.vocabulary import Vocabulary
from runtime.coordinator import Coordinator
from runtime.events import Finished, Refused
from runtime.group import Limits
from runtime.messages import Failure, Stop
from runtime.request import Request, SpeculationStats
from runtime.tokenizer import TokenizerError, load_tokenizer
from workers.shell import Shell
from workers.transport import Server


def fingerprint(config: RunConfig, defaults: Defaults) -> str:
    """What the text of a result depends on beside its request; results of two fingerprints don't mix in one output."""
    model = config.verifier.arithmetic | {"target": Path(config.verifier.target).resolve().name}
    engine = config.engine
    job = {
        "seed": config.seed, "max_model_len": engine.max_model_len, "defaults": asdict(defaults),
        "reproducible": engine.reproducible, "kv_cache_dtype": engine.kv_cache_dtype,
    }  # fmt: skip
    return json.dumps(model | job, sort_keys=True)


def system_fingerprint(target: Path, ranks: set[str], defaults: Defaults) -> str:
    """What rows are marked with: a short hash of what ranks say of themselves, of the tokenizer, and of the defaults."""
    state = blake2b(json.dumps([sorted(ranks), asdict(defaults)]).encode(), digest_size=6)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        if (target / name).is_file():
            state.update(f"\0{name}\0".encode() + (target / name).read_bytes())
    return f"fp_{state.hexdigest()}"


class Job:
    """Feeds requests to the machine and keeps what comes out of it."""

    def __init__(
        self,
        config: RunConfig,
        input_: Scan,
        journal: Journal,
        machine: Coordinator,
        tokenizer: Any,
        defaults: Defaults,
    ) -> None:
        self.config, self.input, self.journal, self.machine = config, input_, journal, machine
        self.tokenizer, self.vocabulary, self.defaults = tokenizer, Vocabulary(tokenizer), defaults
        self.output_tokens = self.prompt_tokens = 0
        self.started: float | None = None
        self.progress = Progress(len(input_), journal.resumed)
        self._answers = Answers()
        self._writer: Writer | None = None

    def requests(self) -> Iterator[Request | dict[str, Any]]:
        """What is still to be done, in order, every continuation a request; a line that can't be run is an error row."""
        self.started = time.monotonic()
        facts = next(iter(self.machine.hellos.values()))
        encoder = Encoder(
            self.tokenizer, facts.max_model_len, facts.vocab_size, self.config.seed, self.defaults, facts.end_tokens
        )
        todo = (index for index in range(len(self.input)) if not self.journal.done(index))
        for index, raw in self.input.lines(todo):
            try:
                call = parse(index, raw)
                request = encoder.encode(call)
            except BadRequest as error:
                yield error_row(index, error.custom_id, error.code, error.message)
                continue
            self._answers.expect(call, request)
            yield from copies(request, call.body.copies)

    def keep(self, outcomes: list[Any]) -> None:
        """Makes outcomes last - completions, refusals, rows - then shows them."""
        rows: list[dict[str, Any]] = []
        for outcome in outcomes:
            if isinstance(outcome, Finished):
                self.output_tokens += len(outcome.completion.tokens)
                answer = self._answers.take(outcome.completion)
                if answer is not None:
                    self.prompt_tokens += len(answer.prompt)
                    rows.append(self.writer.row(answer.call, answer.prompt, answer.whole, int(time.time())))
            elif isinstance(outcome, Refused):
                call = self._answers.refuse(outcome.index)
                if call is not None:
                    rows.append(error_row(outcome.index, call.custom_id, "capacity_exceeded", outcome.reason))
            else:
                rows.append(outcome)
        self.journal.append(rows)
        done = len(self.input) - self.journal.remaining
        self.progress.update(done=done, tokens=self.output_tokens, failed=self.journal.failed, stats=self.machine.stats)

    @property
    def writer(self) -> Writer:
        """Makes the rows, once the ranks have said what they run."""
        if self._writer is None:
            target = Path(self.config.verifier.target)
            ranks = {hello.fingerprint for hello in self.machine.hellos.values()}
            self._writer = Writer(target.name, system_fingerprint(target, ranks, self.defaults), self.vocabulary)
        return self._writer

    def summary(self) -> Summary:
        """The run so far."""
        farewells = self.machine.farewells.values()
        seconds = {part: sum(f.seconds.get(part, 0.0) for f in farewells) / max(1, len(farewells)) for part in PARTS}
        return Summary(
            requests=len(self.input),
            failed=self.journal.failed,
            resumed=self.journal.resumed,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            seconds=0.0 if self.started is None else time.monotonic() - self.started,
            rounds=self.machine.num_rounds,
            stats=self.machine.stats,
            inner=self._inner() if self.config.certified else None,
            seconds_by_part=seconds,
            peak_memory_bytes={f.rank: f.peak_memory for f in farewells},
        )

    def _inner(self) -> SpeculationStats:
        """What speculation did for the int4 model, over all groups."""
        total = SpeculationStats()
        for first, *_ in self.machine.groups:
            if first in self.machine.farewells:
                total.add(self.machine.farewells[first].inner)
        return total


def coordinate(config: RunConfig, groups: list[tuple[int, ...]], endpoint: str) -> int:
    """Runs a job from file to file. Returns the exit code; every rank gets the same one."""
    machine = Coordinator(groups=groups, limits=Limits.of(config), decode=lambda tokens: "")
    with Server(endpoint, config.coordination.curve) as server:
        shell = Shell(machine, server, config.coordination)
        terminated = Failure(-1, exits.TERMINATED, "the coordinator was told to stop")
        signal.signal(signal.SIGTERM, lambda *_: shell.interrupt(terminated))
        try:
            job = prepare(config, machine)
        except (InputError, JournalError, TokenizerError, DefaultsError) as error:
            print(f"quasar: {error}", file=sys.stderr, flush=True)
            break_off(shell, machine, exits.REFUSED, error)
            return exits.REFUSED
        with job.journal, job.progress:
            try:
                shell.run(job.requests(), job.keep)
            except (InputError, JournalError) as error:
                break_off(shell, machine, exits.INCOMPLETE, error)
        return finish(config, job)


def break_off(shell: Shell, machine: Coordinator, code: int, error: Exception) -> None:
    """Ends the job for a cause outside of the ranks, and lets them know."""
    machine.stop = Stop(code, str(error))
    shell.run(iter(()), lambda outcomes: None)


def prepare(config: RunConfig, machine: Coordinator) -> Job:
    """Checks input and output before any work. Raises InputError, JournalError, TokenizerError, DefaultsError."""
    if config.files.input is None or config.files.output is None:
        raise InputError("no input or no output: give --input and --output, or files.input and files.output")
    requests = scan(config.files.input)
    for path in filter(None, (config.files.output, config.files.summary)):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder of {path}: {error.strerror}") from error
    defaults = read_defaults(config.verifier.target, config.sampling.defaults)
    journal = Journal.open(config.files.output, requests, fingerprint(config, defaults))
    job = Job(config, requests, journal, machine, load_tokenizer(config.verifier.target), defaults)
    machine.decode, machine.decode_special = job.vocabulary.decode, job.vocabulary.decode_special
    return job


def finish(config: RunConfig, job: Job) -> int:
    """Writes the summary, says why a job ended early, and gives the exit code."""
    stop = job.machine.stop
    code = stop.code if stop is not None else 1
    if stop is not None and code != 0:
        advice = "" if code == exits.REFUSED else "; start the same command again to finish the rest"
        print(f"quasar: {stop.reason}{advice}", file=sys.stderr, flush=True)
    if code == 0 and job.journal.remaining:
        print(f"quasar: {job.journal.remaining} requests have no result", file=sys.stderr, flush=True)
        code = exits.INCOMPLETE
    if config.files.summary is not None:
        try:
            job.summary().write(config.files.summary)
        except SummaryError as error:
            print(f"quasar: {error}", file=sys.stderr, flush=True)
            return code or exits.REFUSED
    return code


def die_with_parent() -> None:
    """Asks Linux for SIGTERM when the process that started this one dies, so that a coordinator is never left behind."""
    import ctypes

    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
