"""A model's architecture without its weights, out of transformers."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from runtime.architecture import REWORKED, check_parts, understand
from runtime.checkpoint import ModelError, read_json
from runtime.experts import names_in_files, unpack_experts
from runtime.rope import longest, settle

ATTENTION = "quasar"  # what our attention is called in transformers' registry

EXPERT = re.compile(r"(\.experts\.\d+\.)(\w+)\.")  # of a tensor's name: up to an expert's linear, and what it is called

# While it builds, transformers sets torch's default dtype, which threads share.
_BUILDING = threading.Lock()


class _EmptyOnMeta(TorchFunctionMode):
    """Puts on the meta device what weights are made of, uninitialised memory; small computed buffers stay real."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_config(directory: str | Path) -> PretrainedConfig:
    """The directory's config.json as transformers reads it. Raises ModelError for what cannot run here."""
    directory = Path(directory)
    raw = read_json(directory, "config.json")
    if not raw:
        raise ModelError(f"{directory / 'config.json'} is missing; model.target names a downloaded Hugging Face model")
    config = understand(raw, str(directory))
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # `runtime.quantize.schemes` reads it; transformers would ask for its libraries
    return config


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype, length: int | None = None) -> PreTrainedModel:
    """The model with weights on the meta device and computed buffers (rotary frequencies and such) on the CPU.

    length: the longest sequence there will be, by default the longest that the config knows: some rotary embeddings
    depend on it. Raises ModelError for an architecture that cannot run here.
    """
    try:
        with _BUILDING, _EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # whatever a model's own code does with sizes that it doesn't expect
        what = f"transformers {transformers.__version__} cannot build a {config.model_type} of this config.json"
        raise ModelError(f"{what}: {type(error).__name__}: {error}") from error
    check_parts(model)
    with _BUILDING:
        REWORKED.get(config.model_type, lambda _: None)(model)
        unpack_experts(model)
    settle(model, length or longest(config))
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ModelError(f"{config.model_type}: the buffer {name} cannot be computed before loading")
    model.config._attn_implementation = ATTENTION
    return model.eval().requires_grad_(False)


def present_names(model: PreTrainedModel) -> Callable[[str], str]:
    """What the architecture calls a tensor that a checkpoint, maybe an older one, has under some name."""
    mapping = get_model_conversion_mapping(model)
    renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
    of_experts = {k: v for x in mapping if isinstance(x, WeightConverter) for k, v in names_in_files(x).items()}
    known = set(model.state_dict(keep_vars=True))

    def present(name: str) -> str:
        if name not in known:
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            name = EXPERT.sub(lambda found: f"{found[1]}{of_experts.get(found[2], found[2])}.", name)
        return name

    return present


def weight_names(model: PreTrainedModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes a checkpoint must have; of weights that are tied, only the one that is stored."""
    tied = set(tied_weights(model))
    for name, value in model.state_dict(keep_vars=True).items():
        if name not in tied:
            yield name, tuple(value.shape)


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Weights that are another one, by name: the head's and the embedding's, if the config ties them."""
    if not model.config.get_text_config().tie_word_embeddings:
        return {}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None:
        return {}
    return {f"{path_of(model, head)}.weight": f"{path_of(model, embedding)}.weight"}


def path_of(model: nn.Module, module: nn.Module) -> str:
    """The dotted name of a module inside a model."""
    return next(name for name, found in model.named_modules() if found is module)


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts another module in a path's place."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
