"""Rounding that looks at calibration: what defines GPTQ and AWQ, and whole models on disk."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VOCABULARY, config_of, logits_on, make, save
from torch import Tensor, nn

from runtime.checkpoint import INDEX, ModelError
from runtime.quantize import stream
from runtime.quantize.awq import clipped, search_scale
from runtime.quantize.folding import find_producer
from runtime.quantize.gptq import NotFactored, compensated, gptq
from runtime.quantize.grid import error_under, fit, rounded
from runtime.quantize.int4 import quantize
from runtime.quantize.layer import Recipe, collect, survey
from runtime.quantize.stream import quantize_model
from runtime.skeleton import build_config, build_skeleton

pytestmark = pytest.mark.usefixtures("unfused", "one_thread")

WIDE = {"intermediate_size": 256}


def correlated(inputs: int, rows: int = 600) -> Tensor:
    """Inputs that hang together, some of them many times larger than others."""
    x = torch.randn(rows, inputs // 4) @ torch.randn(inputs // 4, inputs) + 0.3 * torch.randn(rows, inputs)
    return x * torch.exp(torch.randn(inputs))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128])
def test_gptq_errs_less_than_rounding_to_nearest(group: int, symmetric: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = correlated(256), torch.randn(40, 256)
    moments = x.t() @ x / len(x)
    nearest = error_under(moments, weight, quantize(weight, group, symmetric).dequantize())
    for order in (True, False):
        made = gptq(weight, moments, group, symmetric, activation_order=order)
        assert made.group_size == group and (not symmetric or bool((made.zero == 8).all()))
        assert torch.equal(made.scale, made.scale.bfloat16().float())
        assert error_under(moments, weight, made.dequantize()) < 0.7 * nearest


def test_gptq_of_independent_inputs_is_rounding_to_nearest(seed: int) -> None:
    """Where no input says anything about another, there is nowhere to move an error to."""
    torch.manual_seed(seed)
    weight, moments = torch.randn(10, 128), torch.diag(torch.rand(128) + 0.5)
    expected = rounded(weight, *fit(weight, 32, True, moments), 32)
    for order in (True, False):
        assert torch.equal(gptq(weight, moments, 32, True, activation_order=order).codes, expected.codes)


def test_gptq_is_its_definition(seed: int) -> None:
    """Column by column with the whole inverse of what is left, as in optimal brain surgeon, without blocks or factors."""
    torch.manual_seed(seed)
    x, weight = correlated(192).double(), torch.randn(6, 192)
    moments = (x.t() @ x / len(x)).float()
    made = gptq(weight, moments, 64, False, activation_order=True, damping=0.01)
    damped = moments.double() + 0.01 * moments.double().diagonal().mean() * torch.eye(192)
    left, rest = weight.double().clone(), torch.argsort(moments.diagonal(), descending=True, stable=True).tolist()
    scale, zero = (v.repeat_interleave(64, dim=1).double() for v in fit(weight, 64, False, moments))
    while rest:
        inverse = torch.linalg.inv(damped[rest][:, rest])
        i = rest[0]
        value = ((torch.round(left[:, i] / scale[:, i]) + zero[:, i]).clamp(0, 15) - zero[:, i]) * scale[:, i]
        error = left[:, i] - value
        left[:, rest] -= error[:, None] / inverse[0, 0] * inverse[0]
        left[:, i] = value
        rest = rest[1:]
    # A near-tie may fall the other way in another precision, and moves what comes after it.
    assert float((left - made.dequantize().double()).abs().gt(1e-3).double().mean()) < 0.02


def test_a_compensated_weight_mends_what_came_before(seed: int) -> None:
    """Of all weights it is the nearest in what comes out, up to damping; inputs that are as they should be change nothing."""
    torch.manual_seed(seed)
    true, weight = correlated(96), torch.randn(10, 96)
    x = true + 0.2 * true.std(0) * torch.randn_like(true) + 0.2 * true.roll(1, 1)
    moments, cross = x.t() @ x / len(x), true.t() @ x / len(x)
    made = compensated(weight, moments, cross, 1e-7)
    best = torch.linalg.lstsq(x.double(), true.double() @ weight.double().t()).solution.t()
    torch.testing.assert_close(made.double(), best, rtol=1e-2, atol=1e-2)
    left = [float((x @ w.t() - true @ weight.t()).square().sum()) for w in (weight, compensated(weight, moments, cross))]
    assert left[1] < 0.8 * left[0]
    assert torch.equal(compensated(weight, moments, moments), weight)
    with pytest.raises(NotFactored):
        compensated(weight, torch.full((96, 96), float("nan")), cross)


def test_moments_that_are_degenerate(seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(8, 64)
    assert torch.equal(gptq(weight, torch.zeros(64, 64), 32, True).codes, rounded(weight, *fit(weight, 32, True), 32).codes)
    one = torch.randn(64)
    gptq(weight, torch.outer(one, one), 32, True)  # of rank one
    with pytest.raises(NotFactored):
        gptq(weight, torch.full((64, 64), float("nan")), 32, True)
    with pytest.raises(ValueError, match="groups of 48"):
        gptq(weight, torch.eye(64), 48, True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_never_does_worse_than_rounding_to_nearest(symmetric: bool, seed: int) -> None:
    torch.manual_seed(seed)
    gains = []
    for _ in range(4):
        x = correlated(128)
        weights = [torch.randn(n, 128) for n in (16, 24)]
        moments, magnitude = x.t() @ x / len(x), x.abs().mean(0)
        scale = search_scale(weights, moments, magnitude, 32, symmetric)
        for weight in weights:
            assert error_under(moments, weight, clipped(weight, moments, 32, symmetric).dequantize()) <= error_under(
                moments, weight, quantize(weight, 32, symmetric).dequantize()
            )
        nearest = sum(error_under(moments, w, quantize(w, 32, symmetric).dequantize()) for w in weights)
        scaled = sum(error_under(moments, w, quantize(w * scale, 32, symmetric).dequantize() / scale) for w in weights)
        assert scaled <= nearest
        gains.append(scaled / nearest)
    assert min(gains) < 0.9


class Layer(nn.Module):
    """Norm, then two linears of one input, whose product feeds a third."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.a, self.b, self.c = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.c(nn.functional.silu(self.a(y)) * self.b(y))


