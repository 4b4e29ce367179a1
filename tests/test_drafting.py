"""Finding earlier occurrences against a brute-force search, and the drafters that copy from them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from configs.schema import RunConfig
from runtime.comm import Communicator
from runtime.drafting.drafter import Draft, NgramDrafter, NoDrafter, SuffixDrafter
from runtime.drafting.either import Either
from runtime.drafting.match import CANDIDATES, MatchIndex
from runtime.drafting.model import ModelDrafter
from runtime.drafting.shared import END, Shared
from runtime.scheduler import Work
from runtime.sequence import Sampling, Sequence
from tests.tiny_models import on_ranks
from workers.build import make_drafter
from workers.models import load_replica

DRAFT = Path("configs/demo/draft").resolve()


def sequence(tokens: list[int], slot: int = 0) -> Sequence:
    return Sequence(slot, slot, tokens, 1, 10_000, frozenset(), Sampling(), allowance=[32] * 8)


def tokens_of(drafts: list[Draft]) -> list[list[int]]:
    return [draft.tokens for draft in drafts]


def work(tokens: list[int] | Sequence, num_drafts: int = 3, slot: int = 0) -> Work:
    one = tokens if isinstance(tokens, Sequence) else sequence(tokens, slot)
    return Work(one, one.num_committed - 1, 1, num_drafts, True)


def brute_force(text: list[int], context: list[int], shortest: int, longest: int) -> tuple[int, int]:
    """Over the latest CANDIDATES places whose shortest gram matches and that a token follows."""
    ends = [
        end for end in range(shortest, len(text))
        if len(context) >= shortest and text[end - shortest : end] == context[len(context) - shortest :]
    ]  # fmt: skip
    best = 0, 0
    for end in ends[::-1][:CANDIDATES]:
        length = shortest
        while length < min(longest, end, len(context)) and text[end - length - 1] == context[-length - 1]:
            length += 1
        if length > best[1]:
            best = end, length
    return best


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (1, 4), (2, 3), (3, 8)])
def test_find_is_a_brute_force_search(shortest: int, longest: int, seed: int) -> None:
    rng = random.Random(f"{seed} {shortest} {longest}")
    for _ in range(150):
        words = rng.choice([2, 3, 10])
        index, text = MatchIndex(shortest, longest), list[int]()
        for _ in range(rng.randint(0, 12)):
            more = [rng.randrange(words) for _ in range(rng.randint(0, 9))]
            text += more
            index.extend(more)
            other = [rng.randrange(words) for _ in range(rng.randint(0, 9))]
            for context in (text, other):
                assert index.find(context) == brute_force(text, context, shortest, longest)
        assert index.tokens.tolist() == text


def test_one_by_one_is_the_same_as_at_once(seed: int) -> None:
    rng = random.Random(seed)
    text = [rng.randrange(3) for _ in range(80)]
    at_once, one_by_one = MatchIndex(2, 5), MatchIndex(2, 5)
    at_once.extend(text)
    for token in text:
        one_by_one.extend([token])
    assert at_once.find(text) == one_by_one.find(text)


@pytest.mark.parametrize("shortest", [1, 2, 3])
def test_what_was_taken_back_was_never_there(shortest: int, seed: int) -> None:
    rng = random.Random(f"{seed} {shortest}")
    for _ in range(200):
        index, text = MatchIndex(shortest, 5), list[int]()
        for _ in range(6):
            more = [rng.randrange(3) for _ in range(rng.randint(0, 9))]
            index.extend(more)
            text = [*text, *more][: rng.randint(0, len(text) + len(more))]
            index.truncate(len(text))
            assert index.find(text) == brute_force(text, text, shortest, 5)
            assert index.tokens.tolist() == text


def test_the_longest_wins_and_the_latest_of_equals() -> None:
    index = MatchIndex(1, 3)
    index.extend([1, 2, 3, 9, 2, 3, 8, 2, 3])
    assert index.find([1, 2, 3]) == (3, 3)
    assert index.find([7, 2, 3]) == (6, 2), "the last place has nothing after it"


def test_copy_goes_on_as_a_repetition() -> None:
    index = MatchIndex(1, 3)
    index.extend([5, 1, 2, 3])
    assert index.copy(1, 2) == [1, 2]
    assert index.copy(1, 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert index.copy(3, 3) == [3, 3, 3]
    assert index.copy(1, 0) == []


def test_no_drafter() -> None:
    drafter = NoDrafter()
    assert tokens_of(drafter.propose([work([1, 1, 1])] * 2)) == [[], []]
    drafter.release(sequence([1]))


@pytest.mark.parametrize("drafter", [NgramDrafter(2, 4), SuffixDrafter(2, 4)])
def test_own_text(drafter: NgramDrafter) -> None:
    assert tokens_of(drafter.propose([])) == []
    mine, other = sequence([1, 2, 3, 4, 1, 2]), sequence([1, 2, 7, 7], slot=1)
    assert tokens_of(drafter.propose([work(mine), work(other)])) == [[3, 4, 1], []]
    mine.commit([3])
    assert tokens_of(drafter.propose([work(mine, 1)])) == [[4]]
    mine.commit([5, 6, 1, 2, 3])
    assert tokens_of(drafter.propose([work(mine, 2)])) == [[5, 6]], "the latest of equals, in tokens committed since"


@pytest.mark.parametrize("drafter", [NgramDrafter(2, 4), SuffixDrafter(2, 4)])
def test_tokens_that_were_taken_back_are_not_drafted_from(drafter: NgramDrafter) -> None:
    mine = sequence([1, 2, 3, 1, 2])
    drafter.rewind(mine)  # which it has not seen yet
    assert tokens_of(drafter.propose([work([*mine.tokens, 7, 8, 1, 2], 1)])) == [[7]]
    drafter.rewind(mine)
    assert tokens_of(drafter.propose([work(mine, 1)])) == [[3]]


@pytest.mark.parametrize("drafter", [NgramDrafter(2, 4), SuffixDrafter(2, 4)])
def test_a_slot_starts_anew_after_its_release(drafter: NgramDrafter) -> None:
    first = sequence([1, 2, 3, 4, 1, 2])
    drafter.propose([work(first)])
    drafter.release(first)
    assert tokens_of(drafter.propose([work([8, 9, 8, 9, 5, 6])])) == [[]]
    drafter.release(sequence([1], slot=3))  # of a slot it never drafted for


def test_suffix_finds_what_others_wrote() -> None:
    drafter = SuffixDrafter(2, 4)
    drafter.release(sequence([1, 2, 3, 4, 5]))
    assert tokens_of(drafter.propose([work([9, 1, 2])])) == [[3, 4, 5]]
    assert tokens_of(NgramDrafter(2, 4).propose([work([9, 1, 2])])) == [[]]


def test_suffix_prefers_the_longer_match_and_its_own_on_ties() -> None:
    drafter = SuffixDrafter(1, 4)
    drafter.release(sequence([7, 1, 2, 5, 5]))
    assert tokens_of(drafter.propose([work([1, 2, 8, 1, 2], 1)])) == [[8]]
    assert tokens_of(drafter.propose([work([1, 2, 8, 7, 1, 2], 1, slot=1)])) == [[5]]


def test_no_match_runs_over_the_seam_between_two_texts() -> None:
    drafter = SuffixDrafter(2, 4)
    drafter.release(sequence([5, 6]))
    drafter.release(sequence([7, 8, 9]))
    assert tokens_of(drafter.propose([work([0, 6, 7])])) == [[]]
    assert tokens_of(drafter.propose([work([0, 5, 6], 1, slot=1)])) == [[-1]], "which the engine takes for the draft's end"


def test_memory_is_bounded_by_two_generations() -> None:
    drafter = SuffixDrafter(2, 4, remembered=10)
    for start in range(0, 600, 6):
        text = list(range(start, start + 6))
        drafter.release(sequence(text))
        assert tokens_of(drafter.propose([work([9999, *text[:2]], 1)])) == [[text[2]]], "the latest is always known"
        drafter._own.clear()
        kept = sum(len(index.tokens) for index in drafter._generations)
        assert len(drafter._generations) <= 2 and kept <= 2 * (10 + 7)
    assert tokens_of(drafter.propose([work([9999, 0, 1], 1)])) == [[]], "the oldest is forgotten"
    previous = list(range(582, 588))
    assert tokens_of(drafter.propose([work([9999, *previous[:2]], 1, slot=1)])) == [[584]], "at least `remembered` tokens stay"


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_work_and_get_the_same(size: int, seed: int) -> None:
    rng = random.Random(seed)
    texts = [[rng.randrange(4) for _ in range(rng.randint(1, 40))] for _ in range(7)]
    works = [work(text, rng.randint(1, 6), slot) for slot, text in enumerate(texts)]
    alone = NgramDrafter(1, 4).propose(works)
    seen: dict[int, set[int]] = {}

    class Watched(NgramDrafter):
        def __init__(self, rank: int) -> None:
            super().__init__(1, 4)
            self.rank = rank

        def propose(self, works: list[Work]) -> list[Draft]:
            seen.setdefault(self.rank, set()).update(work.sequence.slot for work in works)
            return super().propose(works)

    def rank(comm: Communicator) -> list[list[Draft]]:
        shared = Shared(Watched(comm.rank), comm, torch.device("cpu"))
        assert shared.propose([]) == []
        drafts = [shared.propose(some) for some in (works, works[3:4])]
        return [[Draft([token for token in d.tokens if token != END], d.source) for d in some] for some in drafts]

    assert on_ranks(size, rank) == [[alone, alone[3:4]]] * size
    assert sorted(slot for slots in seen.values() for slot in slots) == list(range(7)), "each slot has one owner"


@pytest.mark.parametrize(
    ("method", "kind"),
    [("none", NoDrafter), ("ngram", NgramDrafter), ("suffix", SuffixDrafter), ("model", ModelDrafter), ("auto", Either)],
)
def test_the_method_says_who_drafts_whatever_is_loaded(method: str, kind: type) -> None:
    def config(method: str) -> RunConfig:
        speculation = {"method": method, "model": str(DRAFT)}
        return RunConfig.model_validate({"model": {"target": str(DRAFT)}, "speculation": speculation})

    replica = load_replica(config("model"), torch.device("cpu"))
    assert type(make_drafter(config(method), replica, 4, torch.device("cpu"))) is kind
