"""Four-bit weights as compressed-tensors' `pack-quantized` files hold them, which vLLM and transformers read too.

https://github.com/vllm-project/compressed-tensors; the bits are described in `stored`, which reads them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from runtime.quantize.int4 import MIDDLE, Int4Weight


def packed_tensors(path: str, weight: Int4Weight, symmetric: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """A linear's tensors by name. Scales are stored as `dtype` where that loses nothing, else as float32."""
    narrow = weight.scale.to(dtype)
    found = {
        f"{path}.weight_packed": _words(weight.codes),
        f"{path}.weight_scale": narrow if torch.equal(narrow.float(), weight.scale) else weight.scale,
        f"{path}.weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }
    if symmetric:
        assert bool((weight.zero == MIDDLE).all())
    else:
        found[f"{path}.weight_zero_point"] = _words(weight.zero.t()).t()
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def expanded(path: str, tensors: Mapping[str, Tensor], group_size: int) -> Tensor:
    """The weight float32 [N, K] that `packed_tensors` wrote."""
    outputs, inputs = tensors[f"{path}.weight_shape"].tolist()
    scale = tensors[f"{path}.weight_scale"].float()
    zeros = tensors.get(f"{path}.weight_zero_point")
    zero = torch.full(scale.shape, MIDDLE, dtype=torch.uint8) if zeros is None else _codes(zeros.t())[:, :outputs].t()
    codes = _codes(tensors[f"{path}.weight_packed"])[:, :inputs]
    return Int4Weight(codes.contiguous(), scale, zero.contiguous(), group_size).dequantize()


def description(group_size: int, symmetric: bool, ignored: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. ignored: the linears that stay as they were."""
    weights = {
        "num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size,
        "dynamic": False, "actorder": None, "observer": "minmax", "observer_kwargs": {}, "block_structure": None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        },
    }


def _words(codes: Tensor) -> Tensor:
    """uint8 [A, B] -> int32 [A, B / 8 rounded up], eight codes a word, the first in the lowest bits."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8))
    pairs = codes.reshape(len(codes), -1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).contiguous().view(torch.int32)


def _codes(words: Tensor) -> Tensor:
    octets = words.contiguous().view(torch.uint8)
    return torch.stack([octets & 15, octets >> 4], dim=-1).view(len(words), -1)
