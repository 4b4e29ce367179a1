"""A whole job in one process: coordinator, ranks and engines as they are, lists in place of sockets and files.

What a device takes for a job, where ZeroMQ and a launcher aren't installed; it leaves out what those cost.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoTokenizer

from configs.schema import RunConfig
from runtime.coordinator import Coordinator
from runtime.engine import Engine
from runtime.events import Event, Finished, NoMoreRequests, Refused, Submit
from runtime.group import Limits
from runtime.messages import Hello, Message, Plan, Stop
from runtime.model import Model
from runtime.request import Completion, Request, SamplingParams
from runtime.wire import decode, encode
from workers.build import Place, build
from workers.models import Models
from workers.rank import Rank

if TYPE_CHECKING:
    from workers.transport import Client


class Mailbox:
    """Stands in for a rank's socket: what it sends is kept as bytes until someone looks."""

    def __init__(self) -> None:
        self.sent: deque[list[bytes]] = deque()

    def send(self, message: Message) -> None:
        self.sent.append(encode(message))


@dataclass(frozen=True, slots=True)
class Course:
    """How a job went: its completions by (index, copy), and the plans that were carried out."""

    completions: dict[tuple[int, int], Completion]
    plans: list[Plan]


def drive(
    machine: Coordinator, members: Sequence[tuple[Mailbox, Hello]], requests: Iterable[Request],
    carry_out: Callable[[Plan], object],
) -> Course:  # fmt: skip
    """Runs all requests on the one group whose members' mailboxes these are; all of them carry out a plan in `carry_out`."""
    course = Course({}, [])
    pending: deque[Plan] = deque()

    def act(event: Event) -> None:
        for action in machine.handle(event):
            assert not isinstance(action, Refused), action
            if isinstance(action, Finished):
                name = action.completion.index, action.completion.copy
                assert name not in course.completions
                course.completions[name] = action.completion
            elif isinstance(action.message, Plan):
                pending.append(cast(Plan, decode(encode(action.message))))

    for _, hello in members:
        act(hello)
    for request in requests:
        act(Submit(request))
    act(NoMoreRequests())
    while pending:
        course.plans.append(pending.popleft())
        carry_out(course.plans[-1])
        for mailbox, _ in members:
            while mailbox.sent:
                act(cast(Event, decode(mailbox.sent.popleft())))
    assert machine.stop == Stop(0, "every request is finished"), machine.stop
    return course


@dataclass(frozen=True, slots=True)
class Numbers:
    """Of one job."""

    tokens_per_second: float
    mean_acceptance_length: float
    outputs: dict[int, tuple[int, ...]]


def start(config: RunConfig, models: Models) -> tuple[Engine, Hello]:
    """The only rank's engine, with models that are loaded."""
    return build(config, Place(0, 0, [(0,)], 0, 1, True, "inprocess"), lambda *_, **__: models)


def run(config: RunConfig, requests: Iterable[Request], models: Models) -> Numbers:
    """Runs all requests on models that are loaded."""
    engine, hello = start(config, models)
    mailbox = Mailbox()
    rank = Rank(0, True, "group", engine, cast("Client", mailbox))
    machine = Coordinator(groups=[(0,)], limits=Limits.of(config), decode=lambda tokens: "")
    since = time.perf_counter()
    course = drive(machine, [(mailbox, hello)], requests, rank.carry_out)
    seconds = time.perf_counter() - since
    outputs = {index: completion.tokens for (index, _), completion in course.completions.items()}
    return Numbers(sum(map(len, outputs.values())) / seconds, machine.stats.mean_acceptance_length, outputs)


def demo_requests(model: Path, prompts: Path, count: int, new_tokens: int) -> list[Request]:
    """Greedy continuations of the first prompts of a batch file."""
    bodies = [json.loads(line)["body"] for line in prompts.read_text().splitlines()]
    return greedy(model, [body["prompt"] for body in bodies if "prompt" in body][:count], new_tokens)


def greedy(model: Path, texts: list[str], new_tokens: int) -> list[Request]:
    """Requests for greedy continuations of exactly so many tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    return [Request(index, tuple(tokenizer(text).input_ids), params) for index, text in enumerate(texts)]


def two_cells(name: str, model: Model, settings: dict[str, Any], requests: list[Request], batch: int) -> list[list[str]]:
    """Of a model, without drafts and with n-gram drafts: its name, tokens/s, acceptance length, outputs that are the same as
    without drafts. settings: of `RunConfig.model`."""
    lines: list[list[str]] = []
    plain: dict[int, tuple[int, ...]] = {}
    for method in ("none", "ngram"):
        config = RunConfig.model_validate({
            "model": settings,
            "speculation": {"method": method, "num_speculative_tokens": 5},
            "engine": {"device": model.device.type, "max_num_seqs": batch, "threads": torch.get_num_threads()},
        })  # fmt: skip
        numbers = run(config, requests, Models(model, None, None))
        plain = plain or numbers.outputs
        same = sum(numbers.outputs[index] == tokens for index, tokens in plain.items())
        rate, accepted = f"{numbers.tokens_per_second:.0f}", f"{numbers.mean_acceptance_length:.2f}"
        lines.append([name + " + ngram" * (method == "ngram"), rate, accepted, f"{same} of {len(requests)}"])
    return lines
