"""Checkpoints in others' formats of four and eight bits are read as they are: every value, on every rank."""

import json
import random
from pathlib import Path

import pytest
import torch
from packed_files import compressed, draw, write
from tiny_models import config_of, logits_on, make, on_ranks, prompts, reference
from torch import Tensor, nn

from runtime.checkpoint import ModelError
from runtime.comm import Communicator, Solo
from runtime.linear import ColumnParallel, Dense, Int4, Product, Reordered, RowParallel, Stacked
from runtime.model import load_model
from runtime.quantize import stored

pytestmark = pytest.mark.usefixtures("unfused", "one_thread")

# Three groups of 128 or more between attention and its output, and within the MLP: enough for three ranks.
WIDE = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 384}
KINDS = [
    (4, "pack-quantized", True, False),
    (4, "pack-quantized", False, False),
    (4, "pack-quantized", True, True),
    (4, "pack-quantized", False, True),
    (4, "gptq", True, False),
    (4, "gptq", False, False),
    (4, "gptq", False, True),
    (4, "gptq_v2", False, False),
    (4, "gptq_v2", False, True),
    (4, "awq", False, False),
    (8, "pack-quantized", True, False),
    (8, "pack-quantized", False, True),
    (8, "int-quantized", True, False),
    (8, "int-quantized", False, False),
    (8, "gptq", True, False),
    (8, "gptq", False, True),
    (8, "gptq_v2", False, False),
]


def values(product: Product) -> Tensor:
    """A product's weight [N, K] in float32: what the identity comes out as, one code times one scale each (or, of eight
    bits, the sum of its halves)."""
    inner = product.product if isinstance(product, Reordered) else product
    if isinstance(inner, Stacked):
        return torch.cat([values(p) for p in inner.products])
    if isinstance(inner, Dense):
        return inner.weight.float()
    assert isinstance(inner, Int4)
    return product(torch.eye(product.in_features)).t()


def held(config: object, comm: Communicator) -> dict[str, Tensor]:
    """This rank's linears' weights by path."""
    found: dict[str, Tensor] = {}
    for path, module in load_model(config, comm).module.named_modules():  # type: ignore[arg-type]
        if isinstance(module, RowParallel):
            found[path] = values(module.product)
        elif isinstance(module, ColumnParallel):
            widths = module.siblings.widths
            found[path] = values(module.siblings.product).split(widths)[module.index]
    return found


def whole(parts: list[Tensor], like: Tensor) -> Tensor:
    """The ranks' slices put together along the dimension that was split."""
    rows = sum(len(part) for part in parts) == len(like)  # else each has all of them
    return torch.cat(parts, dim=0 if rows else 1)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize(("bits", "layout", "symmetric", "shuffled"), KINDS)
def test_weights_are_those_of_the_reference(
    bits: int, layout: str, symmetric: bool, shuffled: bool, group: int, seed: int, tmp_path: Path
) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = make("llama", seed, num_hidden_layers=1, **WIDE)
    ignored = rng.choice([(), ("lm_head",)])
    write(model, tmp_path, layout, group, symmetric, shuffled and group > 0, ignored, rng, bits)
    config = config_of(tmp_path, quantization="int4", activations="16bit")
    for size in (1, 2, 3):
        ranks = on_ranks(size, lambda comm: held(config, comm))
        assert len(ranks[0]) == 8
        for path in ranks[0]:
            wanted = model.get_submodule(path).weight.data
            assert torch.equal(whole([rank[path] for rank in ranks], wanted), wanted), path


