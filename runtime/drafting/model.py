"""Drafting with a small model: a whole replica on every rank, for the sequences which that rank drafts for."""

from __future__ import annotations

from runtime.batch import Batch, Piece
from runtime.check import Check, Rows
from runtime.comm import Solo
from runtime.drafting.drafter import Draft
from runtime.kv_cache import KVCache
from runtime.model import Model
from runtime.sampling import best
from runtime.scheduler import Work
from runtime.sequence import Sequence


class ModelDrafter:
    """Proposes a chain of tokens by the target's own rule: the same noise at the same position, the small model's logits.

    With shared noise a draft equals the target's token with probability (1 - TV) / (1 + TV) or more, TV being the total
    variation between the two models' distributions (Daliri, Musco and Suresh, 2024). Penalties and filters apply as well:
    drafts that they rule out could hardly stand, and a whole replica needs no exchange for them. The replica's cache is
    paged by the target's own block tables, so it needs no bookkeeping of its own but how far it has computed.
    """

    lookups, chains = 0, True

    def __init__(self, model: Model, cache: KVCache, budget: int, source: int = 1) -> None:
        self.source = source
        self.model = model
        self.cache = cache
        self._budget = budget
        self._computed: dict[int, int] = {}

    def propose(self, works: list[Work]) -> list[Draft]:
        chains: list[list[int]] = [[] for _ in works]
        active = [i for i, work in enumerate(works) if work.most(self.source) > 0]
        self._catch_up([works[i].sequence for i in active])
        while active:
            pieces, checks = [], []
            for i in active:
                sequence, chain = works[i].sequence, chains[i]
                start = sequence.num_committed + len(chain) - 1 if chain else self._start(sequence)
                pieces.append(Piece(chain[-1:] or sequence.tokens[start:], start, sequence.blocks, 1))
                checks.append(Check(sequence, sequence.num_committed + len(chain), 1, list(chain)))
            batch = Batch.build(pieces, self.cache.block_size, self.cache.device)
            for i, token in zip(active, self._sample(checks, batch), strict=True):
                chains[i].append(token)
            active = [i for i in active if len(chains[i]) < works[i].most(self.source)]
        for work, chain in zip(works, chains, strict=True):
            if chain:
                # All but the last draft are in the cache; those that will not stand are overwritten.
                self._computed[work.sequence.slot] = work.sequence.num_committed + len(chain) - 1
        return [Draft(chain, self.source if chain else 0) for chain in chains]

    def rewind(self, sequence: Sequence) -> None:
        self._computed[sequence.slot] = self._start(sequence)

    def release(self, sequence: Sequence) -> None:
        self._computed.pop(sequence.slot, None)

    def settle(self, sequences: list[Sequence], ready: set[int]) -> None:
        """Computes all committed tokens but the last, for who drafts on the device; what follows there is its own affair.

        ready: slots of sequences for which it has been, ever since.
        """
        for sequence in sequences:
            if sequence.slot not in ready:
                self._compute(sequence, self._start(sequence), sequence.num_committed - 1)
            # The last but one may be a draft that stood, which nobody has computed.
            self._computed[sequence.slot] = max(0, sequence.num_committed - 2)

    def _start(self, sequence: Sequence) -> int:
        """Leading tokens that are rightly in the replica's cache: at least the last committed one is to be computed."""
        return min(self._computed.get(sequence.slot, 0), sequence.num_committed - 1)

    def _catch_up(self, sequences: list[Sequence]) -> None:
        """Computes pending tokens in chunks within the budget until one forward can hold the rest of all sequences."""
        most = max(1, self._budget // max(1, len(sequences)))
        for sequence in sequences:
            start = self._start(sequence)
            if sequence.num_committed - start > most:
                start = self._compute(sequence, start, sequence.num_committed - 1)
            self._computed[sequence.slot] = start

    def _compute(self, sequence: Sequence, start: int, stop: int) -> int:
        """Computes the tokens from `start` to before `stop`, in chunks within the budget; returns `stop`."""
        for first in range(start, stop, self._budget):
            piece = Piece(sequence.tokens[first : min(first + self._budget, stop)], first, sequence.blocks, 0)
            self.model.forward(Batch.build([piece], self.cache.block_size, self.cache.device), self.cache)
        return stop

    def _sample(self, checks: list[Check], batch: Batch) -> list[int]:
        rows = Rows.of(checks)
        if rows.plain:
            return self.model.best(batch, self.cache, *rows.tensors(self.cache.device))[1].tolist()
        return best(self.model.forward(batch, self.cache), rows, Solo(), 0)[1].tolist()
