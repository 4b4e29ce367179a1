"""A KV cache of eight bits: what it costs, how near it is, and that the first promise holds with it."""

from __future__ import annotations

import pytest
import torch

from runtime.compare import compare
from runtime.kernels.rows import EIGHT_BITS
from runtime.kv_cache import CacheShape, KVCache
from tests.driver import demo_config, load_alone, run
from tests.test_same_tokens import SETTINGS, outcome, requests

CPU = torch.device("cpu")


@pytest.mark.parametrize("form", EIGHT_BITS)
def test_a_block_has_room_for_its_scales(form: str) -> None:
    shape, dtype = CacheShape(layers=3, kv_heads=2, head_dim=64), EIGHT_BITS[form]
    cache = KVCache(shape, 5, 16, dtype)
    assert sum(x.nbytes for x in (*cache.keys, *cache.values)) == cache.nbytes == 5 * 2 * 3 * 2 * 16 * (64 + 4)
    assert KVCache.bytes_per_block(shape, 16, torch.bfloat16) == 2 * 3 * 2 * 16 * 64 * 2


@pytest.mark.parametrize(("held", "name"), [("fp8", "small chunks"), ("int8", "suffix")])
def test_same_tokens(held: str, name: str, seed: int) -> None:
    """A rollback leaves rows and their scales to be written over, and what is computed again is rounded the same."""
    some = requests(seed)[:8]
    plain = ["speculation.method=none", "engine.max_num_seqs=1", "engine.max_num_batched_tokens=2048"]
    alone, together = (
        {index: outcome(completion) for index, completion in run(demo_config(kept, *settings), some, 1).completions.items()}
        for kept in [f"engine.kv_cache_dtype={held}"]
        for settings in (plain, SETTINGS[name])
    )
    assert alone == together and len(alone) == 8


def test_it_is_near_the_model_s_own(seed: int) -> None:
    """In nats a token, between a model and itself: more than nothing, and far less than what int4 weights cost."""
    torch.manual_seed(seed)
    model = load_alone(demo_config("model.quantization=none").model, CPU)
    windows = torch.randint(0, 4000, (4, 60)).tolist()
    found = {held: list(compare(model, model, windows, held))[-1].summary() for held in ("auto", *EIGHT_BITS)}
    assert found["auto"]["divergence"] == 0
    assert 0 < found["int8"]["divergence"] < found["fp8"]["divergence"] < 1e-2, found


@pytest.mark.parametrize("head", ["16bit", "int8"])
def test_the_best_are_those_of_the_logits(head: str, seed: int) -> None:
    """`Model.best`, which writes no logits where it can do without, beside `Model.forward`."""
    from runtime.batch import Batch, Piece
    from runtime.sampling import local_best

    torch.manual_seed(seed)
    model = load_alone(demo_config(f"model.lm_head={head}").model, CPU)
    assert model.decoder is not None and model.decoder.weight is not None
    cache = KVCache(model.cache_shape, 4, 16, model.dtype)
    batch = Batch.build([Piece(torch.randint(0, 4000, (9,)).tolist(), 0, [2], 7), Piece([5, 6], 0, [1], 0)], 16)
    temperatures, seeds = torch.tensor([0.0, 1e-6, 0.5, 1.0, 1.0, 2.0, 0.0]), torch.randint(0, 2**62, (7,))
    positions = torch.arange(3, 10)
    scores, ids = model.best(batch, cache, temperatures, seeds, positions)
    wanted = local_best(model.forward(batch, cache), temperatures, seeds, positions, model.vocab_first)
    assert torch.equal(scores, wanted[0]) and torch.equal(ids, wanted[1])