def test_where_a_scale_can_be_taken_back_is_found(seed: int) -> None:
    torch.manual_seed(seed)
    layer, x = Layer().requires_grad_(False), torch.randn(1, 20, 64)
    stages = survey(layer, [lambda layer: layer(x)])
    assert [stage.paths for stage in stages] == [["a", "b"], ["c"]]
    before = [p.clone() for p in layer.parameters()]
    assert find_producer(stages[0].before, [layer.a, layer.b], lambda: layer(x)) is layer.norm
    assert find_producer(stages[1].before, [layer.c], lambda: layer(x)) is layer.b  # not a, behind the SiLU
    assert find_producer(stages[0].before, [layer.a], lambda: layer(x)) is None  # b reads the norm too
    assert all(torch.equal(p, q) for p, q in zip(before, layer.parameters(), strict=True))
    runs = [lambda layer: layer(x), lambda layer: layer(-x)]
    found = collect(layer, layer, ["a"], runs, runs)["a"]
    rows = torch.cat([layer.norm(x), layer.norm(-x)]).view(-1, 64)
    torch.testing.assert_close(found.second, rows.t() @ rows / 40)
    torch.testing.assert_close(found.magnitude, rows.abs().mean(0))


def directory(seed: int, at: Path, kind: str = "qwen3", dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    return save(make(kind, seed, dtype, **(WIDE | changes)), at, sharded=seed % 2 == 0)


def windows(seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (6, 30), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "starcoder2", "olmo2"])
def test_calibration_helps_whatever_the_architecture(kind: str, seed: int, tmp_path: Path) -> None:
    """The logits on calibration itself come nearer to the full model's than with rounding to nearest."""
    source = directory(seed, tmp_path / "plain", kind, tie_word_embeddings=kind == "gemma2")
    text, errors = windows(seed), {}
    plain = [reference_on(source, tokens) for tokens in text.tolist()]
    for method in ("rtn", "gptq", "awq", "awq+gptq"):
        quantize_model(source, tmp_path / method, Recipe(method, 32, True), None if method == "rtn" else text)  # type: ignore[arg-type]
        config = config_of(tmp_path / method, quantization="int4", activations="16bit")
        found = logits_on(1, config, text.tolist(), random.Random(seed))
        errors[method] = sum(float((a - b).square().sum()) for a, b in zip(found, plain, strict=True))
    assert errors["gptq"] < errors["rtn"] and errors["awq+gptq"] < errors["rtn"], errors
    assert errors["awq"] < 1.1 * errors["rtn"], errors


