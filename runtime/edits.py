"""What requests do to logits before the temperature: forbid tokens, add biases, penalise what has been written."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.check import Check
from runtime.sequence import Sampling, Sequence

Ids = NDArray[np.int64]


def edit(logits: Tensor, rows: list[tuple[Check, int]], first: int) -> None:
    """Changes logits [R, V/ranks] float32 in place, as vLLM does and in its order.

    rows: of each row its check and the position it decides; only tokens before that count, drafts among them. first: id
    of the slice's first token. A grammar leaves what it lets follow; allowed ids leave nothing else; a bad word's last token
    is forbidden where the output ends in the others; end tokens and stop tokens are forbidden before `min_tokens`, ends that
    are ignored as well; then biases are added; then come penalties:
    repetition (of prompt and output) divides positive logits and multiplies others, frequency subtracts for each
    occurrence in the output, presence once. Nothing crosses the slice, so ranks need no exchange.
    """
    width = logits.shape[1]
    guided = [row for row, (check, _) in enumerate(rows) if check.sequence.guide is not None]
    if guided:
        masks = torch.from_numpy(np.stack([mask(*rows[row], first, width) for row in guided])).to(logits.device)
        logits[guided] = logits[guided].where(masks, -torch.inf)
    for row, (check, _) in enumerate(rows):
        allowed = check.sequence.sampling.allowed_token_ids
        if allowed is not None:
            local = np.array(allowed, np.int64) - first
            here = torch.from_numpy(local[(local >= 0) & (local < width)]).to(logits.device)
            kept = logits[row, here]
            logits[row] = -torch.inf
            logits[row, here] = kept
    flat = logits.view(-1)
    forbidden = _Entries(width, first)
    biases, repeated = _Entries(width, first), _Entries(width, first)
    frequency, presence = _Entries(width, first), _Entries(width, first)
    for row, (check, position) in enumerate(rows):
        sequence, sampling = check.sequence, check.sequence.sampling
        prompt, output = split(check, position)
        forbidden.add(row, forbidden_ids(sequence, output), 0.0)
        biases.add(row, sampling.logit_bias.keys(), np.fromiter(sampling.logit_bias.values(), np.float32))
        if sampling.repetition_penalty != 1:
            repeated.add(row, np.unique(np.concatenate([prompt, output])), sampling.repetition_penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            ids, counts = np.unique(output, return_counts=True)
            frequency.add(row, ids, np.float32(sampling.frequency_penalty) * counts.astype(np.float32))
            presence.add(row, ids, sampling.presence_penalty)
    places, _ = forbidden.tensors(logits)
    flat[places] = -torch.inf
    places, values = biases.tensors(logits)
    flat[places] += values
    places, values = repeated.tensors(logits)
    found = flat[places]
    flat[places] = torch.where(found > 0, found / values, found * values)
    for entries in (frequency, presence):
        places, values = entries.tensors(logits)
        flat[places] -= values


def mask(check: Check, position: int, first: int, width: int) -> NDArray[np.bool_]:
    """What the grammar of a check's sequence allows at a position, within a slice of the vocabulary; bool [width]."""
    guide = check.sequence.guide
    assert guide is not None
    allowed = guide.mask(split(check, position)[1].tolist())[first : first + width]
    return np.pad(allowed, (0, width - len(allowed)))


def split(check: Check, position: int) -> tuple[Ids, Ids]:
    """The tokens before a position, prompt and output apart."""
    sequence = check.sequence
    drafts = check.drafts[: max(0, position - sequence.num_committed)]
    tokens = np.array([*sequence.tokens[:position], *drafts], np.int64)
    return tokens[: sequence.num_prompt], tokens[sequence.num_prompt :]


def forbidden_ids(sequence: Sequence, output: Ids) -> list[int]:
    """Tokens that may not follow this output: last tokens of bad words, and whatever ends as long as it is too short."""
    sampling: Sampling = sequence.sampling
    found = sorted(sequence.premature) if len(output) < sampling.min_tokens else []
    for *prefix, last in filter(None, sampling.bad_words):
        if output[max(0, len(output) - len(prefix)) :].tolist() == prefix:
            found.append(last)
    return found


class _Entries:
    """(row, token, value) triples of one operation, gathered for all rows so that a device is asked once."""

    def __init__(self, width: int, first: int) -> None:
        self._width, self._first = width, first
        self._places: list[Ids] = [np.zeros(0, np.int64)]
        self._values: list[NDArray[np.float32]] = [np.zeros(0, np.float32)]

    def add(self, row: int, ids: Iterable[int], values: NDArray[np.float32] | float) -> None:
        places = np.fromiter(ids, np.int64) - self._first
        inside = (places >= 0) & (places < self._width)
        self._places.append(places[inside] + row * self._width)
        self._values.append(np.broadcast_to(np.asarray(values, np.float32), places.shape)[inside])

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Places in the flattened logits, int64, and values, float32."""
        places, values = np.concatenate(self._places), np.concatenate(self._values)
        return torch.from_numpy(places).to(like.device), torch.from_numpy(values).to(like.device)