@pytest.mark.parametrize(("bits", "layout"), [(4, "pack-quantized"), (4, "gptq"), (4, "awq"), (8, "int-quantized")])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "phi3"])
def test_logits_are_those_of_the_expanded_model(kind: str, layout: str, bits: int, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = make(kind, seed, **WIDE)
    write(model, tmp_path, layout, 32, shuffled=layout != "awq", ignored=rng.choice([(), ("lm_head",)]), rng=rng, bits=bits)
    sequences = prompts(rng)
    for quantization in ("int4", "none"):
        config = config_of(tmp_path, quantization=quantization, activations="16bit", dtype="float32")
        for size in (1, 2, 3):
            for tokens, logits in zip(sequences, logits_on(size, config, sequences, rng), strict=True):
                torch.testing.assert_close(logits, reference(model, tokens), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("layout", ["pack-quantized", "gptq", "awq"])
def test_ignored_linears_stay_as_they_are(layout: str, seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    model = make("llama", seed, **WIDE)
    write(model, tmp_path, layout, 32, ignored=("k_proj", "0.mlp.down_proj", "lm_head"))
    ranks = on_ranks(2, lambda comm: held(config_of(tmp_path, quantization="int4", activations="16bit"), comm))
    for path in ranks[0]:
        wanted = model.get_submodule(path).weight.data
        assert torch.equal(whole([rank[path] for rank in ranks], wanted), wanted), path
    loaded = load_model(config_of(tmp_path, quantization="int4"), Solo()).module
    attention = loaded.get_submodule("model.layers.0.self_attn.q_proj").siblings.product
    assert isinstance(attention, Stacked)
    assert [type(p) for p in attention.products] == [Int4, Dense, Int4]
    assert isinstance(loaded.get_submodule("model.layers.0.mlp.down_proj").product, Dense)


def test_a_rank_reads_only_its_slices(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    model = make("llama", seed, **(WIDE | {"hidden_size": 256, "intermediate_size": 1024}))
    for layout in ("pack-quantized", "gptq", "awq"):
        write(model, tmp_path / layout, layout, 32)
        read: dict[int, int] = {}
        plain = stored.Checkpoint.read

        def counting(self: stored.Checkpoint, *args: object, plain: object = plain, read: dict[int, int] = read) -> Tensor:
            out: Tensor = plain(self, *args)  # type: ignore[operator]
            read[id(self)] = read.get(id(self), 0) + out.nbytes
            return out

        with monkeypatch.context() as patch:
            patch.setattr(stored.Checkpoint, "read", counting)
            on_ranks(4, lambda comm, at=tmp_path / layout: load_model(config_of(at, quantization="int4"), comm))
        total = (tmp_path / layout / "model.safetensors").stat().st_size
        assert len(read) == 4 and all(count < 0.35 * total for count in read.values())


def test_arranged_parts_make_the_whole_product(seed: int) -> None:
    """A rank's inputs, sorted by group and filled up, give its share of the sum, for any inputs it may have."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(20):
        size, groups = rng.choice([32, 64, 128]), rng.randint(1, 6)
        w = draw(torch.Size((16, size * groups)), size, False, True, torch.float32)
        for first, last in ((0, size * groups), sorted(rng.sample(range(size * groups + 1), 2))):
            columns = slice(first, last)
            sorted_ = stored.sort(w.group_of[columns], size)
            weight = stored.arrange(w.codes[:, columns].to(torch.uint8), w.scale, w.zero.to(torch.uint8), sorted_)
            order = sorted_.places
            assert torch.equal(stored.expand(weight, order, last - first), w.value[:, columns])
            if last - first == size * groups:
                assert weight.group_size == size and sorted(order.tolist()) == list(range(last))
            # A repeated input stands beside itself, so that what is rounded with its group is rounded as before.
            for i, sub in enumerate(order.view(-1, weight.group_size)):
                assert len(set(w.group_of[columns][sub].tolist())) == 1, i


@pytest.mark.parametrize("bits", [4, 8])
def test_a_compressor_of_others_writes_what_is_read(bits: int, seed: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    torch.manual_seed(seed)
    w = draw(torch.Size((24, 256)), 64, False, False, torch.bfloat16, bits)
    tensors, middle = compressed("x", w, False, False), 2 ** (bits - 1)
    assert torch.equal(tensors["x.weight_packed"], helpers.pack_to_int32((w.codes - middle).to(torch.int8), bits))
    zeros = helpers.pack_to_int32((w.zero - middle).to(torch.int8), bits, packed_dim=0)
    assert torch.equal(tensors["x.weight_zero_point"], zeros)


def edit(directory: Path, **changes: object) -> None:
    """Changes keys of the quantisation, `a__b` being b within a; None takes one away."""
    path = directory / "config.json"
    whole = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        at = whole["quantization_config"]
        for parent in parents:
            at = at[parent]
        at[last] = value
    path.write_text(json.dumps(whole))


GROUP = "config_groups__group_0"
REFUSED = [
    ("pack-quantized", {"quant_method": "fp8"}, "quant_method .* 'fp8'; read here: compressed-tensors, gptq and awq"),
    ("pack-quantized", {"format": "nvfp4-pack-quantized"}, "format .* 'nvfp4-pack-quantized'"),
    ("pack-quantized", {f"{GROUP}__weights__num_bits": 3}, r"group_0\.weights\.num_bits .* 3; read here: 4 or 8"),
    ("pack-quantized", {f"{GROUP}__weights__type": "float"}, r"weights\.type"),
    ("pack-quantized", {f"{GROUP}__weights__strategy": "tensor"}, "strategy .* 'tensor'; read here: group or channel"),
    ("pack-quantized", {f"{GROUP}__input_activations": {"num_bits": 8}}, "input_activations"),
    ("pack-quantized", {f"{GROUP}__weights__group_size": 100}, "100"),
    ("pack-quantized", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ("pack-quantized", {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    ("pack-quantized", {"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config\.format"),
    ("pack-quantized", {"config_groups": {}}, "config_groups"),
    ("pack-quantized", {"ignore": ["lm_head", "re:.*k_proj$"]}, "lacks model.layers.0.self_attn.k_proj.weight"),
    ("pack-quantized", {"ignore": []}, "lacks lm_head.weight_packed"),
    ("gptq", {"bits": 3}, "bits .* 3; read here: 4 or 8"),
    ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format .* 'marlin'"),
    ("gptq", {"dynamic": {"-:.*": {}}}, "dynamic"),
    ("gptq", {"group_size": 64}, r"scales in .* is \[4, 512\]"),
    ("awq", {"version": "gemv"}, "version .* 'gemv'"),
    ("awq", {"group_size": None}, "group_size"),
    ("awq", {"modules_to_not_convert": ["k_proj"]}, "modules_to_not_convert names model.layers.0.self_attn.k_proj"),
]


@pytest.mark.parametrize(("layout", "changes", "match"), REFUSED)
def test_what_is_not_understood_is_refused(
    layout: str, changes: dict[str, object], match: str, seed: int, tmp_path: Path
) -> None:
    torch.manual_seed(seed)
    write(make("llama", seed, **WIDE), tmp_path, layout, 32)
    edit(tmp_path, **changes)
    with pytest.raises(ModelError, match=match):
        load_model(config_of(tmp_path, quantization="int4"), Solo())


def test_targets_name_linears_in_three_ways(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    model = make("llama", seed, **WIDE)
    write(model, tmp_path, "pack-quantized", 32, ignored=("v_proj", "lm_head"))
    exact = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path.endswith(("q_proj", "k_proj"))]
    rest = r"re:.*(o_proj|gate_proj|up_proj|down_proj)$"
    edit(tmp_path, ignore=["re:.*lm_head"], **{f"{GROUP}__targets": [*exact, rest]})
    found = held(config_of(tmp_path, quantization="int4", activations="16bit"), Solo())
    for path, weight in found.items():
        assert torch.equal(weight, model.get_submodule(path).weight.data), path


def test_weights_are_not_rounded_again(seed: int, tmp_path: Path) -> None:
    """int4 takes the checkpoint's groups whatever model.group_size says."""
    torch.manual_seed(seed)
    write(make("llama", seed, **WIDE), tmp_path, "awq", 32)
    loaded = load_model(config_of(tmp_path, quantization="int4", group_size=128), Solo()).module
    product = loaded.get_submodule("model.layers.0.mlp.down_proj").product
    assert isinstance(product, Int4) and product.packed.group_size == 32
