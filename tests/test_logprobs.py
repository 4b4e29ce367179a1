"""Log-probabilities from the ranks to the completion: by position, each once, and those of the model itself."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from runtime.batch import Batch, Piece
from runtime.events import Finished, Submit
from runtime.kv_cache import KVCache
from runtime.logprobs import Logprobs
from runtime.request import Request, SamplingParams, TokenLogprob
from tests.driver import demo_config, load_alone, run
from tests.events import decided, ints, ready, reports, tell
from tests.events import request as one


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_by_slot() -> None:
    logprobs = Logprobs(
        ints(4, 4, 0), ints(7, 8, 3), ints(30, 31, 32), ints(2, 0, 1), floats(-0.5, -1, -2), ints(1, 2, 3), floats(-1, -2, -3)
    )
    assert logprobs.by_slot() == {
        4: {7: TokenLogprob(30, -0.5, ((1, -1.0), (2, -2.0))), 8: TokenLogprob(31, -1.0, ())},
        0: {3: TokenLogprob(32, -2.0, ((3, -3.0),))},
    }


def found(position: int, *tokens: int) -> Logprobs:
    """Rows of slot 0 from a position on, each token with a log-probability that says which position it was told for."""
    count = len(tokens)
    positions = np.arange(position, position + count, dtype=np.int32)
    zeros = np.zeros(count, np.int32)
    return Logprobs(zeros, positions, ints(*tokens), zeros, -positions.astype(np.float32), ints(), floats())


def test_only_what_is_decided_is_told_and_nothing_is_told_twice() -> None:
    """Two drafts of which one stands, so that the second one's row comes too early; and a round after the end."""
    machine = ready()
    tell(machine, [Submit(one(prompt=(1, 2, 3), max_tokens=4, logprobs=0, prompt_logprobs=0)), Submit(one(1))])
    rounds = [
        (found(1, 2, 3, 20), decided(0, [20])),
        (found(4, 21, 22, 9), decided(0, [21, 22], drafts=2)),
        (found(6, 23, 8), decided(0, [23], drafts=1)),
        (found(7, 7), decided(0, [7])),
    ]
    actions = []
    for number, (logprobs, decision) in enumerate(rounds):
        told = reports(decision, plan=1 + number // 2, last=number % 2 == 1)
        actions += tell(machine, [dataclasses.replace(told[0], logprobs=logprobs), told[1]])
    (completion,) = (action.completion for action in actions if isinstance(action, Finished))
    assert completion.tokens == (20, 21, 22, 23)
    assert completion.logprobs == tuple(TokenLogprob(17 + p, -p, ()) for p in range(3, 7))
    assert completion.prompt_logprobs == (None, TokenLogprob(2, -1.0, ()), TokenLogprob(3, -2.0, ()))
    assert 0 not in machine._tracks and len(machine._tracks) == 1


MODES = ["float32", "int4"]


@pytest.mark.parametrize("settings", [["model.quantization=none", "model.dtype=float32"], ["model.dtype=float32"]], ids=MODES)
def test_a_job_tells_the_models_own_log_probabilities(settings: list[str], seed: int) -> None:
    """Of prompts in small chunks, of drafts that stand and of those that don't; against one pass over everything."""
    rng = random.Random(seed)
    requests = [
        Request(
            index,
            tuple(rng.randrange(5, 2000) for _ in range(rng.choice([1, 2, 40]))),
            SamplingParams(
                temperature=rng.choice([0.0, 0.9]), seed=index, max_tokens=20, top_k=9, repetition_penalty=1.3, logprobs=5,
                prompt_logprobs=rng.choice([None, 2]),
            ),
        )
        for index in range(8)
    ]  # fmt: skip
    config = demo_config(*settings, "speculation.method=model", "engine.max_num_batched_tokens=31")
    job = run(config, requests)
    model = load_alone(config.model, torch.device("cpu"))
    for request in requests:
        completion = job.completions[request.index]
        tokens = [*request.prompt, *completion.tokens]
        cache = KVCache(model.cache_shape, 10, 16, model.dtype)
        logits = model.forward(Batch.build([Piece(tokens, 0, list(range(10)), len(tokens))], 16), cache)
        exact = torch.log_softmax(logits.double(), dim=1)
        assert completion.logprobs is not None and len(completion.logprobs) == len(completion.tokens)
        told = dict(enumerate(completion.logprobs, len(request.prompt)))
        if request.params.prompt_logprobs is None:
            assert completion.prompt_logprobs is None
        else:
            assert completion.prompt_logprobs is not None and len(completion.prompt_logprobs) == len(request.prompt)
            assert completion.prompt_logprobs[0] is None
            told |= {position: said for position, said in enumerate(completion.prompt_logprobs) if said is not None}
        for position, said in told.items():
            row = exact[position - 1]
            assert said.token == tokens[position]
            assert said.logprob == pytest.approx(float(row[said.token]), abs=1e-5)
            count = 5 if position >= len(request.prompt) else 2
            assert [value for _, value in said.top] == pytest.approx(row.topk(count).values.tolist(), abs=1e-5)
            assert [value for _, value in said.top] == pytest.approx([float(row[t]) for t, _ in said.top], abs=1e-5)
