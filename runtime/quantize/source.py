"""The model that is to be quantised: a plain directory of Hugging Face, checked before any weight is read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from runtime.checkpoint import Checkpoint, ModelError, read_json
from runtime.experts import unpack_files
from runtime.skeleton import build_config, build_skeleton, present_names, tied_weights, weight_names


def open_source(directory: Path) -> tuple[PreTrainedModel, Checkpoint]:
    """The architecture without weights, and the open files that have just these. Raises ModelError."""
    if read_json(directory, "config.json").get("quantization_config"):
        raise ModelError(f"{directory} is quantised already; give the plain 16-bit checkpoint")
    module = build_skeleton(build_config(directory), torch.float32)
    module.config._attn_implementation = "eager"  # the one that every architecture has, soft caps and sinks included
    checkpoint = Checkpoint(directory)
    checkpoint.rename(present_names(module))
    unpack_files(module, checkpoint)
    checkpoint.check(dict(weight_names(module)), set(checkpoint.shapes) & set(tied_weights(module)))
    return module, checkpoint


def decoder_layers(module: PreTrainedModel) -> nn.ModuleList:
    """The list of the model's layers: as many as its config says. Raises ModelError if there is none."""
    count = module.config.get_text_config().num_hidden_layers
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ModelError(f"{module.config.model_type} has no list of {count} layers; it cannot be quantised layer by layer")
    return lists[0]
