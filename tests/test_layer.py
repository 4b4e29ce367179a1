"""Fused layers: taken where they belong, refused where they don't, and as near to float64 as transformers is."""

import logging
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_model import FAMILIES, OTHERS, same_bits
from tiny_models import config_of, logits_on, make, on_ranks, prompts, ragged, reference, run, save
from torch import Tensor, nn

from runtime.batch import Piece
from runtime.clock import Clock
from runtime.comm import Communicator, PeerLost, Solo
from runtime.kernels import reference as plain
from runtime.kernels import select
from runtime.layer import FusedLayer, learn_activation, learn_norm
from runtime.model import Model, load_model
from runtime.shared_memory import SharedMemory
from workers.metered import Metered

FUSED = [*FAMILIES, "smollm3", "gemma", "seed_oss"]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "runtime.decoder"]


def count(model: Model) -> int:
    return sum(isinstance(module, FusedLayer) for module in model.module.modules())


@pytest.mark.parametrize("quantization", ["int4", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", FUSED)
def test_common_layers_are_fused(
    kind: str, dtype: str, quantization: str, seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(make(kind, seed, **FAMILIES.get(kind, {})), tmp_path)
    config = config_of(tmp_path, dtype=dtype, quantization=quantization, group_size=32)
    for model in on_ranks(2 if dtype == "float32" else 1, lambda comm: load_model(config, comm)):
        assert count(model) == 2 and model.decoder is not None
    assert not warnings(caplog)


@pytest.mark.parametrize("kind", sorted(set(OTHERS) - {"smollm3", "granite"}))
def test_other_layers_stay_without_a_word(
    kind: str, seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(make(kind, seed, **OTHERS[kind]), tmp_path)
    model = load_model(config_of(tmp_path), Solo())
    assert count(model) == 0 and model.decoder is None and not warnings(caplog)


# What hides behind modules of the common structure: something between the layers' parts, or around all layers.
HIDDEN = [
    ("granite", {"residual_multiplier": 0.5}, 0),
    ("granite", {"attention_multiplier": 0.3}, 2),  # the scale of scores, which is seen
    ("granite", {"embedding_multiplier": 3.0}, 2),
    ("granite", {"logits_scaling": 3.0}, 2),
    ("smollm3", {"no_rope_layers": [0, 1]}, 1),
    ("ernie4_5", {}, 0),  # turns neighbouring dimensions
]


@pytest.mark.parametrize(("kind", "changes", "fused"), HIDDEN)
def test_what_modules_do_not_show(
    kind: str, changes: dict[str, Any], fused: int, seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(seed)
    model = make(kind, seed, **changes)
    save(model, tmp_path)
    with caplog.at_level(logging.WARNING, "runtime.decoder"):
        loaded = load_model(config_of(tmp_path), Solo())
    assert count(loaded) == fused
    assert (loaded.decoder is not None) == ("attention_multiplier" in changes)
    assert len(warnings(caplog)) == (fused < 2)
    assert fused == 2 or "model.layers.0" in caplog.text
    sequences = prompts(rng)
    for size in (1, 2):
        for tokens, logits in zip(sequences, logits_on(size, config_of(tmp_path), sequences, rng), strict=True):
            torch.testing.assert_close(logits, reference(model, tokens), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("quantization", ["int4", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["qwen2", "gemma"])
def test_rows_are_alone_and_the_loop_is_transformers(
    kind: str, dtype: str, quantization: str, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    save(make(kind, seed), tmp_path)
    model = load_model(config_of(tmp_path, dtype=dtype, quantization=quantization, group_size=32), Solo())
    sequences = [*prompts(rng, 3), *prompts(rng, 1, 100)]
    same_bits(model, sequences, rng, (1, 5, 60))
    # Fused layers in transformers' loop: the same but for the final norm's last bit.
    alone = [[(i, Piece(tokens, 0, list(range(13)), len(tokens)))] for i, tokens in enumerate(sequences)]
    loops = [run(each, alone, len(sequences)) for each in (model, replace(model, decoder=None))]
    for mine, theirs in zip(*loops, strict=True):
        step = torch.finfo(mine.dtype).eps
        assert (mine - theirs).float().square().mean().sqrt() <= 2 * step * theirs.float().square().mean().sqrt()


def test_16_bit_stays_as_near_to_the_truth_as_transformers(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    model = make("qwen3", seed, torch.bfloat16, num_hidden_layers=4)
    save(model, tmp_path)
    sequences = prompts(rng)
    found = torch.cat(logits_on(1, config_of(tmp_path), sequences, rng))
    theirs = torch.cat([reference(model, tokens) for tokens in sequences])
    exact = torch.cat([reference(model.double(), tokens) for tokens in sequences])
    ours, own = ((x.double() - exact).square().mean().sqrt() for x in (found, theirs))
    assert ours < 1.1 * own


class Shifted(nn.Module):
    """A norm around one plus its weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(width) * 0.1), 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)).to(x.dtype)


def test_norms_and_activations_are_learnt(seed: int) -> None:
    torch.manual_seed(seed)
    for dtype in (torch.float32, torch.bfloat16):
        like = torch.empty(0, dtype=dtype)
        shifted = Shifted(48).to(dtype)
        norm = learn_norm(shifted, 48, like, plain)
        assert norm is not None and torch.equal(norm.weight, 1 + shifted.weight.float()) and norm.eps == 1e-3
        assert dtype == torch.float32 or not norm.early
        shifted.eps = 1e-3  # as it says, and yet it computes with another
        shifted.forward = lambda x: nn.functional.rms_norm(x, (48,), eps=1e-5)  # type: ignore[method-assign]
        assert learn_norm(shifted, 48, like, plain) is None
        assert learn_norm(nn.LayerNorm(48).to(dtype), 48, like, plain) is None
        assert learn_norm(Shifted(32).to(dtype), 48, like, plain) is None
        assert learn_activation(nn.SiLU(), like, plain) == "silu"
        assert learn_activation(nn.GELU("tanh"), like, plain) == "gelu_tanh"
        assert learn_activation(nn.ReLU(), like, plain) is None


@pytest.mark.parametrize("quantization", ["int4", "none"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "gemma"])
@pytest.mark.parametrize(("size", "in_memory"), [(1, False), (2, False), (2, True)])
def test_fewer_calls_give_what_the_operations_give(
    kind: str, size: int, in_memory: bool, quantization: str, seed: int, tmp_path: Path
) -> None:
    """One for all layers of a rank that is alone or shares memory with the others, two for each layer elsewhere; as in a job,
    where the time of exchanges is counted."""
    if in_memory and select(torch.device("cpu")) is plain:
        pytest.skip("needs the C++ kernels")
    rng = random.Random(seed)
    save(make(kind, seed, torch.bfloat16, **FAMILIES.get(kind, {})), tmp_path)
    symmetric = rng.random() < 0.5
    config = config_of(tmp_path, dtype="bfloat16", quantization=quantization, group_size=32, symmetric=symmetric)
    sequences = prompts(rng)
    batches = ragged(sequences, rng, 9)

    def both(comm: Communicator) -> tuple[list[Tensor], list[Tensor], int]:
        if in_memory:  # so little that sums go in pieces
            comm = SharedMemory(f"layers-{os.getpid()}-{seed}", comm.rank, size, capacity=1024)
        clock = Clock()
        model = load_model(config, Metered(comm, clock))
        assert model.decoder is not None
        layers = [layer for layer in model.decoder.layers if layer.native is not None]
        assert (model.decoder.stack is not None) == (size == 1 or in_memory) or not layers
        clock.seconds.clear()
        with clock.part("forward"):
            whole = run(model, batches, len(sequences))
        assert clock.seconds["forward"] > 0 and (size == 1 or clock.seconds["exchange"] > 0)
        for layer in layers:
            layer.native = None
        apart = replace(model, decoder=replace(model.decoder))  # which looks at its layers anew
        return whole, run(apart, batches, len(sequences)), len(layers)

    for whole, apart, number in on_ranks(size, both):
        assert number == 2 or select(torch.device("cpu")) is plain
        assert all(torch.equal(a, b) for a, b in zip(whole, apart, strict=True))


def test_a_rank_that_does_not_come_ends_the_pass_by_name(seed: int, tmp_path: Path) -> None:
    if select(torch.device("cpu")) is plain:
        pytest.skip("needs the C++ kernels")
    save(make("qwen3", seed, torch.bfloat16), tmp_path)
    batches = ragged(prompts(random.Random(seed)), random.Random(seed), 9)

    def one(comm: Communicator) -> str:
        memory = SharedMemory(f"late-{os.getpid()}-{seed}", comm.rank, 2, timeout=2.0)
        model = load_model(config_of(tmp_path, dtype="bfloat16", quantization="int4", group_size=32), memory)
        if comm.rank == 1:
            return ""
        with pytest.raises(PeerLost) as lost:
            run(model, batches, 9)
        with pytest.raises(PeerLost):
            memory.barrier()
        return str(lost.value)

    assert "rank 1 did not come within 2 s" in on_ranks(2, one)[0]
