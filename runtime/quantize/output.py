"""The directory that a quantised model is written to: whole files only, and a mark of what they are made of."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.checkpoint import ModelError, read_json
from runtime.quantize.layer import Recipe

MARK = "quantization_recipe.json"


def mark(output: Path, recipe: Recipe, digest: str, windows: Tensor | None) -> None:
    """Notes what the directory is made of. Raises ModelError where another recipe, model or calibration began it."""
    calibration = None if windows is None else hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest()[:16]
    made_of = {"recipe": asdict(recipe), "model": digest, "calibration": calibration}
    found = read_json(output, MARK)
    if found and found != made_of:
        raise ModelError(f"{output} holds what another recipe, model or calibration made; give another --output")
    if not found and any(output.glob("*.safetensors")):
        raise ModelError(f"{output} holds a model already; give another --output")
    write(output / MARK, made_of)


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file that is there whole or not at all."""
    draft = path.with_name(f".{path.name}")
    draft.touch()  # with the mode that the user's mask gives; safetensors' own would be for them alone
    mode = draft.stat().st_mode
    save_file(tensors, draft, metadata={"format": "pt"})
    draft.chmod(mode)
    os.replace(draft, path)


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file that is there whole or not at all."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(draft, path)


def names_in(path: Path) -> list[str]:
    """The tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
