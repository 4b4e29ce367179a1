"""What is computed again, after a preemption, a resume or drafts that did not stand, has the bits it had before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime.batch import Batch, Piece
from runtime.comm import Solo
from runtime.kv_cache import KVCache
from runtime.model import Model, load_model
from tests.tiny_models import BLOCK, BLOCKS, VOCABULARY, config_of, make, prompts, ragged, save


def fill(model: Model, sequences: list[list[int]], rng: random.Random, largest: int, drafts: int) -> list[Tensor]:
    """Computes the sequences in random batches of random pieces, at random blocks, with wrong drafts behind some pieces.

    Returns what the cache then holds of each: [layers, keys and values, KV heads, tokens, head_dim].
    """
    cache = KVCache(model.cache_shape, BLOCKS, BLOCK, model.dtype)
    blocks: dict[int, list[int]] = {}
    for batch in ragged(sequences, rng, largest):
        pieces = []
        for index, piece in batch:
            blocks[index] = piece.blocks
            room = len(piece.blocks) * BLOCK - piece.start - len(piece.tokens)
            wrong = [rng.randrange(VOCABULARY) for _ in range(min(room, rng.randint(0, drafts)))]
            pieces.append(Piece([*piece.tokens, *wrong], piece.start, piece.blocks, rng.randint(0, len(piece.tokens))))
        model.forward(Batch.build(pieces, BLOCK), cache)
    whole = torch.stack([torch.stack(cache.keys), torch.stack(cache.values)], 1)  # [L, 2, B, KV, S, D]
    return [
        whole[:, :, blocks[index]].transpose(2, 3).flatten(3, 4)[:, :, :, : len(tokens)]
        for index, tokens in enumerate(sequences)
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("arithmetic", [
    {"quantization": "none"}, {"quantization": "int4", "group_size": 32, "activations": "int8"},
    {"quantization": "int4", "group_size": 32, "activations": "16bit"},
])  # fmt: skip
@pytest.mark.parametrize("ours", [True, False], ids=["fused", "transformers"])
def test_keys_and_values_do_not_depend_on_the_pieces(
    ours: bool, arithmetic: dict[str, str | int], dtype: str, one_thread: None, seed: int, tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if not ours:
        request.getfixturevalue("unfused")
    rng = random.Random(seed)
    save(make("qwen3", seed, getattr(torch, dtype)), tmp_path)
    model = load_model(config_of(tmp_path, dtype=dtype, **arithmetic), Solo())
    assert (model.decoder is not None) == ours
    sequences = prompts(rng, 4, 60)
    once = fill(model, sequences, rng, largest=60, drafts=0)  # each prompt in a piece or two
    for largest, drafts in ((1, 0), (9, 7), (40, 7)):
        again = fill(model, sequences, rng, largest, drafts)
        assert all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(once, again, strict=True)), (largest, drafts)
