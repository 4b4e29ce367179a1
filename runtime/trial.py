"""What rounds cost, tried out before the first request comes: invented sequences, and nothing is kept of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from runtime.blocks import blocks_for
from runtime.comm import Communicator
from runtime.costs import Costs
from runtime.drafting.drafter import Drafter
from runtime.engine import Engine, Round
from runtime.kv_cache import KVCache
from runtime.scheduler import Work
from runtime.sequence import Sampling, Sequence

ROWS = (1, 8, 2, 32, 4, 16, 3, 6, 12, 5, 64, 10, 24, 48, 128, 96, 256, 192, 512, 384)  # the telling ones first
NEAR, FAR = 32, 1024  # tokens before a round's rows
STEPS = 4  # of a draft model, in a trial
SECONDS = 2.0  # for all rounds that are tried, shared out evenly between the passes over them
LEAST, PASSES = 3, 3  # numbers of rows in any case; passes


@dataclass(frozen=True, slots=True)
class Trial:
    """Times rounds of an engine that holds no sequence yet. All ranks of a group do it together, and all measure the same.

    seqs: sequences that run at once. most: rows of a round. longest: tokens of a sequence.
    """

    engine: Engine
    cache: KVCache
    comm: Communicator
    seqs: int
    most: int
    longest: int

    def run(self, chain: Drafter | None, source: int = 1) -> Costs:
        """Costs of rounds, and of a model's drafts if there is one, whose source this is."""
        far = min(FAR, self.longest - 1 - self.most // self.seqs, (self.cache.num_blocks - 1) * self.cache.block_size)
        contexts = [NEAR, far] if far > 2 * NEAR else [max(0, min(NEAR, far))]
        taken: dict[tuple[int, int], float] = {}
        sizes = [rows for rows in ROWS if rows <= self.most]
        self._time(self._round, max(sizes), contexts[-1])  # whatever happens on first use: memory is given out, for one thing
        spent = 0.0
        for turn in range(PASSES):
            for rows in sizes:
                if turn and (rows, contexts[0]) not in taken:
                    continue
                if spent > SECONDS * (turn + 1) / PASSES and len(taken) >= LEAST * len(contexts):
                    break
                for context in contexts:
                    if not turn and self.cache.device.type != "cpu":
                        self._time(self._round, rows, context)  # kernels may have to be compiled
                    seconds = self._time(self._round, rows, context)
                    taken[rows, context] = min(seconds, taken.get((rows, context), seconds))
                    spent += seconds
        step, row = (0.0, 0.0) if chain is None else self._draft(chain, source)
        tried = sorted({rows for rows, _ in taken})
        # What disturbs a trial makes it slower. So rounds take no longer than those with more rows.
        least = [min(taken[more, context] for more in tried if more >= rows) for context in contexts for rows in tried]
        return Costs(tried, contexts, least, step, row)

    def _time(self, what: Callable[..., object], *given: object) -> float:
        """Seconds on the slowest rank."""
        start = time.perf_counter()
        what(*given)
        mine = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=self.cache.device)
        return float(self.comm.all_gather(mine).max())

    def _sequence(self, slot: int, tokens: int, room: int) -> Sequence:
        """With blocks for `room` tokens more; others may write to the same, where the cache is small."""
        blocks = blocks_for(tokens + room, self.cache.block_size)
        return Sequence(
            index=slot, slot=slot, tokens=[1] * tokens, num_prompt=1, limit=self.longest, ends=frozenset(),
            sampling=Sampling(), num_computed=tokens - 1,
            blocks=[(slot * blocks + i) % self.cache.num_blocks for i in range(blocks)],
        )  # fmt: skip

    def _round(self, rows: int, context: int) -> None:
        """As many sequences as may be share the rows, each with its next token and drafts."""
        shares = [len(part) for part in np.array_split(np.arange(rows), min(rows, self.seqs))]
        works = [Work(self._sequence(i, context + 1, n - 1), context, 1, n - 1, True) for i, n in enumerate(shares)]
        drafts = np.ones(rows - len(works), np.int32)
        slots, counts = np.arange(len(works), dtype=np.int32), np.array(shares, np.int32) - 1
        made = Round(works, slots, np.ones(len(works), np.bool_), counts, drafts, np.ones(len(works), np.int32))
        self.engine.agree(made, self.engine.verify(made))

    def _draft(self, chain: Drafter, source: int) -> tuple[float, float]:
        """Seconds of a step, and of every sequence in it."""
        seconds = []
        for number in sorted({1, self.seqs}):
            sequences = [self._sequence(slot, NEAR, STEPS) for slot in range(number)]
            for sequence in sequences:
                sequence.allowance = [STEPS] * source
            works = [Work(sequence, NEAR - 1, 1, STEPS, True) for sequence in sequences]
            chain.propose(works)  # computes what lies before
            seconds.append(min(self._time(chain.propose, works) for _ in range(2)) / STEPS)
            for sequence in sequences:
                chain.release(sequence)
        row = max(0.0, seconds[-1] - seconds[0]) / max(1, self.seqs - 1)
        return max(0.0, seconds[0] - row), row
