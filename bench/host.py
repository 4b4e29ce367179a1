"""What Python takes of a round that lives on a GPU, on a machine that needs none.

    python -m bench.host                # half a minute; OMP_NUM_THREADS=1 and an idle core make it worth reading

The rounds themselves are left out, and so are launching a graph, copying its decisions and waiting for them, which only a card
can time: what is measured is telling a device about its sequences, once a lease, with what the suffix drafter looks up for
each round beside it, and reading and committing decisions. Each round decides three tokens of every sequence.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch

from bench.tables import table
from runtime.blocks import blocks_for
from runtime.comm import Solo
from runtime.drafting.drafter import SuffixDrafter
from runtime.drafting.resident import Lookup, Recall
from runtime.graphs import Graphs
from runtime.kv_cache import CacheShape, KVCache
from runtime.resident import HEADER, Resident
from runtime.sequence import Sampling, Sequence

VOCAB, CONTEXT, DRAFTS, LEASE, LEASES, BLOCK = 5000, 1024, 5, 4, 60, 16
TEXTS = 64  # finished texts of CONTEXT tokens, for the suffix drafter


class Nothing(Graphs):
    """In the place of work on a device."""

    def __init__(self) -> None:
        super().__init__(None)

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        pass


def measure(batch: int, rng: random.Random) -> list[str]:
    """A line of the table: microseconds."""
    longest = CONTEXT + LEASES * LEASE * (DRAFTS + 1) + 64
    device, anything = torch.device("cpu"), Any
    cache = KVCache(CacheShape(1, 1, 4), 1, BLOCK, torch.float32, device)
    lookup, drafter = Lookup(1, 4), SuffixDrafter(1, 4)
    resident = Resident(
        anything, cache, Solo(), lookup, Nothing(), 8, batch, longest, batch * (DRAFTS + 1)  # type: ignore[arg-type]
    )  # fmt: skip
    recall = Recall(drafter, lookup, batch, DRAFTS, device)

    def sequence(slot: int) -> Sequence:
        return Sequence(
            index=slot, slot=slot, tokens=rng.choices(range(VOCAB), k=CONTEXT), num_prompt=CONTEXT, limit=longest,
            ends=frozenset({VOCAB}), sampling=Sampling(seed=slot), num_computed=CONTEXT - 1,
            blocks=list(range(blocks_for(longest, BLOCK))), allowance=[DRAFTS] * 8,
        )  # fmt: skip

    for slot in range(TEXTS):
        drafter.release(sequence(slot))
    sequences = [sequence(slot) for slot in range(batch)]
    times: dict[str, list[float]] = {"begin": [], "recall": [], "read": []}

    def timed(what: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        times[what].append((time.perf_counter() - start) * 1e6)

    def begin() -> None:
        if not resident.fits(sequences):
            raise RuntimeError("these sequences don't run on a device")
        resident.begin(sequences, LEASE)

    def read() -> None:
        for decision, _ in resident.decisions():
            for slot, tokens in zip(decision.slots.tolist(), decision.each(), strict=True):
                sequences[slot].commit(tokens)

    for _ in range(LEASES):
        timed("begin", begin)
        resident.launch()  # makes the place for what is decided
        list(resident.decisions())
        for _ in range(LEASE):
            for out in resident._out.values():
                out[:, :HEADER] = torch.tensor([1, DRAFTS, 3, 1, 0])
                out[:, HEADER:] = torch.randint(VOCAB, (len(out), DRAFTS + 1))
            resident.launch()
            timed("read", read)
            timed("recall", lambda: recall.settle([*sequences], DRAFTS, set()))
    middle = {what: statistics.median(values[1:]) for what, values in times.items()}
    ngram = middle["begin"] / LEASE + middle["read"]
    return [str(batch), *(f"{x:.0f}" for x in (*middle.values(), ngram, ngram + middle["recall"]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    options = parser.parse_args()
    rng = random.Random(0)
    header = ["batch", "begin a lease", "recall, a round", "read a round", "a round in all, n-gram", "suffix"]
    print(f"microseconds, context {CONTEXT}, k {DRAFTS}, leases of {LEASE} rounds\n")
    print(table(header, (measure(batch, rng) for batch in options.batch)))


if __name__ == "__main__":
    main()
