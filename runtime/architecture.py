"""Which architectures run here, and how their layers are split.

An architecture runs if transformers has a plan for it and nothing but attention carries its past. What else there is to
know of one by its name stands in the two tables at the top.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from runtime import falcon, llama4, qwen2_moe
from runtime.checkpoint import ModelError
from runtime.experts import names_in_files

LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention", "attention"}

# Shipped with code of their own that computes what an architecture of transformers does: what their config is there.
ALIASES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "PanguEmbedded": lambda raw: raw | {"model_type": "llama", "attention_bias": raw.get("bias", True)},
}

def _plan(block: str, columns: str, rows: str) -> dict[str, str]:
    """How a block of every layer is split: linears by the first part of their names."""
    kinds = dict.fromkeys(columns.split(), "colwise") | {rows: "rowwise"}
    return {f"layers.*.{block}.{name}_proj": kind for name, kind in kinds.items()}


ATTENTION = _plan("self_attn", "q k v", "o")
LATENT = _plan("self_attn", "q q_b kv_b", "o")
MLP = _plan("mlp", "gate up", "down")
# What transformers' plans leave out.
PLANS: dict[str, dict[str, str]] = {
    "afmoe": _plan("self_attn", "q k v gate", "o") | MLP | _plan("mlp.shared_experts", "gate up", "down"),
    "axk1": LATENT,
    "deepseek_v3": LATENT,
    "exaone_moe": _plan("mlp.shared_experts", "gate up", "down"),
    "falcon": falcon.PLAN,
    "flint": ATTENTION | {"layers.*.self_attn.sinks": "colwise"},
    "glm4_moe_lite": _plan("mlp.shared_experts", "gate up", "down"),
    "granitemoe": ATTENTION,
    "granitemoeshared": ATTENTION,
    "hunyuan_v1_dense": ATTENTION | MLP,
    "hunyuan_v1_moe": ATTENTION | _plan("mlp.shared_mlp", "gate up", "down"),
    "phimoe": ATTENTION,
    "qwen2_moe": _plan("mlp.shared_expert", "gate up", "down"),
    "sarvam_mla": LATENT,
    "solar_open": _plan("mlp.shared_experts", "gate up", "down"),
}


# Whose modules don't do as they are.
REWORKED: dict[str, Callable[[PreTrainedModel], None]] = {
    "falcon": falcon.rework,
    "llama4_text": llama4.rework,
    "qwen2_moe": qwen2_moe.rework,
}


def understand(raw: dict[str, Any], directory: str) -> PretrainedConfig:
    """A config.json as a config of transformers, with a plan. Raises ModelError for what cannot run here."""
    kind = raw.get("model_type")
    try:
        if kind in ALIASES:
            known = ALIASES[kind](raw)
            config = CONFIG_MAPPING[known["model_type"]].from_dict(known)
        else:
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises KeyError, ValueError, OSError, TypeError and validation errors
        what = f"{directory}/config.json describes no model transformers {transformers.__version__} can build"
        raise ModelError(f"{what}: {error}") from error
    kind = config.model_type
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"{kind} is no model for text generation in transformers")
    if config.sub_configs:
        raise ModelError(f"{kind} wraps a text model together with others; only text models run here")
    if config.is_encoder_decoder:
        raise ModelError(f"{kind} is an encoder-decoder; only decoders run here")
    other = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if other:
        raise ModelError(f"{kind} has layers of type {', '.join(sorted(other))}; only attention runs here")
    if getattr(config, "is_heterogeneous", False):
        raise ModelError(f"{kind} has layers of different shapes; only equal ones run here")
    if kind in PLANS:
        config.base_model_tp_plan = (config.base_model_tp_plan or {}) | PLANS[kind]  # type: ignore[misc]
    if not {"rowwise", "rowwise_split_input"} & set((config.base_model_tp_plan or {}).values()):
        raise ModelError(f"{kind} has no tensor-parallel plan for its layers in transformers")
    return config


def check_parts(model: PreTrainedModel) -> None:
    """Raises ModelError for a model with parts that cannot run here, whatever its config says."""
    config = model.config
    converters = [x for x in get_model_conversion_mapping(model) if isinstance(x, WeightConverter)]
    if not all(names_in_files(x) for x in converters):
        raise ModelError(f"{config.model_type} has checkpoints that pack weights together, which aren't understood here")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ModelError(f"{config.model_type} has layers that share keys and values with others, which aren't supported yet")
