"""`python -m bench.agreement`: how far int4 runs agree with 16 bit, by window, with one cache for both models and with two.

In-process jobs over the demo's prompts. With two caches the int4 model reads its own keys and values for all of a
sequence; with one it reads the certifier's up to the window. Output is the same either way, and is compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from unittest import mock

from transformers import AutoTokenizer

from bench.jobs import ROOT
from bench.prompts import demo_texts
from runtime.drafting import cascade
from runtime.drafting.drafter import Draft, Drafter
from runtime.engine import Engine
from runtime.kv_cache import KVCache
from runtime.request import Request, SamplingParams
from runtime.scheduler import Work
from runtime.sequence import Sequence
from tests.driver import demo_config, run


class Apart(cascade.Cascade):
    """A cascade whose cheap model has a cache of its own, and so computes all committed tokens itself."""

    def __init__(self, engine: Engine, drafter: Drafter, width: int) -> None:
        super().__init__(engine, drafter, width)
        shared = engine._cache
        engine._cache = KVCache(shared.shape, shared.num_blocks, shared.block_size, shared.dtype)
        self._computed: dict[int, int] = {}

    def propose(self, works: list[Work]) -> list[Draft]:
        with mock.patch.object(cascade, "provisional", self._provisional):
            return super().propose(works)

    def _provisional(
        self, work: Work, allowance: list[int], one: Callable[[Work, list[int]], Sequence] = cascade.provisional
    ) -> Sequence:
        copy, slot = one(work, allowance), work.sequence.slot
        copy.num_computed = min(self._computed.get(slot, 0), work.sequence.num_committed - 1)
        self._computed[slot] = work.sequence.num_committed
        return copy

    def release(self, sequence: Sequence) -> None:
        super().release(sequence)
        self._computed.pop(sequence.slot, None)


def requests(temperature: float, max_tokens: int) -> list[Request]:
    """The demo's prompts, as tokens."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs/demo/target")
    return [
        Request(i, tuple(tokenizer(text).input_ids), SamplingParams(temperature=temperature, seed=i, max_tokens=max_tokens))
        for i, text in enumerate(demo_texts())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--max-tokens", type=int, default=128)
    given = parser.parse_args()
    print("| temperature | window | share that stood, one cache | two caches | tokens a check, one cache | two caches |")
    print("|---|---|---|---|---|---|")
    for temperature in (0.0, 0.8):
        asked, texts = requests(temperature, given.max_tokens), set[tuple[tuple[int, ...], ...]]()
        for window in given.windows:
            certified = ("verification.certify=full", "verification.reference=configs/demo/target")
            config = demo_config(*certified, f"verification.certify_window={window}")
            made = []
            for kind in (cascade.Cascade, Apart):
                with mock.patch("workers.build.Cascade", kind):
                    job = run(config, asked)
                texts.add(tuple(job.completions[i].tokens for i in range(len(asked))))
                made.append(job.machine.stats)
            shares = " | ".join(f"{stats.draft_acceptance_rate:.1%}" for stats in made)
            lengths = " | ".join(f"{stats.mean_acceptance_length:.2f}" for stats in made)
            print(f"| {temperature} | {window} | {shares} | {lengths} |", flush=True)
        assert len(texts) == 1, "certified output depends on how it was drafted"


if __name__ == "__main__":
    main()
