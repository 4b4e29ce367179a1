"""Drafting on the device, from what is there: no round waits for the host's tokens.

As everything on the device these work on fixed shapes, S sequences and K drafts for each, whatever a sequence can use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from runtime.batch import Batch
from runtime.comm import Communicator, Solo
from runtime.drafting.drafter import SuffixDrafter
from runtime.drafting.model import ModelDrafter
from runtime.filters import WIDTH, Limits, look
from runtime.kv_cache import KVCache
from runtime.model import Model
from runtime.pinned import pinned
from runtime.sampling import local_best
from runtime.sequence import Sequence

MANY = 1 << 30


@dataclass(frozen=True, slots=True)
class View:
    """S sequences as the device sees them at the start of a round.

    history: int32 [S, N], committed tokens, anything behind them. length: int64 [S], how many; 0 where there is no sequence.
    room: int64 [S], positions its blocks hold. tables: int32 [S, MB]. temperatures: float32 [S]. seeds: int64 [S].
    allowances: int64 [S, 1 + sources], the most drafts by source. limits: of S rows, where any of these sequences filters.
    """

    history: Tensor
    length: Tensor
    room: Tensor
    tables: Tensor
    temperatures: Tensor
    seeds: Tensor
    allowances: Tensor
    limits: Limits | None = None

    def allowed(self, sources: Tensor) -> Tensor:
        """[S], of a source for each sequence."""
        return self.allowances.gather(1, sources[:, None])[:, 0]

    def share(self, rank: int, size: int) -> View:
        """The rows for which a rank drafts: every `size`-th."""
        limits = None if self.limits is None else self.limits[rank::size]
        return View(
            self.history[rank::size], self.length[rank::size], self.room[rank::size], self.tables[rank::size],
            self.temperatures[rank::size], self.seeds[rank::size], self.allowances[rank::size], limits,
        )  # fmt: skip

    def best(
        self, model: Model, cache: KVCache, comm: Communicator, batch: Batch, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """A rank's best tokens for `positions` [S, J] of a batch: scores float32, ids int64 [S * J], and bool [S * J], whether
        the candidates of one exchange reach as far as filters do; None where none filter."""
        width = positions.shape[1]
        temperatures, seeds = (x.repeat_interleave(width) for x in (self.temperatures, self.seeds))
        if self.limits is None:
            return *model.best(batch, cache, temperatures, seeds, positions.flatten()), None
        logits = model.forward(batch, cache)
        masses = model.kernels.masses(logits, temperatures)
        cuts, known = look(logits, temperatures, masses, self.limits.repeat(width), comm, model.vocab_first, WIDTH)
        scores, ids = local_best(logits, temperatures, seeds, positions.flatten(), model.vocab_first, cuts)
        return scores, ids, known

    def batch(self, tokens: Tensor, first: Tensor, valid: Tensor, block_size: int, last_only: bool = False) -> Batch:
        """Rows of tokens from position `first` [S] on: tokens int64 [S, J], valid bool [S, J]. Others are padding.

        All rows want logits, or each sequence's last row alone.
        """
        count, width = tokens.shape
        position = (first[:, None] + torch.arange(width, device=tokens.device)).clamp(min=0)
        valid = valid & (position < self.room[:, None])
        block = (position // block_size).clamp(max=self.tables.shape[1] - 1)
        slot = self.tables.gather(1, block).long() * block_size + position % block_size
        index = torch.arange(count * width, device=tokens.device)
        return Batch(
            tokens=tokens.clamp(min=0).flatten(),
            positions=position.flatten(),
            reach=position.where(valid, -1).int().flatten(),
            rows=(index // width).int(),
            tables=self.tables,
            slots=slot.where(valid, -1).flatten(),
            logits_at=index.view(count, width)[:, -1] if last_only else index,
        )


class Proposer(Protocol):
    """Proposes drafts on the device, the same on every rank of the group. ahead: rounds for which it is ready at once."""

    ahead: int

    def settle(self, rows: list[Sequence | None], count: int, ready: set[int]) -> None:
        """Makes ready, on the host, for rounds over these sequences, which have one token to compute each.

        ready: slots whose tokens were all written by rounds that it proposed for. Waits for nothing on the device.
        """

    def propose(self, view: View, count: int) -> tuple[Tensor, Tensor]:
        """int64 [S, count]: drafts to follow the committed tokens, -1 from where there are none; [S]: their sources."""


class Lookup:
    """Prompt lookup, as `NgramDrafter` does it: what followed the latest, longest earlier place like a sequence's end."""

    ahead = MANY

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest, self.longest = shortest, longest

    def settle(self, rows: list[Sequence | None], count: int, ready: set[int]) -> None:
        pass

    def propose(self, view: View, count: int) -> tuple[Tensor, Tensor]:
        history, length = view.history, view.length[:, None]
        size = history.shape[1]
        end = torch.arange(size, device=history.device)  # of a place: the tokens before it are compared
        alike = (end >= 1) & (end < length)
        matched = torch.zeros(history.shape, dtype=torch.int64, device=history.device)
        for n in range(1, self.longest + 1):
            tail = history.gather(1, (length - n).clamp(min=0))
            alike = alike & (functional.pad(history, (n, 0), value=-1)[:, :size] == tail)
            matched += alike
        best, place = torch.where(matched >= self._shortest, matched * size + end, -1).max(dim=1, keepdim=True)
        # At the text's end it goes on with what it has copied.
        step = torch.arange(count, device=history.device) % (length - place).clamp(min=1)
        drafts = history.gather(1, (place + step).clamp(max=size - 1)).long().where(best >= 0, -1)
        return drafts, best[:, 0].clamp(min=0) // size


