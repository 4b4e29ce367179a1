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
from runtime.filters import Limits, limits_of
from runtime.graphs import Graphs
from runtime.kv_cache import KVCache
from runtime.model import Model
from runtime.sequence import Sequence
from runtime.verify import NOTHING, Decision, Ints, NotANumber

ENDS = 8  # end tokens of a sequence; one with more runs on the host
HEADER = 5  # of a row of output: it took part, its drafts, its tokens, its source, whether it waits; then the tokens
ABSENT = -1
AWAY = 32  # tokens for which a sequence stays with the host once it had to wait for it
# Of a row; then ends, allowances, blocks.
COLUMNS = ("slot", "length", "limit", "room", "seed", "temperature", "live", "top_k", "top_p", "log_min_p")


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
        blocks = _power(blocks_for(longest, cache.block_size))
        places = blocks * cache.block_size

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self._history = zeros(max_num_seqs + 1, places + 1, dtype=torch.int32)  # by slot; the last of each is for no one
        # One table, so that one copy brings everything; temperatures as the bits of float32.
        self._sources, self._facts = sources, len(COLUMNS) + ENDS + 1 + sources  # before a row's blocks
        self._state = zeros(most, self._facts + blocks)
        self._out: dict[Bucket, Tensor] = {}
        self._told: dict[int, tuple[Sequence, int]] = {}  # slot -> whose tokens the history has, and how many
        self._away: dict[int, tuple[Sequence, int]] = {}  # slot -> who waits for the host there, and until how many tokens
        self._bucket = Bucket(0, 0, 0, False)
        self._slots = np.zeros(0, np.int32)  # of the rows, ABSENT where there is nobody
        self._coming: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def fits(self, sequences: Iterable[Sequence]) -> bool:
        """Whether rounds over these can run here: each with one token to compute, and its logits neither changed nor told."""
        running = [s for s in sequences if s.finish_reason is None]
        return len(running) > 0 and len(self._state) <= self._budget and all(
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
        """Rounds that may be launched before the first one's decision is known."""
        return MANY if self._proposer is None else self._proposer.ahead

    @property
    def rows(self) -> int:
        """Tokens that a round computes, padding among them."""
        return self._bucket.sequences * (self._bucket.drafts + 1)

    def begin(self, sequences: Iterable[Sequence], rounds: int) -> None:
        """Tells the device about the sequences of the next rounds."""
        self._coming.clear()  # of rounds that had nothing left to do
        running = [s for s in sequences if s.finish_reason is None]
        rows = self._arrange(running)
        self._bucket = self._fitting(running, len(rows), rounds, max(max(s.allowance, default=0) for s in running))
        if self._proposer is not None and self._bucket.drafts:
            self._proposer.settle(rows, self._bucket.drafts)
        self._tell(running)
        self._slots = np.array([ABSENT if s is None else s.slot for s in rows], np.int32)
        state = np.zeros((len(rows), self._facts + self._bucket.blocks), np.int64)
        state[:, 0] = len(self._history) - 1  # rows of padding have a history that is nobody's
        state[:, len(COLUMNS) : len(COLUMNS) + ENDS] = state[:, self._facts :] = ABSENT
        for row, s in zip(state, rows, strict=True):
            if s is not None:
                room, temperature = len(s.blocks) * self._cache.block_size, np.float32(s.sampling.temperature)
                top_k, *floats = limits_of(s.sampling)
                row[: len(COLUMNS)] = (
                    s.slot, s.num_committed, s.limit, room, s.sampling.seed, temperature.view(np.int32), 1, top_k,
                    *np.array(floats, np.float64).view(np.int64),
                )  # fmt: skip
                row[len(COLUMNS) : len(COLUMNS) + len(s.ends)] = sorted(s.ends)
                blocks = s.blocks[: self._bucket.blocks]
                row[self._facts - len(s.allowance) : self._facts] = s.allowance
                row[self._facts : self._facts + len(blocks)] = blocks
        self._state[: len(rows), : state.shape[1]].copy_(torch.from_numpy(state))

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
        copy = torch.empty(self._out[bucket].shape, dtype=torch.int32, pin_memory=True)
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
        for slot in self._slots[rows[out[:, 4] > 0]].tolist():
            sequence, _ = self._told[slot]
            self._away[slot] = sequence, sequence.num_committed + AWAY
        tokens = [row[HEADER : HEADER + row[2]] for row in out]
        decision = Decision(
            self._slots[rows], out[:, 1].copy(), out[:, 2].copy(),
            np.concatenate(tokens, dtype=np.int32) if tokens else np.zeros(0, np.int32),
        )  # fmt: skip
        return decision, out[:, 3].copy()

    def _arrange(self, running: list[Sequence]) -> list[Sequence | None]:
        """The sequences in rows: whose slot a rank drafts for stands in that rank's rows, every `comm.size`-th."""
        size = self._comm.size
        shares = [[s for s in running if s.slot % size == rank] for rank in range(size)]
        height = min(_power(max(map(len, shares))), len(self._state) // size)
        return [share[i] if i < len(share) else None for i in range(height) for share in shares]

    def _fitting(self, running: list[Sequence], rows: int, rounds: int, width: int) -> Bucket:
        width = 0 if self._proposer is None else max(0, min(width, self._budget // rows - 1))
        furthest = max(min(s.limit, s.num_committed + rounds * (width + 1)) for s in running)
        blocks = min(_power(blocks_for(furthest, self._cache.block_size)), self._state.shape[1] - self._facts)
        return Bucket(rows, width, blocks, any(s.sampling.filters for s in running))

    def _tell(self, running: list[Sequence]) -> None:
        """Writes the tokens that were committed since the last time; those which rounds have written here come out the same."""
        tails, starts = [], []
        for sequence in running:
            known, count = self._told.get(sequence.slot, (None, 0))
            starts.append(count if known is sequence else 0)
            tails.append(sequence.tokens[starts[-1] :])
            self._told[sequence.slot] = sequence, sequence.num_committed
        longest = max(map(len, tails))
        new = torch.tensor([filled(tail, longest) for tail in tails], dtype=torch.int32).to(self.device)
        place = torch.tensor(starts)[:, None] + torch.arange(longest)
        slots = torch.tensor([s.slot for s in running])[:, None]
        spare = self._history.shape[1] - 1
        self._history[slots.to(self.device), place.clamp(max=spare).to(self.device).where(new >= 0, spare)] = new

    @torch.inference_mode()
    def _round(self, bucket: Bucket) -> None:
        """One round over the tensors, for S sequences of which some may not be there."""
        width, device = bucket.drafts, self.device
        state, places = self._state[: bucket.sequences], bucket.blocks * self._cache.block_size
        columns = state[:, : len(COLUMNS)].clone().unbind(1)
        slot, length, limit, room, seeds, temperatures, live, top_k, top_p, log_min_p = columns
        widths = [ENDS, 1 + self._sources, state.shape[1] - self._facts]
        ends, allowances, tables = state[:, len(COLUMNS) :].split(widths, 1)
        live, temperatures = live > 0, temperatures.int().view(torch.float32)
        tables = tables[:, : bucket.blocks].int()
        limits = Limits(top_k, top_p.view(torch.float64), log_min_p.view(torch.float64)) if bucket.filters else None
        view = View(self._history[slot, :places], length.where(live, 0), room, tables, temperatures, seeds, limits)
        active = live & (length <= room)
        most = torch.minimum(limit - length - 1, room - length)
        step = torch.arange(width + 1, device=device)
        drafts, num_drafts, sources = self._drafts(view, width, most.where(active, 0), allowances)
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
        spare = self._history.shape[1] - 1
        self._history[slot[:, None], torch.where(kept, length[:, None] + step, spare)] = targets.int()
        state[:, COLUMNS.index("length")] += kept.sum(1)
        state[:, COLUMNS.index("live")] *= ~(ended.any(1) | waits)
        header = torch.stack([active.long(), num_drafts, num_tokens, sources, waits.long()], 1)
        self._out[bucket].copy_(torch.cat([header, targets], 1))

    def _drafts(self, view: View, width: int, most: Tensor, allowances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Drafts int64 [S, K], how many of them count, [S], and where they come from, [S]."""
        if width == 0 or self._proposer is None:
            return view.seeds.new_zeros(len(most), 0), torch.zeros_like(most), torch.full_like(most, -1)
        drafts, sources = self._proposer.propose(view, width)
        most = torch.minimum(most, allowances.gather(1, sources[:, None])[:, 0])
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


def filled(values: list[int], count: int) -> list[int]:
    """The first `count` values, filled up with ABSENT."""
    return (values + [ABSENT] * count)[:count]


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()