def reference_on(source: Path, tokens: list[int]) -> Tensor:
    return logits_on(1, config_of(source), [tokens], random.Random(0))[0]


def test_it_goes_on_where_it_stopped(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = directory(seed, tmp_path / "plain", dtype=torch.bfloat16, tie_word_embeddings=True)
    recipe, text = Recipe("awq+gptq", 32, False), windows(seed)
    done: list[tuple[int, int]] = []
    quantize_model(source, tmp_path / "whole", recipe, text, on_layer=lambda *now: done.append(now))
    assert done == [(1, 2), (2, 2)]

    def stop(index: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(source, tmp_path / "again", recipe, text, on_layer=stop)
    assert not (tmp_path / "again" / INDEX).exists() and len(list((tmp_path / "again").glob("model*"))) == 1
    made: list[int] = []
    plain = stream.quantize_layer
    monkeypatch.setattr(stream, "quantize_layer", lambda *args: (made.append(1), plain(*args))[1])
    quantize_model(source, tmp_path / "again", recipe, text)
    assert len(made) == 1  # the second layer only
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    quantize_model(source, tmp_path / "again", recipe, text)
    assert len(made) == 1
    for other, tokens in ((Recipe("gptq", 32, False), text), (recipe, text + 1)):
        with pytest.raises(ModelError, match="give another --output"):
            quantize_model(source, tmp_path / "again", other, tokens % VOCABULARY)
    with pytest.raises(ModelError, match="holds a model already"):
        quantize_model(tmp_path / "plain", shutil.copytree(source, tmp_path / "copy"), recipe, text)
    with pytest.raises(ModelError, match="is quantised already"):
        quantize_model(tmp_path / "whole", tmp_path / "twice", recipe, text)


def test_one_layer_is_in_memory(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = directory(seed, tmp_path / "plain", num_hidden_layers=4)
    most = 0
    plain = stream.quantize_layer
    skeletons: list[nn.Module] = []
    monkeypatch.setattr(
        "runtime.quantize.source.build_skeleton", lambda *args: (skeletons.append(build_skeleton(*args)), skeletons[-1])[1]
    )

    def weigh(*args: object) -> object:
        nonlocal most
        own = sum(p.numel() for p in args[0].parameters())  # type: ignore[attr-defined]
        all_ = sum(p.numel() for p in skeletons[0].parameters() if not p.is_meta)
        most = max(most, all_ // own)
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(stream, "quantize_layer", weigh)
    for method in ("rtn", "gptq"):
        quantize_model(source, tmp_path / method, Recipe(method, 32, True), windows(seed))  # type: ignore[arg-type]
    assert most == 1


def test_what_is_written(seed: int, tmp_path: Path) -> None:
    source = directory(seed, tmp_path / "plain", dtype=torch.bfloat16)
    (source / "tokenizer.json").write_text("{}")
    quantize_model(source, tmp_path / "four", Recipe("rtn", 64, False), None)
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert (tmp_path / "four" / "tokenizer.json").exists()
    assert build_config(tmp_path / "four").model_type == "qwen3"
    tensors = load_file(tmp_path / "four" / "model-00001-of-00003.safetensors")
    down = "model.layers.0.mlp.down_proj"
    shapes = {name.rpartition(".")[2]: (tuple(v.shape), v.dtype) for name, v in tensors.items() if name.startswith(down)}
    assert shapes == {
        "weight_packed": ((64, 32), torch.int32),
        "weight_scale": ((64, 4), torch.bfloat16),
        "weight_zero_point": ((8, 4), torch.int32),
        "weight_shape": ((2,), torch.int64),
    }
    total = sum(path.stat().st_size for path in (tmp_path / "four").glob("*.safetensors"))
    assert json.loads((tmp_path / "four" / INDEX).read_text())["metadata"]["total_size"] == total
    with pytest.raises(ModelError, match=r"model\.layers\.0 cannot be quantised: .* groups of 128"):
        quantize_model(source, tmp_path / "other", Recipe("rtn", 128, True), None)
