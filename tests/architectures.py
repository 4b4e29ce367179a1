"""Every causal-LM architecture of transformers as a tiny random model, and the table of which run.

`python -m tests.architectures` prints the table that stands in MODELS.md.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from configs.schema import ModelConfig
from runtime.architecture import ALIASES
from runtime.checkpoint import ModelError
from runtime.comm import Solo
from runtime.layout import lay_out
from runtime.model import load_model
from runtime.quantize.int4 import quantize
from runtime.skeleton import build_config, build_skeleton

KINDS = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *ALIASES})
# What configs call the sizes of a model. One that has such a field is given this.
SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 32, "intermediate_size": 160, "ffn_hidden_size": 160, "n_inner": 160, "max_position_embeddings": 128,
    "sliding_window": 11, "rotary_dim": 8, "kv_lora_rank": 32, "q_lora_rank": 64, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 160,
    "shared_expert_intermediate_size": 160, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
SWITCHES = {"sliding_window", "q_lora_rank", "n_inner", "rotary_dim"}  # which are off where they are None
LATENT = {"num_key_value_heads": 8, "head_dim": 8}  # every head has keys of its own; head_dim is what turns of it
# What else an architecture needs to be small, or to have all its parts.
OTHERS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [5, 5, 6]}},
    },
    "codegen": {"head_dim": None, "num_key_value_heads": None},
    "helium": {"head_dim": 16},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 100, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
    },
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "dots1": {"n_shared_experts": 1},
    "flint": {"mlp_only_layers": [0]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {
        "attention_chunk_size": 8, "floor_scale": 5, "attn_scale": 0.5, "no_rope_layers": [1, 0], "moe_layers": [0],
        "intermediate_size_mlp": 160,
    },
    "starcoder2": {"use_bias": True},
} | dict.fromkeys(
    ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "sarvam_mla", "youtu"), LATENT
)


def tiny(kind: str, **changes: Any) -> PretrainedConfig:
    """A small config. `changes` of SIZES hold where the architecture leaves them open."""
    if kind in ALIASES:
        return tiny("llama", **changes, attention_bias=True)
    raw = CONFIG_MAPPING[kind]
    own, special = raw(), OTHERS.get(kind, {})
    sizes = {x: SIZES[x] for x in SIZES if hasattr(own, x) and not (x in SWITCHES and getattr(own, x) is None)}
    sizes = {x: sizes[x] for x in sizes if getattr(getattr(raw, x, None), "fset", True)}  # but what follows from others
    return raw(**(sizes | {x: changes[x] for x in changes if x in sizes or x not in SIZES} | special))


def build(kind: str, directory: Path, seed: int, **changes: Any) -> PreTrainedModel:
    """A random model whose parameters all matter, in float32, which is saved there. Raises ModelError if it cannot run."""
    (directory / "config.json").write_text(json.dumps({"model_type": kind}))
    build_config(directory)  # as it is if nothing is said
    config = tiny(kind, **changes)
    config.save_pretrained(directory)
    lay_out(build_skeleton(build_config(directory), torch.float32), 1, 0, 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape) * (0.1 if weight.dim() == 1 else weight.shape[-1] ** -0.5)
            weight.data = noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        model.tie_weights()
    model.save_pretrained(directory)
    if kind in ALIASES:
        raw = json.loads((directory / "config.json").read_text())
        raw |= {"model_type": kind, "architectures": [f"{kind}ForCausalLM"], "bias": raw.pop("attention_bias")}
        (directory / "config.json").write_text(json.dumps(raw))
    return model


def quantised(model: PreTrainedModel, directory: Path, group_size: int) -> None:
    """Puts the values that four bits leave in the place of the weights that are split."""
    layout = lay_out(build_skeleton(build_config(directory), torch.float32), 1, 0, 1)
    for path in (*(path for columns in layout.columns for path in columns.paths), *(rows.path for rows in layout.rows)):
        weight = weight_of(model, path)
        weight.copy_(quantize(weight, group_size, True).dequantize())


def weight_of(model: PreTrainedModel, path: str) -> Tensor:
    """A linear's weight in transformers' model, whose experts have theirs in one tensor."""
    block, found, rest = path.rpartition(".experts.")
    if not found:
        return model.get_submodule(path).weight.data
    experts, (index, name) = model.get_submodule(f"{block}.experts"), rest.split(".")
    packed = (experts.down_proj if name == "down_proj" else experts.gate_up_proj).data[int(index)]
    if getattr(experts, "is_transposed", "Llama4" in type(experts).__name__):
        packed = packed.t()
    return packed if name == "down_proj" else packed.chunk(2)[name == "up_proj"]


def refusal(kind: str) -> str:
    """Why an architecture cannot run; nothing if it does."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            build(kind, Path(directory), 0)
            load_model(ModelConfig(target=directory, quantization="none"), Solo())
        except ModelError as error:
            return str(error)
    return ""


def row(kind: str, why: str) -> str:
    """A line of the table. A reason begins with the architecture's name, and maybe with where its files are."""
    reason = re.sub(r"\s+", " ", why.split("config.json ")[-1]).replace("|", "\\|").removeprefix(f"{kind} ")
    return f"| `{kind}` | {'no' if why else 'yes'} | {reason} |"


def table() -> str:
    return "\n".join(["| architecture | runs | why not |", "| --- | --- | --- |", *(row(x, refusal(x)) for x in KINDS)]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
