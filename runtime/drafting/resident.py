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
from runtime.drafting.drafter import Draft, Drafter
from runtime.drafting.model import ModelDrafter
from runtime.filters import WIDTH, Limits, look
from runtime.kv_cache import KVCache
from runtime.model import Model
from runtime.sampling import local_best
from runtime.scheduler import Work
from runtime.sequence import Sequence

MANY = 1 << 30


@dataclass(frozen=True, slots=True)
class View:
    """S sequences as the device sees them at the start of a round.

    history: int32 [S, N], committed tokens, anything behind them. length: int64 [S], how many; 0 where there is no sequence.
    room: int64 [S], positions its blocks hold. tables: int32 [S, MB]. temperatures: float32 [S]. seeds: int64 [S].
    limits: of S rows, where any of these sequences filters.
    """

    history: Tensor
    length: Tensor
    room: Tensor
    tables: Tensor
    temperatures: Tensor
    seeds: Tensor
    limits: Limits | None = None

    def share(self, rank: int, size: int) -> View:
        """The rows for which a rank drafts: every `size`-th."""
        limits = None if self.limits is None else self.limits[rank::size]
        return View(
            self.history[rank::size], self.length[rank::size], self.room[rank::size], self.tables[rank::size],
            self.temperatures[rank::size], self.seeds[rank::size], limits,
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

    def settle(self, rows: list[Sequence | None], count: int) -> None:
        """Makes ready, on the host, for rounds over these sequences, which have one token to compute each."""

    def propose(self, view: View, count: int) -> tuple[Tensor, Tensor]:
        """int64 [S, count]: drafts to follow the committed tokens, -1 from where there are none; [S]: their sources."""


class Lookup:
    """Prompt lookup, as `NgramDrafter` does it: what followed the latest, longest earlier place like a sequence's end."""

    ahead = MANY

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest, self._longest = shortest, longest

    def settle(self, rows: list[Sequence | None], count: int) -> None:
        pass

    def propose(self, view: View, count: int) -> tuple[Tensor, Tensor]:
        history, length = view.history, view.length[:, None]
        size = history.shape[1]
        end = torch.arange(size, device=history.device)  # of a place: the tokens before it are compared
        alike = (end >= 1) & (end < length)
        matched = torch.zeros(history.shape, dtype=torch.int64, device=history.device)
        for n in range(1, self._longest + 1):
            tail = history.gather(1, (length - n).clamp(min=0))
            alike = alike & (functional.pad(history, (n, 0), value=-1)[:, :size] == tail)
            matched += alike
        best, place = torch.where(matched >= self._shortest, matched * size + end, -1).max(dim=1, keepdim=True)
        # At the text's end it goes on with what it has copied.
        step = torch.arange(count, device=history.device) % (length - place).clamp(min=1)
        drafts = history.gather(1, (place + step).clamp(max=size - 1)).long().where(best >= 0, -1)
        return drafts, best[:, 0].clamp(min=0) // size


class Given:
    """What a drafter on the host proposes, for one round at a time."""

    ahead = 1

    def __init__(self, drafter: Drafter, rows: int, width: int, device: torch.device) -> None:
        self._drafter = drafter
        self._table = torch.zeros(rows, 1 + width, dtype=torch.int64, device=device)  # sources first

    def settle(self, rows: list[Sequence | None], count: int) -> None:
        works = [Work(s, s.num_computed, 1, count, True) for s in rows if s is not None]
        proposed = iter(self._drafter.propose(works))
        drafts = [Draft([], 0) if s is None else next(proposed) for s in rows]
        table = torch.tensor([[draft.source, *draft.tokens] + [-1] * (count - len(draft.tokens)) for draft in drafts])
        self._table[: len(rows), : 1 + count].copy_(table)

    def propose(self, view: View, count: int) -> tuple[Tensor, Tensor]:
        table = self._table[: len(view.length), : 1 + count]
        return table[:, 1:], table[:, 0]


class Replica:
    """The small model's chain, all steps on the device; every rank drafts for its share of the rows."""

    ahead = MANY

    def __init__(self, drafter: ModelDrafter, comm: Communicator) -> None:
        self._drafter, self._comm = drafter, comm
        self._model, self._cache = drafter.model, drafter.cache

    def settle(self, rows: list[Sequence | None], count: int) -> None:
        self._drafter.settle([s for s in rows[self._comm.rank :: self._comm.size] if s is not None])

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
        return every, torch.ones_like(view.length)
