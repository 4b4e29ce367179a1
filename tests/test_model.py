"""The model against transformers' own, over ranks, chunks and number formats."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import (
    BLOCK,
    BLOCKS,
    VOCABULARY,
    config_of,
    logits_on,
    make,
    on_ranks,
    prompts,
    ragged,
    reference,
    run,
    save,
)

from runtime.batch import Batch, Piece
from runtime.comm import Solo
from runtime.kv_cache import KVCache
from runtime.model import Model, load_model
from runtime.quantize.int4 import quantize

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 11},
}
# Each has something of its own: soft caps, scaled embeddings and logits, fused or gathered projections, no gate, ...
OTHERS = {
    "gemma2": {"sliding_window": 11, "tie_word_embeddings": True},
    "gemma3_text": {"sliding_window": 11, "tie_word_embeddings": True},
    "cohere": {"tie_word_embeddings": True},
    "granite": {"logits_scaling": 3.0},
    "olmo2": {},
    "phi3": {},
    "glm": {},
    "starcoder2": {"use_bias": True},
    "smollm3": {},
    "nanochat": {},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Ranks are threads here, and what torch adds to them would only stand in the way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_transformers(kind: str, tied: bool, size: int, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    model = make(kind, seed, tie_word_embeddings=tied, **FAMILIES[kind])
    sequences = prompts(rng)
    save(model, tmp_path, sharded=rng.random() < 0.5)
    for tokens, logits in zip(sequences, logits_on(size, config_of(tmp_path), sequences, rng), strict=True):
        torch.testing.assert_close(logits, reference(model, tokens), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(kind: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    model = make(kind, seed, **OTHERS[kind])
    sequences = prompts(rng)
    save(model, tmp_path)
    for size in (1, 2, 3):
        for tokens, logits in zip(sequences, logits_on(size, config_of(tmp_path), sequences, rng), strict=True):
            torch.testing.assert_close(logits, reference(model, tokens), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_16_bit_is_within_its_rounding(kind: str, dtype: torch.dtype, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    model = make(kind, seed, dtype)
    sequences = prompts(rng)
    save(model, tmp_path)
    exact = model.float()
    step = torch.finfo(dtype).eps
    for size in (1, 2):
        found = logits_on(size, config_of(tmp_path), sequences, rng)
        for tokens, logits in zip(sequences, found, strict=True):
            assert logits.dtype == dtype
            wanted = reference(exact, tokens)
            error = (logits.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
            assert error < 3 * step


def quantised(model: torch.nn.Module, group_size: int, symmetric: bool) -> None:
    """Puts the values that four bits leave in the place of the layers' linear weights."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.weight.data = quantize(module.weight.data, group_size, symmetric).dequantize()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("kind", FAMILIES)
