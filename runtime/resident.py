"""Rounds that live on the device: draft, verify, decide and commit there, one launch after another.

What a round needs to know of its sequences - tokens so far, lengths, blocks, seeds - is held in tensors that stay where
they are, and a round changes them itself. So the rounds of a lease follow each other without asking the host, each as one
CUDA graph where there are graphs; the host reads decisions as they come, and repeats them on its own `Sequence`s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.batch import Batch
from runtime.blocks import blocks_for
from runtime.comm import Communicator
from runtime.drafting.resident import MANY, Proposer, View
from runtime.filters import Limits
from runtime.graphs import Graphs
from runtime.kv_cache import KVCache
from runtime.model import Model
from runtime.pinned import pinned
from runtime.roster import ABSENT, COLUMNS, ENDS, LENGTH, LIVE, Roster, power
from runtime.sequence import Sequence
from runtime.verify import NOTHING, Decision, Ints, NotANumber

HEADER = 5  # of a row of output: it took part, its drafts, its tokens, its source, whether it waits; then the tokens
AWAY = 32  # tokens for which a sequence stays with the host once it had to wait for it


@dataclass(frozen=True, slots=True)
class Bucket:
    """The shape of a round: sequences, drafts of each, blocks of the longest, whether anybody filters. Sequences and blocks
    are rounded up."""

    sequences: int
    drafts: int
    blocks: int
    filters: bool


class Resident:
    """The running sequences of a rank, on its device, and the rounds over them.

    proposer: who drafts on the device; None where nobody does. sources: of its drafts. budget: rows of a round at most;
    longest: tokens of a sequence at most. All ranks of the group call the same methods with the same sequences.
    """

    def __init__(
        self, model: Model, cache: KVCache, comm: Communicator, proposer: Proposer | None, graphs: Graphs,
        sources: int, max_num_seqs: int, longest: int, budget: int,
    ) -> None:  # fmt: skip
        self._model, self._cache, self._comm, self._proposer, self._graphs = model, cache, comm, proposer, graphs
        self._budget, self.device = budget, cache.device
        most = -(-max_num_seqs // comm.size) * comm.size
        self._roster = Roster(cache, sources, max_num_seqs, most, longest)
        self._out: dict[Bucket, Tensor] = {}
        self._settled: set[int] = set()  # slots whose sequences the proposer was made ready for, in all rounds since
        self._away: dict[int, tuple[Sequence, int]] = {}  # slot -> who waits for the host there, and until how many tokens
        self._bucket = Bucket(0, 0, 0, False)
        self._arranged: list[Sequence | None] = []  # of the rows
        self._slots = np.zeros(0, np.int32)  # of the rows, ABSENT where there is nobody
        self._coming: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def fits(self, sequences: Iterable[Sequence]) -> bool:
        """Whether rounds over these can run here: each with one token to compute, and its logits neither changed nor told."""
        running = [s for s in sequences if s.finish_reason is None]
        return len(running) > 0 and self._roster.most <= self._budget and all(
            s.num_computed == s.num_committed - 1 and len(s.ends) <= ENDS and not s.edits
            and s.sampling.logprobs is None and not self._waits(s)
            for s in running
        )  # fmt: skip

    def stuck(self, sequences: Iterable[Sequence]) -> bool:
        """Whether all of these wait for the host, so that rounds which are under way will decide nothing."""
        running = [s for s in sequences if s.finish_reason is None]
        return len(running) > 0 and all(map(self._waits, running))

    def _waits(self, sequence: Sequence) -> bool:
        """Whether filters have left a sequence's token open not long ago: candidates that fall short may do so again."""
        who, until = self._away.get(sequence.slot, (None, 0))
        return who is sequence and sequence.num_committed < until

    @property
    def ahead(self) -> int:
        """Rounds that may be launched before the first one's decision is known, and behind any later one's."""
        return MANY if self._proposer is None else self._proposer.ahead

    @property
    def rows(self) -> int:
        """Tokens that a round computes, padding among them."""
        return self._bucket.sequences * (self._bucket.drafts + 1)

    def begin(self, sequences: Iterable[Sequence], rounds: int) -> None:
        """Tells the device about the sequences of the next rounds; waits for nothing that it does."""
        self._coming.clear()  # of rounds that had nothing left to do
        running = [s for s in sequences if s.finish_reason is None]
        rows = self._arranged = self._arrange(running)
        bucket = self._bucket = self._fitting(running, len(rows), rounds, max(max(s.allowance, default=0) for s in running))
        tails = [(s, self._roster.tell(s)) for s in running]
        self._settle([s for s, tail in tails if not tail and s.slot in self._settled])
        self._settled = {s.slot for s in running} if bucket.drafts else set()
        self._roster.write([(s, tail) for s, tail in tails if tail])
        self._slots = np.array([ABSENT if s is None else s.slot for s in rows], np.int32)
        self._roster.bring(self._slots, bucket.blocks)

    def again(self) -> None:
        """Makes ready for one more round behind those under way, with what is decided by now."""
        self._settle([s for s in self._arranged if s is not None])

    def _settle(self, ready: list[Sequence]) -> None:
        if self._proposer is not None and self._bucket.drafts:
            rows = [None if s is None or s.finish_reason is not None else s for s in self._arranged]
            self._proposer.settle(rows, self._bucket.drafts, {s.slot for s in ready})

    def launch(self) -> None:
        """Starts one more round; does not wait for it."""
        bucket = self._bucket
        if bucket not in self._out:
            shape = (bucket.sequences, HEADER + bucket.drafts + 1)
            self._out[bucket] = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self._graphs.run(bucket, lambda: self._round(bucket))
        if self.device.type != "cuda":
            self._coming.append((self._out[bucket].clone(), None))
            return
        copy = pinned(self._out[bucket].shape, torch.int32, self.device)
        copy.copy_(self._out[bucket], non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._coming.append((copy, event))

    def decisions(self) -> Iterator[tuple[Decision, Ints]]:
        """What the rounds under way decide, one after the other, and the drafts' sources; waits for each. Raises NotANumber."""
        while self._coming:
            out, event = self._coming.popleft()
            if event is not None:
                event.synchronize()
            yield self._read(out.numpy())

    def _read(self, out: NDArray[np.int32]) -> tuple[Decision, Ints]:
        rows = np.flatnonzero(out[:, 0])
        out = out[rows]
        if (out[:, 2] < 0).any():
            raise NotANumber("the model's output is not a number (NaN); its weights, or their type's range, are at fault")
        slots, counts = self._slots[rows], out[:, 2].copy()
        for slot, count, waits in zip(slots.tolist(), counts.tolist(), out[:, 4].tolist(), strict=True):
            self._roster.written(slot, count)
            if waits:
                sequence = self._roster[slot]
                self._away[slot] = sequence, sequence.num_committed + AWAY
        tokens = out[:, HEADER:]
        tokens = tokens[np.arange(tokens.shape[1]) < counts[:, None]]
        return Decision(slots, out[:, 1].copy(), counts, tokens), out[:, 3].copy()

    def _arrange(self, running: list[Sequence]) -> list[Sequence | None]:
        """The sequences in rows: whose slot a rank drafts for stands in that rank's rows, every `comm.size`-th."""
        size = self._comm.size
        shares = [[s for s in running if s.slot % size == rank] for rank in range(size)]
        height = min(power(max(map(len, shares))), self._roster.most // size)
        return [share[i] if i < len(share) else None for i in range(height) for share in shares]

    def _fitting(self, running: list[Sequence], rows: int, rounds: int, width: int) -> Bucket:
        width = 0 if self._proposer is None else max(0, min(width, self._budget // rows - 1))
        furthest = max(min(s.limit, s.num_committed + rounds * (width + 1)) for s in running)
        blocks = min(power(blocks_for(furthest, self._cache.block_size)), self._roster.most_blocks)
        return Bucket(rows, width, blocks, any(s.sampling.filters for s in running))

    @torch.inference_mode()
    def _round(self, bucket: Bucket) -> None:
        """One round over the tensors, for S sequences of which some may not be there."""
        width, device = bucket.drafts, self.device
        state, places = self._roster.table(bucket.sequences, bucket.blocks), bucket.blocks * self._cache.block_size
        columns = state[:, : len(COLUMNS)].clone().unbind(1)
        slot, length, limit, room, seeds, temperatures, live, top_k, top_p, log_min_p = columns
        ends, allowances, tables = self._roster.split(state)
        live, temperatures = live > 0, temperatures.int().view(torch.float32)
        limits = Limits(top_k, top_p.view(torch.float64), log_min_p.view(torch.float64)) if bucket.filters else None
        history = self._roster.history[slot, :places]
        view = View(history, length.where(live, 0), room, tables.int(), temperatures, seeds, allowances, limits)
        active = live & (length <= room)
        most = torch.minimum(limit - length - 1, room - length)
        step = torch.arange(width + 1, device=device)
        drafts, num_drafts, sources = self._drafts(view, width, most.where(active, 0))
        last = view.history.gather(1, (length - 1).clamp(min=0)[:, None]).long()
        valid = active[:, None] & (step <= num_drafts[:, None])
        batch = view.batch(torch.cat([last, drafts], 1), length - 1, valid, self._cache.block_size)
        targets, broken, known = self._targets(batch, view, length[:, None] + step)
        stands = (targets[:, :width] == drafts) & (step[:width] < num_drafts[:, None]) & known[:, :width]
        stood = stands.long().cumprod(1).sum(1, keepdim=True)
        settled = known.gather(1, stood)[:, 0]  # else the token after the drafts that stand is the host's to find
        decided = torch.where(active, stood[:, 0] + settled, 0)
        waits = active & ~settled
        num_tokens = torch.where((broken & valid).any(1), -1, decided)

        within = step < decided[:, None]
        ended = (targets[:, :, None] == ends[:, None]).any(2) | (length[:, None] + step + 1 >= limit[:, None])
        ended = within & (ended | (targets == NOTHING))
        kept = within & ((ended.long().cumsum(1) - ended.long()) == 0)  # up to the first that ends it, which counts
        spare = self._roster.history.shape[1] - 1
        self._roster.history[slot[:, None], torch.where(kept, length[:, None] + step, spare)] = targets.int()
        state[:, LENGTH] += kept.sum(1)
        state[:, LIVE] *= ~(ended.any(1) | waits)
        header = torch.stack([active.long(), num_drafts, num_tokens, sources, waits.long()], 1)
        self._out[bucket].copy_(torch.cat([header, targets], 1))

    def _drafts(self, view: View, width: int, most: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Drafts int64 [S, K], how many of them count, [S], and where they come from, [S]."""
        if width == 0 or self._proposer is None:
            return view.seeds.new_zeros(len(most), 0), torch.zeros_like(most), torch.full_like(most, -1)
        drafts, sources = self._proposer.propose(view, width)
        most = torch.minimum(most, view.allowed(sources))
        step = torch.arange(width, device=drafts.device)
        # A draft ends at the first id the target has no embedding for.
        good = (drafts >= 0) & (drafts < self._model.vocab_size) & (step < most[:, None])
        return drafts, good.long().cumprod(1).sum(1), sources

    def _targets(self, batch: Batch, view: View, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The group's tokens at `positions` [S, K + 1], int64, where nothing can be decided, and where it is known yet."""
        scores, ids, known = view.best(self._model, self._cache, self._comm, batch, positions)
        broken = scores.isnan()
        if self._comm.size > 1:
            pairs = self._comm.all_gather(torch.stack([scores.view(torch.int32), ids.int()]))
            scores, every = pairs[:, 0].contiguous().view(torch.float32), pairs[:, 1].long()
            best = scores == scores.amax(0)
            ids = every.where(best, torch.iinfo(torch.int64).max).amin(0)
            broken, scores = scores.isnan().any(0), scores.amax(0)
        ids = ids.where(~scores.isneginf(), NOTHING)
        ids, broken = ids.view(positions.shape), broken.view(positions.shape)
        return ids, broken, torch.ones_like(broken) if known is None else known.view(positions.shape)
