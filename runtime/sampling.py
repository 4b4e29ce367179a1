"""The one rule over a slice of the vocabulary: a position's token is the arg-max of logits / temperature + noise.

What a request asks for besides - forbidden tokens, biases, penalties, filters, log-probabilities - costs its own rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from runtime.check import Check, Rows
from runtime.comm import Communicator
from runtime.edits import edit
from runtime.filters import Limits, cut_offs
from runtime.kernels import select
from runtime.logprobs import Logprobs
from runtime.order import NONE
from runtime.scoring import Ask, score
from runtime.sequence import GREEDY_BELOW
from runtime.verify import Floats, Ints


@dataclass(frozen=True, slots=True)
class Choice:
    """A rank's answer to a check. scores: float32 [R] and ids: int32 [R], the best of its slice for every row that decides;
    logprobs: the same on every rank of the group, None where nobody asks."""

    scores: Floats
    ids: Ints
    logprobs: Logprobs | None = None

    @classmethod
    def of(cls, scores: Tensor, ids: Tensor, logprobs: Logprobs | None = None) -> Choice:
        return cls(scores.cpu().numpy(), ids.to(torch.int32).cpu().numpy(), logprobs)


@torch.inference_mode()
def choose(logits: Tensor, checks: list[Check], comm: Communicator, first: int) -> Choice:
    """What this rank's slice of the vocabulary says to every row of the checks.

    logits: [L, V/ranks], any float dtype, L the checks' rows in order. first: id of the slice's first token. Raw logits ->
    allowed ids, bad words, min_tokens, biases, penalties -> temperature -> min-p, top-k, top-p -> the arg-max with noise
    (vLLM's order). All ranks of the group call this with the same checks, in step: they exchange something where a row
    filters or asks for log-probabilities, and nothing otherwise. A row depends on no other. Raises PeerLost, NotANumber.
    """
    rows = Rows.of(checks)
    device = logits.device
    deciding = logits if len(rows.owners) == rows.num_logits else logits[torch.from_numpy(rows.places).to(device)]
    scores, ids = best(deciding, rows, comm, first)
    asks = list(_asks(rows))
    logprobs = score(logits, asks, scores, ids, comm, first) if asks else None
    return Choice.of(scores, ids, logprobs)


@torch.inference_mode()
def best(logits: Tensor, rows: Rows, comm: Communicator, first: int) -> tuple[Tensor, Tensor]:
    """The best of every row that decides, of which `logits` are: scores float32 [R], ids int64 [R]; see `choose`."""
    device = logits.device
    temperatures, seeds, positions = rows.tensors(device)
    samplings = [check.sequence.sampling for check in rows.checks]
    special = np.flatnonzero(np.array([s.edits or s.filters for s in samplings], bool)[rows.owners])
    if not len(special):
        return local_best(logits, temperatures, seeds, positions, first)
    scores = torch.empty(len(logits), dtype=torch.float32, device=device)
    ids = torch.empty(len(logits), dtype=torch.int64, device=device)
    plain = torch.from_numpy(np.setdiff1d(np.arange(len(logits)), special)).to(device)
    edited = torch.from_numpy(special).to(device)
    changed = logits[edited].float()
    edit(changed, [(rows.checks[rows.owners[i]], int(rows.positions[i])) for i in special], first)
    filtering = np.flatnonzero([samplings[rows.owners[i]].filters for i in special])
    cuts: Tensor | None = None
    if len(filtering):
        some = torch.from_numpy(filtering).to(device)
        limits = Limits.of([samplings[rows.owners[i]] for i in special[filtering]], device)
        cuts = torch.full((len(special),), NONE, device=device)
        cuts[some] = cut_offs(changed[some], temperatures[edited][some], limits, comm, first)
    for where, what, cut in ((plain, logits[plain], None), (edited, changed, cuts)):
        scores[where], ids[where] = local_best(what, temperatures[where], seeds[where], positions[where], first, cut)
    return scores, ids


def _asks(rows: Rows) -> list[Ask]:
    """The rows of which log-probabilities are wanted."""
    asks = []
    place = decided = 0
    for check in rows.checks:
        sequence, sampling = check.sequence, check.sequence.sampling
        for i in range(check.num_known):
            token = sequence.tokens[check.position + i]
            asks.append(Ask(sequence.slot, check.position + i, sampling.prompt_logprobs or 0, place + i, token))
        deciding = range(check.num_known, check.count)
        if sampling.logprobs is not None:
            asks += [
                Ask(sequence.slot, check.position + i, sampling.logprobs, place + i, None, decided + n)
                for n, i in enumerate(deciding)
            ]
        place += check.count
        decided += len(deciding)
    return asks


def local_best(
    logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor, first: int, cuts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best (score, token id) of every row within this rank's slice of the vocabulary.

    logits: [R, V/ranks], any float dtype. temperatures: float32 [R], 0 for greedy. seeds, positions: int64 [R]; the
    position is that of the token to be decided. first: id of the slice's first token. cuts: int64 [R], the least keys that
    are left to choose from, where some filter.
    Returns (scores float32 [R], ids int64 [R]); a tie goes to the smallest id. A row depends on no other row.
    """
    temperatures = torch.where(temperatures < GREEDY_BELOW, 0, temperatures)
    best: tuple[Tensor, Tensor] = select(logits.device).best_tokens(logits, temperatures, seeds, positions, first, cuts)
    return best
