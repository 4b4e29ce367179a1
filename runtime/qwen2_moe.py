"""Qwen2's mixture of experts, whose shared expert is let in by a sigmoid: here that is a module, which `pointwise` steadies."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class Qwen2Mixture(nn.Module):
    """Stands in for transformers' Qwen2MoeSparseMoeBlock, and takes over all that it has."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.gate, self.experts = inner.gate, inner.experts
        self.shared_expert, self.shared_expert_gate = inner.shared_expert, inner.shared_expert_gate
        self.share = nn.Sigmoid()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[1, T, W] -> the same."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, chosen = self.gate(x)
        shared = self.share(self.shared_expert_gate(x)) * self.shared_expert(x)
        out: Tensor = self.experts(x, chosen, weights) + shared
        return out.view(hidden_states.shape)


def rework(model: PreTrainedModel) -> None:
    """Puts `Qwen2Mixture` in a skeleton."""
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    for path, module in list(model.named_modules()):
        if isinstance(module, Qwen2MoeSparseMoeBlock):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Qwen2Mixture(module))
