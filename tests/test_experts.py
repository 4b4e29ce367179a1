"""Mixtures of experts: the sum over experts, files of all kinds, and bits that depend neither on other rows nor on ranks."""

import random
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from near_ties import decided
from packed_files import write
from safetensors import safe_open
from safetensors.torch import save_file
from test_model import same_bits
from tiny_models import VOCABULARY, config_of, logits_on, make, on_ranks, prompts, save
from torch import nn
from transformers import PreTrainedModel

from runtime.checkpoint import ModelError
from runtime.comm import Communicator, Solo
from runtime.experts import Experts
from runtime.model import load_model
from runtime.request import Request, SamplingParams
from tests.driver import Outcome, demo_config, run

pytestmark = pytest.mark.usefixtures("one_thread")

# Eight experts, and three groups of 32 within each.
SIZES = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 96},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96},
}
# One with chunks of two blocks and a layer without positions whose queries grow, one with an expert that all share.
OTHERS = {
    "llama4_text": {
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 160, "intermediate_size_mlp": 160,
        "moe_layers": [0], "attention_chunk_size": 16, "no_rope_layers": [1, 0], "floor_scale": 5,
    },
    "qwen2_moe": SIZES["qwen3_moe"] | {"shared_expert_intermediate_size": 160},
}  # fmt: skip


def made(kind: str, seed: int, dtype: torch.dtype = torch.float32, **changes: int) -> PreTrainedModel:
    return make(kind, seed, dtype, **((SIZES | OTHERS)[kind] | changes))


def called(path: str) -> str:
    """What Mixtral's files on the hub call a module."""
    path = path.replace(".mlp.", ".block_sparse_moe.")
    for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        path = re.sub(rf"(experts\.\d+)\.{ours}", rf"\1.{theirs}", path)
    return path


@pytest.mark.parametrize("rows", [0, 1, 5, 70])
def test_a_row_is_the_weighted_sum_of_its_experts(rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    count, width, chosen = 7, 16, torch.rand(rows, 7).argsort(dim=1)[:, :3]
    experts = Experts(count, width, 24, nn.SiLU()).requires_grad_(False)
    x, weights = torch.randn(rows, width), torch.rand(rows, 3)
    wanted = torch.zeros(rows, width, dtype=torch.float64)
    for row in range(rows):
        for index, weight in zip(chosen[row].tolist(), weights[row].tolist(), strict=True):
            expert = experts.get_submodule(str(index))
            gate, up, down = (getattr(expert, f"{name}_proj").weight.double() for name in ("gate", "up", "down"))
            one = x[row].double()
            wanted[row] += weight * (down @ (nn.functional.silu(gate @ one) * (up @ one)))
    torch.testing.assert_close(experts(x, chosen, weights).double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SIZES)
def test_both_layouts_of_files_are_the_same_model(kind: str, seed: int, tmp_path: Path) -> None:
    """One tensor for each linear of each expert, and transformers' own, which has all of a layer in one."""
    rng = random.Random(seed)
    model = made(kind, seed, torch.bfloat16)
    save(model, tmp_path / "single", sharded=rng.random() < 0.5)
    model.config.save_pretrained(tmp_path / "packed")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    assert any("experts.7." in name for path in (tmp_path / "single").glob("*.safetensors") for name in names(path))
    assert any("experts.down_proj" in name for name in names(tmp_path / "packed" / "model.safetensors"))
    sequences = prompts(rng, 2)
    for quantization in ("none", "int4"):
        size = rng.choice([1, 3])
        found = [
            logits_on(size, config_of(tmp_path / x, quantization=quantization, group_size=32), sequences, random.Random(seed))
            for x in ("single", "packed")
        ]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


@pytest.mark.parametrize(("kind", "size"), [("qwen3_moe", 1), ("mixtral", 2), ("llama4_text", 1), ("qwen2_moe", 1)])
@pytest.mark.parametrize(
    ("quantization", "dtype", "activations"),
    [("int4", "bfloat16", "int8"), ("int4", "float32", "16bit"), ("none", "bfloat16", "16bit"), ("none", "float32", "16bit")],
)
def test_a_row_never_depends_on_the_others(
    kind: str, size: int, quantization: str, dtype: str, activations: str, seed: int, tmp_path: Path
) -> None:
    """Nor on the expert's other rows, nor on how many of them there are."""
    save(made(kind, seed), tmp_path)
    config = config_of(tmp_path, quantization=quantization, dtype=dtype, activations=activations, group_size=32)
    sequences = prompts(random.Random(seed), 3, 90)
    on_ranks(size, lambda comm: same_bits(load_model(config, comm), sequences, random.Random(seed), (1, 3, 40, 100)))


@pytest.mark.parametrize("kind", [*SIZES, *OTHERS])
@pytest.mark.parametrize(("quantization", "dtype"), [("int4", "bfloat16"), ("none", "bfloat16"), ("none", "float32")])
def test_the_number_of_ranks_does_not_show(kind: str, quantization: str, dtype: str, seed: int, tmp_path: Path) -> None:
    save(made(kind, seed), tmp_path)
    config = config_of(tmp_path, quantization=quantization, dtype=dtype, group_size=32)
    sequences = prompts(random.Random(seed), 3)
    alone = logits_on(1, config, sequences, random.Random(seed))
    for size in (2, 4):
        found = logits_on(size, config, sequences, random.Random(seed))
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True)), size


