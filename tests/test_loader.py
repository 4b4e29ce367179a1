"""Model directories, whole and broken."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stored import WIDE, held, whole
from tiny_models import config_of, make, on_ranks, prompts, ragged, run, save

from runtime import checkpoint as checkpoint_module
from runtime import read_ahead
from runtime.checkpoint import INDEX, Checkpoint, ModelError
from runtime.comm import Solo
from runtime.model import load_model
from runtime.quantize.int4 import quantize
from runtime.read_ahead import Extent, ReadAhead
from runtime.shard import CannotShard, Span


def change(directory: Path, edit: object) -> None:
    """Rewrites the single weight file."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)  # type: ignore[operator]
    save_file(tensors, path, metadata={"format": "pt"})


def configure(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_slices_are_slices(seed: int, tmp_path: Path) -> None:
    model = make("llama", seed)
    save(model, tmp_path, sharded=True)
    found = Checkpoint(tmp_path)
    weights = model.state_dict()
    assert found.shapes == {name: tuple(w.shape) for name, w in weights.items()}
    for name, weight in weights.items():
        assert torch.equal(found.read(name), weight)
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(found.read(down, Span(3, 9)), weights[down][3:9])
    assert torch.equal(found.read(down, None, Span(32, 96)), weights[down][:, 32:96])
    assert torch.equal(found.read("model.norm.weight", Span(1, 5)), weights["model.norm.weight"][1:5])
    found.close()


def test_single_and_sharded_files_are_the_same_model(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    model = make("qwen2", seed)
    sequences = prompts(rng)
    batches = ragged(sequences, rng, 9)
    save(model, tmp_path / "one")
    save(model, tmp_path / "many", sharded=True)
    one, many = (load_model(config_of(tmp_path / name), Solo()) for name in ("one", "many"))
    for a, b in zip(run(one, batches, 4), run(many, batches, 4), strict=True):
        assert torch.equal(a, b)


def test_a_rank_reads_only_its_slices(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", seed, hidden_size=256, head_dim=32, intermediate_size=1024)
    save(model, tmp_path)
    read: dict[int, int] = {}
    plain = Checkpoint.read

    def counting(self: Checkpoint, *args: object) -> torch.Tensor:
        out = plain(self, *args)  # type: ignore[arg-type]
        read[id(self)] = read.get(id(self), 0) + out.numel()
        return out

    monkeypatch.setattr(checkpoint_module.Checkpoint, "read", counting)
    for quantization in ("none", "int4"):
        read.clear()
        on_ranks(4, lambda comm, q=quantization: load_model(config_of(tmp_path, quantization=q, group_size=32), comm))
        assert len(read) == 4
        assert all(count < 0.3 * model.num_parameters() for count in read.values())


@pytest.mark.usefixtures("unfused", "one_thread", "small_pieces")
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_sharding_and_quantising_commute(size: int, seed: int, tmp_path: Path) -> None:
    """What any number of ranks holds, unequal parts included, is the whole weight rounded as one."""
    symmetric = random.Random(seed).random() < 0.5
    model = make("llama", seed, torch.bfloat16, num_hidden_layers=1, **WIDE)
    config = config_of(
        save(model, tmp_path), quantization="int4", group_size=32, symmetric=symmetric, activations="16bit", dtype="float32"
    )
    ranks = on_ranks(size, lambda comm: held(config, comm))
    assert len(ranks[0]) == 8
    for path in ranks[0]:
        weight = model.get_submodule(path).weight.data
        wanted = quantize(weight, 32, symmetric).dequantize() if "layers" in path else weight.float()
        assert torch.equal(whole([rank[path] for rank in ranks], wanted), wanted), path


@pytest.mark.parametrize("changes", [
    {"quantization": "none"}, {"quantization": "int4", "group_size": 32, "lm_head": "int8"},
    {"quantization": "none", "group_size": 32, "lm_head": "screened"},
])  # fmt: skip
def test_pieces_make_the_whole(changes: dict[str, Any], seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    save(make("qwen2", seed, torch.float16), tmp_path)
    sequences, config = prompts(rng), config_of(tmp_path, **changes)
    batches, size = ragged(sequences, rng, 9), rng.choice([1, 3])
    whole = on_ranks(size, lambda comm: run(load_model(config, comm), batches, len(sequences)))
    monkeypatch.setattr("runtime.products.PIECE", 64 * rng.choice([16, 32, 48]))
    pieces = on_ranks(size, lambda comm: run(load_model(config, comm), batches, len(sequences)))
    for ours, theirs in zip(pieces, whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_is_read_ahead_is_what_is_read(seed: int, tmp_path: Path) -> None:
    """The bytes of each extent, in the files, are those of the tensors or of the rows that were named."""
    model = make("qwen2", seed)
    save(model, tmp_path, sharded=True)
    found, span, path = Checkpoint(tmp_path), Span(3, 40), "model.layers.1.mlp.up_proj"
    weight, query = model.get_submodule(path).weight.data, model.get_submodule("model.layers.0.self_attn.q_proj")
    (extent,) = found.extents([(path, span)])
    assert extent.path.read_bytes()[extent.start : extent.stop] == weight[3:40].numpy().tobytes()
    extents = found.extents([("model.layers.0.self_attn.q_proj", Span(0, 128)), ("nowhere", span)])
    assert extents == sorted(extents)
    assert {x.path.read_bytes()[x.start : x.stop] for x in extents} == {
        parameter.detach().numpy().tobytes() for parameter in (query.weight, query.bias)
    }


def test_steps_are_asked_for_before_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "AHEAD", 100)
    asked: list[int] = []
    monkeypatch.setattr(ReadAhead, "_ask", lambda self, extent: asked.append(extent.start))
    path = tmp_path / "file"
    path.touch()
    steps = [[Extent(path, 40 * i, 40 * i + 20), Extent(path, 40 * i + 20, 40 * i + 40)] for i in range(6)]
    for begun in range(6):
        asked.clear()
        with ReadAhead(steps) as ahead:
            for step in range(begun + 1):
                ahead.begin(step)
        assert sorted(asked) == list(range(0, 40 * min(6, begun + 3), 20))  # this step, and 100 bytes or a little more


def test_dtypes(seed: int, tmp_path: Path) -> None:
    save(make("llama", seed, torch.float16), tmp_path)
    assert load_model(config_of(tmp_path), Solo()).dtype == torch.float16
    assert load_model(config_of(tmp_path, dtype="bfloat16"), Solo()).dtype == torch.bfloat16
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.pop("dtype")
    path.write_text(json.dumps(config))
    assert load_model(config_of(tmp_path), Solo()).dtype == torch.float16


def test_digest_tells_models_apart(seed: int, tmp_path: Path) -> None:
    digests = set()
    for name, kind, shift in (("a", "llama", 0), ("b", "llama", 1), ("c", "mistral", 0)):
        save(make(kind, seed + shift), tmp_path / name)
        digests.add(Checkpoint(tmp_path / name).digest)
        assert Checkpoint(tmp_path / name).digest in digests
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert Checkpoint(tmp_path / "copy").digest in digests
    configure(tmp_path / "copy", rope_theta=1e6)
    digests.add(Checkpoint(tmp_path / "copy").digest)
    assert len(digests) == 4


@pytest.fixture
def single(seed: int, tmp_path: Path) -> Path:
    return save(make("llama", seed), tmp_path)


def refused(directory: Path, match: str, **changes: object) -> None:
    with pytest.raises(ModelError, match=match):
        load_model(config_of(directory, **changes), Solo())


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none")
    refused(tmp_path, "config.json is missing")


def test_missing_tensor(single: Path) -> None:
    change(single, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(single, "lacks model.layers.1.mlp.up_proj.weight")


def test_left_over_tensor(single: Path) -> None:
    change(single, lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(2)}))
    refused(single, "has model.layers.0.mlp.up_proj.qweight, which")


def test_frequencies_of_old_files_are_no_left_over(single: Path) -> None:
    change(single, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}))
    load_model(config_of(single), Solo())


def test_wrong_shape(single: Path) -> None:
    configure(single, intermediate_size=192)
    refused(single, r"gate_proj.weight in .* is \[160, 64\], its config.json makes it \[192, 64\]")


def test_wrong_dtype(single: Path) -> None:
    change(single, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}))
    refused(single, "model.norm.weight .* I8")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_file(single: Path, kept: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(single, "model.safetensors cannot be used: .*; download the model again")


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refused(single, "neither model.safetensors nor")


def test_broken_index(seed: int, tmp_path: Path) -> None:
    save(make("llama", seed), tmp_path, sharded=True)
    index = json.loads((tmp_path / INDEX).read_text())
    name, file = next(iter(index["weight_map"].items()))

    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {name: "../elsewhere.safetensors"}}))
    refused(tmp_path, "outside the model's directory")
    other = next(f for f in index["weight_map"].values() if f != file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {name: other}}))
    refused(tmp_path, f"{name} is in {other}")
    (tmp_path / INDEX).write_text("{")
    refused(tmp_path, f"{INDEX} is not an index")
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / file).unlink()
    refused(tmp_path, f"{file}, which .* names, is not there; download")


def test_what_cannot_run_is_refused(single: Path) -> None:
    for values, match in [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method .* 'bitsandbytes'; read here"),
        ({"model_type": "no_such_model"}, "describes no model"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"head_dim": None, "num_attention_heads": 8, "hidden_size": 64.5}, "config.json"),
    ]:
        before = (single / "config.json").read_text()
        configure(single, **values)
        refused(single, match)
        (single / "config.json").write_text(before)


def test_groups_that_do_not_fit(seed: int, tmp_path: Path) -> None:
    save(make("llama", seed, intermediate_size=96), tmp_path)
    refused(tmp_path, "down_proj.weight .* groups of 64; use another model.group_size", quantization="int4", group_size=64)


def test_weights_that_are_not_finite(single: Path) -> None:
    change(single, lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    refused(single, "up_proj.weight cannot be quantised", quantization="int4", group_size=32)


def test_too_many_ranks(single: Path) -> None:
    with pytest.raises(CannotShard, match=r"query heads: 8 .* set parallel.tensor to 8 or less"):
        on_ranks(9, lambda comm: load_model(config_of(single), comm))
