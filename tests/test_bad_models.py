"""Model directories that cannot be used, seen as a user sees them: one command, a named error, exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.quantize import main as quantize
from runtime.checkpoint import INDEX
from tests.jobs import ROOT, finish, launcher_command, start, write_requests
from tests.tiny_models import make, save

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def truncate(directory: Path) -> None:
    path = max(directory.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def lose(directory: Path) -> None:
    max(directory.glob("*.safetensors")).unlink()


def configure(**values: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def quantised(**values: Any) -> Callable[[Path], None]:
    return configure(quantization_config=values)


def compressed(weights: dict[str, Any] | None = None, **values: Any) -> Callable[[Path], None]:
    group = {"targets": ["Linear"], "weights": WEIGHTS | (weights or {}), **values.pop("group", {})}
    return quantised(quant_method="compressed-tensors", format="pack-quantized", config_groups={"group_0": group}, **values)


CASES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "truncated file": (truncate, ("safetensors cannot be used", "download the model again")),
    "absent file": (lose, ("is not there", INDEX)),
    "other shapes": (configure(intermediate_size=192), ("gate_proj.weight", "is [160, 64], its config.json makes it [192,")),
    "impossible size": (configure(vocab_size=-1), ("transformers", "cannot build a llama", "RuntimeError: ")),
    "unknown method": (quantised(quant_method="bitsandbytes"), ("quant_method", "'bitsandbytes'; read here")),
    "three bits": (quantised(quant_method="gptq", bits=3, group_size=32), ("config.bits", "is 3; read here: 4 or 8")),
    "rounded activations": (compressed({"num_bits": 8}, group={"input_activations": {"num_bits": 8}}), ("input_activations",)),
    "sparse": (compressed(sparsity_config={"format": "sparse-24-bitmask"}), ("sparsity_config.format", "'sparse-24-bitmask'")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_cannot_be_used_is_refused_by_name(name: str, seed: int, tmp_path: Path) -> None:
    spoil, told = CASES[name]
    model = save(make("llama", seed), tmp_path / "model", sharded=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "configs/demo/target" / file, model)
    spoil(model)
    words = ["parallel.tensor=1", f"model.target={model}", "engine.max_model_len=64"]
    prompts = write_requests(tmp_path / "in.jsonl", 2)
    code, output = finish(start(launcher_command("python", 1), tmp_path, *words, prompts=prompts))
    assert code == 2 and "ModelError" in output and all(part in output for part in told), output
    assert "Traceback" not in output and not (tmp_path / "out.jsonl").read_text(), output


@pytest.mark.parametrize("name", ["truncated file", "absent file", "other shapes", "impossible size"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_quantiser_refuses_it_too(
    method: str, name: str, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it writes anything, its own calibration text included."""
    spoil, told = CASES[name]
    spoil(save(make("llama", seed), tmp_path / "model", sharded=True))
    words = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "four"), "--method", method, "--group-size", "32"]
    assert quantize([*words, "--samples", "1", "--length", "8"]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in told), error
    assert not (tmp_path / "four").exists()
