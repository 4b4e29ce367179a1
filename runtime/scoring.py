"""Log-probabilities of tokens and of the likeliest ones, from slices of raw logits by one exchange."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from runtime.comm import Communicator
from runtime.logprobs import Logprobs
from runtime.order import NONE, best_keys, ids_of, keys_of, values_of
from runtime.softmax import ELEMENTS, merge_sums, sums
from runtime.verify import NotANumber


@dataclass(frozen=True, slots=True)
class Ask:
    """One row's wish: the log-probabilities of the token at `position` of the sequence in `slot`, and of the `top` likeliest.

    place: the row of logits. token: its id where it is known; else it is the winner of the row's decision, of which
    `decided` is the index.
    """

    slot: int
    position: int
    top: int
    place: int
    token: int | None = None
    decided: int = 0


def score(
    logits: Tensor, asks: list[Ask], scores: Tensor, ids: Tensor, comm: Communicator, first: int
) -> Logprobs:
    """The same on every rank; all call this with the same asks, in step.

    logits: [L, V/ranks], raw, any float dtype. scores float32 [R], ids int64 [R]: this rank's best of every row that
    decides. A log-probability is logit - log-sum-exp, the latter in float64 from every slice's (largest, sum of
    exponentials), added in rank order; it is rounded to float32 in the end. Raises NotANumber, PeerLost.
    """
    width = max(ask.top for ask in asks)
    step = max(1, ELEMENTS // logits.shape[1])
    parts = [
        _local(logits, asks[i : i + step], scores, ids, width, first) for i in range(0, len(asks), step)
    ]
    gathered = comm.all_gather(torch.cat(parts)).cpu()  # int64 [ranks, A, 4 + width]
    if gathered[:, :, :2].contiguous().view(torch.float64).isnan().any():
        raise NotANumber("the model's output is not a number (NaN); its weights, or their type's range, are at fault")
    tops, totals = gathered[:, :, :2].contiguous().view(torch.float64).unbind(-1)
    top, total = merge_sums(tops, totals)
    winner = gathered[:, :, 2].argmax(0, keepdim=True)  # keys of different ranks are never equal
    chosen = gathered[:, :, 3].gather(0, winner)[0].view(torch.float64)
    tokens = ids_of(gathered[:, :, 2].amax(0).numpy())
    likeliest = np.sort(gathered[:, :, 4:].permute(1, 0, 2).reshape(len(asks), -1).numpy())[:, ::-1]
    values, top_tokens, top_values, counts = [], [], [], []
    for row, ask in enumerate(asks):
        shift, norm = float(top[row]), math.log(total[row])
        values.append(float(chosen[row]) - shift - norm)
        keys = likeliest[row][: ask.top]
        keys = keys[keys != NONE]
        top_tokens += ids_of(keys).tolist()
        top_values += [value - shift - norm for value in values_of(keys).astype(np.float64).tolist()]
        counts.append(len(keys))
    return Logprobs(
        slots=np.array([ask.slot for ask in asks], np.int32),
        positions=np.array([ask.position for ask in asks], np.int32),
        tokens=tokens.astype(np.int32),
        counts=np.array(counts, np.int32),
        values=np.array(values, np.float32),
        top_tokens=np.array(top_tokens, np.int32),
        top_values=np.array(top_values, np.float32),
    )


def _local(logits: Tensor, asks: list[Ask], scores: Tensor, ids: Tensor, width: int, first: int) -> Tensor:
    """A rank's part of some rows, int64 [A, 4 + width]: bits of its largest logit and of its sum of exponentials, the key
    by which its own candidate for the token competes, bits of that one's logit, and keys of its likeliest tokens."""
    device = logits.device
    rows = logits[torch.tensor([ask.place for ask in asks], device=device)].float()
    top = rows.amax(1).double()
    total = sums(rows, top).where(~top.isneginf(), 0.0)
    known = torch.tensor([-1 if ask.token is None else ask.token for ask in asks], device=device)
    decided = torch.tensor([ask.decided for ask in asks], device=device)
    mine = (known >= first) & (known < first + rows.shape[1])
    if len(scores):
        best, key = ids[decided], keys_of(_ordered(scores[decided]), ids[decided])
    else:
        best, key = torch.full_like(known, first), torch.full_like(known, NONE)
    key = torch.where(known < 0, key, keys_of(torch.zeros_like(top), known).where(mine, NONE))
    token = torch.where(known < 0, best, known.where(mine, first))
    logit = rows.gather(1, token[:, None] - first).double()
    every = keys_of(_ordered(rows), torch.arange(first, first + rows.shape[1], device=device))
    bits = torch.stack([top, total], 1).view(torch.int64)
    return torch.cat([bits, key[:, None], logit.view(torch.int64), best_keys(every, width)], dim=1)


def _ordered(values: Tensor) -> Tensor:
    return values.where(~values.isnan(), torch.inf)  # a key needs an order; the NaN itself is found by the sums
