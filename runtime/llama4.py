"""What Llama 4 has of its own: experts that get a row times its score, and queries that grow with their position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.experts import Experts


class Llama4Mixture(nn.Module):
    """Stands in for transformers' Llama4TextMoe, which computes every expert for every row, and takes over its router and
    shared expert."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.top_k, self.router, self.shared_expert = inner.top_k, inner.router, inner.shared_expert
        count, width, wide = inner.experts.gate_up_proj.shape
        with torch.device("meta"):
            self.experts = Experts(count, width, wide // 2, inner.experts.act_fn, early=True, turned=True)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[1, T, W] -> [T, W] and the router's logits [T, E]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(x)  # zero for those that weren't chosen
        weights, chosen = scores.topk(self.top_k, dim=1)
        return self.shared_expert(x) + self.experts(x, chosen, weights), logits


class Llama4Rotary(nn.Module):
    """Stands in for transformers' rotary embedding, which in some versions lays angles out by frequency: a few rows then get
    other roundings than many."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, _: Tensor, position_ids: Tensor) -> Tensor:
        """Positions [1, T] -> complex [1, T, D / 2], of the length that the scaling gives them."""
        angles = position_ids[..., None].float() * self.inner.inv_freq.float()
        return torch.polar(torch.ones_like(angles), angles) * self.inner.attention_scaling


def rework(model: PreTrainedModel) -> None:
    """Puts `Llama4Mixture` and `Llama4Rotary` in a skeleton."""
    from transformers.models.llama4 import modeling_llama4

    ours = {modeling_llama4.Llama4TextMoe: Llama4Mixture, modeling_llama4.Llama4TextRotaryEmbedding: Llama4Rotary}
    for path, module in list(model.named_modules()):
        if type(module) in ours:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, ours[type(module)](module))


class Tuning:
    """Scales queries by where they stand: log(1 + floor((position + 1) / step)) * strength + 1, out of a table, as the last bit
    of a logarithm may depend on its place in a tensor."""

    def __init__(self, step: int, strength: float, length: int, device: torch.device) -> None:
        self._step = step
        self._factors = torch.log1p(torch.arange(length // step + 2, device=device).float()) * strength + 1.0

    def __call__(self, queries: Tensor, positions: Tensor) -> Tensor:
        """[T, H, D] and int64 [T] -> [T, H, D]."""
        return (queries * self._factors[(positions + 1) // self._step][:, None, None]).to(queries.dtype)


def take_over_tuning(module: Any, length: int, device: torch.device) -> None:
    """Leaves an attention module's scaling to whoever attends: by itself it counts positions from the start of a call."""
    module.attn_temperature_tuning = False
    if not module.use_rope:
        module.tuning = Tuning(module.floor_scale, module.attn_scale, length, device)