class Recall:
    """`SuffixDrafter`: look-up in the sequence itself, on the device, and in all that this job has finished, on the host.

    The host looks while a round is under way, so without the tokens that it will decide. What it hands over is long enough
    for that round and the next: where those tokens are its own beginning, the device drafts from what follows them, and else
    from the sequence. Every rank looks for every sequence, as all have the same texts.
    """

    ahead = 2

    def __init__(self, drafter: SuffixDrafter, lookup: Lookup, rows: int, width: int, device: torch.device) -> None:
        self._drafter, self._lookup = drafter, lookup
        self._table = torch.zeros(rows * _columns(width), dtype=torch.int64, device=device)

    def settle(self, rows: list[Sequence | None], count: int, ready: set[int]) -> None:
        table = self._shaped(len(rows), count)
        found = pinned(tuple(table.shape), table.dtype, table.device)
        lines = found.numpy()
        lines[:] = -1
        for line, sequence in zip(lines, rows, strict=True):
            if sequence is not None:
                length, tokens = self._drafter.recall(sequence.tokens, len(line) - 2)
                line[:2] = sequence.num_committed, length
                line[2 : 2 + len(tokens)] = tokens
        table.copy_(found, non_blocking=True)

    def propose(self, view: View, count: int) -> tuple[Tensor, Tensor]:
        own, own_source = self._lookup.propose(view, count)
        start, length, text = self._shaped(len(own), count).split([1, 1, 2 * count + 1], 1)
        since = view.length[:, None] - start  # tokens that have come while the host looked
        step = torch.arange(count + 1, device=text.device)
        come = view.history.gather(1, (start + step).clamp(0, view.history.shape[1] - 1))
        holds = (length > 0) & ((come == text[:, : count + 1]) | (step >= since)).all(1, keepdim=True)
        length = torch.where(holds, (length + since).clamp(max=self._lookup.longest), 0)[:, 0]
        drafts = text.gather(1, (since + step[:count]).clamp(0, text.shape[1] - 1))
        source = torch.where(length > 0, length + self._lookup.longest, 0)
        longer = torch.where(own_source > 0, length > own_source, length > 0)
        may, own_may = view.allowed(source) > 0, view.allowed(own_source) > 0
        better = torch.where(may == own_may, longer, may)
        return drafts.where(better[:, None], own), source.where(better, own_source)

    def _shaped(self, rows: int, count: int) -> Tensor:
        """int64 [rows, ...]: tokens when the host looked, length of the match, and what follows it, -1 behind its end."""
        width = _columns(count)
        return self._table[: rows * width].view(rows, width)


def _columns(count: int) -> int:
    """For what one round may decide, and the drafts of the next."""
    return 2 + 2 * count + 1


class Replica:
    """The small model's chain, all steps on the device; every rank drafts for its share of the rows."""

    ahead = MANY

    def __init__(self, drafter: ModelDrafter, comm: Communicator) -> None:
        self._drafter, self._comm = drafter, comm
        self._model, self._cache = drafter.model, drafter.cache

    def settle(self, rows: list[Sequence | None], count: int, ready: set[int]) -> None:
        self._drafter.settle([s for s in rows[self._comm.rank :: self._comm.size] if s is not None], ready)

    def propose(self, view: View, count: int) -> tuple[Tensor, Tensor]:
        rank, size = self._comm.rank, self._comm.size
        mine = view.share(rank, size)
        length = mine.length
        # The last but one as well: where all drafts stood, nobody has computed it yet. Twice gives the same bits.
        back = torch.arange(-2, 0, device=length.device)
        tokens = mine.history.gather(1, (length[:, None] + back).clamp(min=0)).long()
        first, valid = length - 2, length[:, None] + back >= 0
        drafts: list[Tensor] = []
        for step in range(count):
            batch = mine.batch(tokens, first, valid, self._cache.block_size, last_only=True)
            # Where filters reach beyond the candidates these still hold the likeliest tokens.
            tokens = mine.best(self._model, self._cache, Solo(), batch, (length + step)[:, None])[1][:, None]
            drafts.append(tokens)
            first, valid = length + step, (length > 0)[:, None]
        own = torch.cat(drafts, dim=1)
        every = own if size == 1 else self._comm.all_gather(own).transpose(0, 1).reshape(-1, count)
        return every, torch.full_like(view.length, self._drafter.source)


class Both:
    """A match where there is one and its drafts are allowed, and else the small model, as `Either` does it."""

    def __init__(self, matches: Recall, chain: Replica) -> None:
        self.ahead = matches.ahead
        self._matches, self._chain = matches, chain

    def settle(self, rows: list[Sequence | None], count: int, ready: set[int]) -> None:
        self._matches.settle(rows, count, ready)
        self._chain.settle(rows, count, ready)

    def propose(self, view: View, count: int) -> tuple[Tensor, Tensor]:
        found, length = self._matches.propose(view, count)
        drafts, source = self._chain.propose(view, count)
        good = (found[:, 0] >= 0) & (view.allowed(length) > 0)
        return found.where(good[:, None], drafts), length.where(good, source)