def test_int4_is_the_model_of_dequantised_weights(
    kind: str, group_size: int, symmetric: bool, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    model = make(kind, seed, intermediate_size=5 * group_size, **FAMILIES[kind])
    sequences = prompts(rng)
    config = config_of(
        save(model, tmp_path), quantization="int4", group_size=group_size, symmetric=symmetric, activations="16bit"
    )
    quantised(model, group_size, symmetric)
    for size in (1, 2, 4) if group_size == 32 else (1, 2):
        for tokens, logits in zip(sequences, logits_on(size, config, sequences, rng), strict=True):
            torch.testing.assert_close(logits, reference(model, tokens), rtol=1e-4, atol=5e-5)


def test_int8_activations_stay_near(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    model = make("qwen3", seed)
    sequences = prompts(rng)
    config = config_of(save(model, tmp_path), quantization="int4", group_size=32, activations="int8")
    quantised(model, 32, True)
    for size in (1, 2, 3):  # three share neither heads nor groups nor words evenly
        for tokens, logits in zip(sequences, logits_on(size, config, sequences, rng), strict=True):
            wanted = reference(model, tokens)
            error = (logits - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
            assert error < 0.05


FORMATS = [
    ("int4", "bfloat16", "16bit"),
    ("int4", "bfloat16", "int8"),
    ("int4", "float32", "16bit"),
    ("none", "bfloat16", "16bit"),
    ("none", "float32", "16bit"),
    ("none", "float16", "16bit"),
]


@pytest.mark.parametrize(("kind", "size"), [("qwen3", 1), ("gemma2", 1), ("olmo2", 2)])
@pytest.mark.parametrize(("quantization", "dtype", "activations"), FORMATS)
def test_a_row_never_depends_on_the_others(
    kind: str, size: int, quantization: str, dtype: str, activations: str, seed: int, tmp_path: Path
) -> None:
    """The same bits alone in one piece, token by token, and in batches with others in chunks of any size."""
    rng = random.Random(seed)
    changes = FAMILIES.get(kind) or OTHERS.get(kind) or {}
    save(make(kind, seed, **changes), tmp_path)
    config = config_of(tmp_path, quantization=quantization, dtype=dtype, activations=activations, group_size=32)
    sequences = [*prompts(rng, 3), *prompts(rng, 1, 100)]
    on_ranks(size, lambda comm: same_bits(load_model(config, comm), sequences, random.Random(seed), (1, 3, 40, 100)))


def test_rows_with_two_threads(seed: int, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    save(make("llama", seed), tmp_path)
    for quantization, dtype in (("int4", "bfloat16"), ("none", "bfloat16"), ("none", "float32")):
        config = config_of(tmp_path, quantization=quantization, dtype=dtype, group_size=32)
        rng = random.Random(seed)
        same_bits(load_model(config, Solo()), prompts(rng, 3, 90), rng, (20, 90))


def same_bits(model: Model, sequences: list[list[int]], rng: random.Random, largest: tuple[int, ...]) -> None:
    """Asserts that chunks and company don't matter. `rng` is the same on every rank: they all run the same batches."""
    alone = [[(i, Piece(tokens, 0, list(range(13)), len(tokens)))] for i, tokens in enumerate(sequences)]
    expected = run(model, alone, len(sequences))
    for chunk in largest:
        found = run(model, ragged(sequences, rng, chunk), len(sequences))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_only_the_wanted_rows_have_logits(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    save(make("llama", seed), tmp_path)
    tokens = [rng.randrange(VOCABULARY) for _ in range(20)]

    def work(comm: object) -> None:
        model = load_model(config_of(tmp_path), comm)  # type: ignore[arg-type]
        cache = KVCache(model.cache_shape, BLOCKS, BLOCK, model.dtype)
        whole = model.forward(Batch.build([Piece(tokens, 0, [5, 2, 9], 20)], BLOCK), cache)
        none = model.forward(Batch.build([Piece(tokens[:15], 0, [1, 0, 7], 0)], BLOCK), cache)
        assert none.shape == (0, whole.shape[1])
        pieces = [Piece(tokens[15:], 15, [1, 0, 7], 3), Piece(tokens[:4], 0, [3], 1)]
        assert torch.equal(model.forward(Batch.build(pieces, BLOCK), cache), whole[[17, 18, 19, 3]])
        # A rollback is nothing but computing positions again.
        again = model.forward(Batch.build([Piece(tokens[18:], 18, [1, 0, 7], 2)], BLOCK), cache)
        assert torch.equal(again, whole[18:])

    on_ranks(1, work)
    on_ranks(2, work)


def test_what_a_model_says_of_itself(seed: int, tmp_path: Path) -> None:
    model = make("qwen3", seed, tie_word_embeddings=True)
    save(model, tmp_path, sharded=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    ranks = on_ranks(4, lambda comm: load_model(config_of(tmp_path), comm))
    assert [rank.vocab_first for rank in ranks] == [0, 16, 48, 80]
    for rank in ranks:
        assert rank.vocab_size == VOCABULARY
        assert rank.cache_shape == (2, 1, 16)
        assert rank.max_model_len == 128
        assert rank.end_tokens == {2, 7}
        assert rank.digest == ranks[0].digest
        assert rank.num_parameters == model.num_parameters()
        assert rank.dtype == torch.float32
    (tmp_path / "generation_config.json").unlink()
    whole = load_model(config_of(tmp_path, dtype="bfloat16"), Solo())
    assert whole.end_tokens == {2}
    assert whole.weight_bytes == 2 * model.num_parameters()
    small = load_model(config_of(tmp_path, dtype="bfloat16", quantization="int4", group_size=32), Solo())
    assert small.weight_bytes < 0.5 * whole.weight_bytes
