"""Falcon's first models, whose attention in transformers is older than its interface: the same over it.

One projection makes queries, keys and values, KV head after KV head: its queries, its key, its value. So it is whichever way
the heads share keys - all one (7B), in groups (40B, 11B), none - and only the number of KV heads differs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from runtime.checkpoint import ModelError

PLAN = {
    "h.*.self_attention.query_key_value": "colwise_gather_output",
    "h.*.self_attention.dense": "rowwise_split_input",
    "h.*.mlp.dense_h_to_4h": "colwise",
    "h.*.mlp.dense_4h_to_h": "rowwise",
}


class FalconAttention(nn.Module):
    """Stands in for transformers' module of the same name, and takes over its projections."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = inner.config, inner.layer_idx, True
        self.kv_heads, self.head_dim = inner.num_kv_heads, inner.head_dim
        self.num_key_value_groups = inner.num_heads // inner.num_kv_heads
        self.query_key_value, self.dense = inner.query_key_value, inner.dense

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        """[B, T, W] -> [B, T, W], and no scores."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

        shape = (*hidden_states.shape[:2], self.kv_heads, self.num_key_value_groups + 2, self.head_dim)
        together = self.query_key_value(hidden_states).view(shape)
        query, key, value = (x.flatten(2, 3).transpose(1, 2) for x in together.split((shape[3] - 2, 1, 1), dim=3))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        heads, _ = attention(self, query, key, value, attention_mask, dropout=0.0, scaling=self.head_dim**-0.5)
        return self.dense(heads.reshape(hidden_states.shape)), None


def rework(model: PreTrainedModel) -> None:
    """Puts `FalconAttention` and plain linears in a skeleton. Raises ModelError for a Falcon without rotary positions."""
    from transformers.models.falcon import modeling_falcon

    if model.config.alibi:
        raise ModelError("falcon with alibi biases attention by distance; only rotary positions run here")
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, modeling_falcon.FalconAttention):
            setattr(model.get_submodule(parent), name, FalconAttention(module))
            model.config.num_key_value_heads = module.num_kv_heads
        elif isinstance(module, modeling_falcon.FalconLinear):
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            setattr(model.get_submodule(parent), name, plain)