def test_ranks_of_any_number_share_the_experts(seed: int, tmp_path: Path) -> None:
    save(made("qwen3_moe", seed), tmp_path)
    config = config_of(tmp_path, quantization="int4", group_size=32)

    def work(comm: Communicator) -> tuple[list[int], bool, bool]:
        model = load_model(config, comm)
        assert model.decoder is not None, "its layers aren't fused"
        (first, *_) = [m for m in model.module.modules() if isinstance(m, Experts)]
        return [int(name) for name, _ in first.named_children()], model.ranks_alike, model.capturable

    for size in (1, 2, 3, 4):
        ranks = on_ranks(size, work)
        assert [index for mine, _, _ in ranks for index in mine] == list(range(8))
        assert all(alike for _, alike, _ in ranks) == (size != 3)
        assert not any(capturable for _, _, capturable in ranks)


@pytest.mark.parametrize(
    ("kind", "layout", "shuffled"),
    [
        ("qwen3_moe", "pack-quantized", False), ("qwen3_moe", "gptq", True), ("mixtral", "awq", False),
        ("llama4_text", "pack-quantized", False),
    ],
)  # fmt: skip
def test_files_of_few_bits_are_read_as_they_are(kind: str, layout: str, shuffled: bool, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = made(kind, seed)
    write(model, tmp_path, layout, 32, False, shuffled, rng=rng, called=called if kind == "mixtral" else str)
    sequences, wanted = decided(model, rng, 2)
    for quantization in ("int4", "none"):
        config = config_of(tmp_path, quantization=quantization, activations="16bit", dtype="float32")
        for size in (1, 2, 3):
            for a, b in zip(logits_on(size, config, sequences, rng), wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)


def test_chunks_that_cut_blocks_are_refused(seed: int, tmp_path: Path) -> None:
    save(made("llama4_text", seed, attention_chunk_size=12), tmp_path)
    with pytest.raises(ModelError, match=r"chunks of 12 positions: engine\.block_size must divide it, and is 8"):
        load_model(config_of(tmp_path), Solo())


@pytest.mark.parametrize("kind", [*SIZES, "llama4_text"])
def test_jobs_give_the_tokens_of_plain_decoding(kind: str, seed: int, tmp_path: Path) -> None:
    """With drafts, in any company, on several ranks and in rounds that live on the device."""
    rng = random.Random(seed)
    save(made(kind, seed, torch.bfloat16, max_position_embeddings=512), tmp_path)
    requests = []
    for index in range(8):
        params = SamplingParams(temperature=rng.choice([0.0, 0.8]), seed=rng.randrange(2**63), max_tokens=20, ignore_eos=True)
        prompt = rng.sample(range(VOCABULARY), VOCABULARY)  # whatever comes next was there before: something is proposed
        requests.append(Request(index, tuple(prompt), params))
    model = [f"model.target={tmp_path}", "model.group_size=32", f"model.quantization={rng.choice(['int4', 'none'])}"]
    expected = tokens(run(demo_config(*model, "speculation.method=none", "engine.max_num_seqs=1"), requests))
    for size, method, on_device in ((1, "ngram", False), (2, "suffix", False), (1, "ngram", True)):
        with mock.patch("workers.build.lives_on", return_value=on_device):
            job = run(demo_config(*model, f"speculation.method={method}"), requests, size)
        assert tokens(job) == expected, (size, method, on_device)
        assert sum(completion.stats.num_drafted for completion in job.completions.values()) > 0


def tokens(job: Outcome) -> dict[int, tuple[int, ...]]:
    return {index: completion.tokens for index, completion in job.completions.items()}
