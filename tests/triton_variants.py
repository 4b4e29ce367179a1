"""Compiles every kernel for GPUs in variants that a run may meet; a process of its own, as tests interpret kernels.

The interpreter takes code that the compiler refuses. An integer argument of 1 becomes a constant, and so does None.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from bench.compiled import build
from runtime.kernels.gpu import attention, cache, dense, gates, layer, linear, sampling

TILE: dict[str, Any] = {"WHOLE": False, "TILE_N": 64, "TILE_M": 16}
PRODUCT: dict[str, Any] = {"GROUP": 32, "SPAN": 32, "ZERO": True, "SPLIT": False, "PIECE": 4, **TILE}
ATTEND: dict[str, Any] = {"KV": 1, "GROUP": 5, "SIZE": 48, "DIM": 24, "TILE_H": 8, "TILE_T": 2, "TILE_D": 32, "CAPPED": True}


def compiled(kernel: Any, dtypes: dict[str, str], integers: str, ones: str, constants: dict[str, Any]) -> None:
    """dtypes: of all pointers and floats; integers and ones: names, the latter's of arguments that are 1."""
    types = {**dtypes, **dict.fromkeys(integers.split(), "i32")}
    for name in ones.split():
        types.pop(name)
    build(kernel, types, {**constants, **dict.fromkeys(ones.split(), 1)}, 90, 4, 2)


def main() -> None:
    whole = "rows outputs inputs stride blocks"
    for x, scale, ones, gate, precision in (
        ("fp16", "fp32", "rows blocks", "gelu_tanh", "tf32"), ("bf16", "bf16", "outputs", None, "tf32"),
        ("fp32", "bf16", "rows", "silu", "ieee"),
    ):  # fmt: skip
        dtypes = {"x": f"*{x}", "codes": "*i32", "scale": f"*{scale}", "zero": "*u8", "out": f"*{x}"}
        compiled(linear._product, dtypes, whole, ones, {**PRODUCT, "GATE": gate, "PRECISION": precision})
        constants = {**TILE, "SPLIT": False, "PIECE": 1024, "x_scale": None, "scale": None, "PRECISION": precision}
        dtypes = {"x": f"*{x}", "weight": f"*{x}", "out": f"*{x}"}
        compiled(dense._dense, dtypes, "rows outputs inputs stride", "rows inputs", constants)
    for gate in (None, "gelu_tanh"):
        dtypes = {"parts": "*fp32", "out": "*fp16"}
        compiled(linear.add_pieces, dtypes, "count width pieces", "count", {"GATE": gate, "TILE": 1024})
    dtypes = {"x": "*i8", "weight": "*i8", "temperatures": "*fp32", "seeds": "*i64", "positions": "*i64", "scores": "*fp32"}
    dtypes |= {"ids": "*i32", "x_scale": "*fp32", "scale": "*fp32"}
    constants = {**TILE, "PIECE": 1024, "DTYPE": tl.float16, "PRECISION": "tf32"}
    compiled(dense._head, dtypes, "rows outputs inputs stride first tiles", "rows stride first tiles", constants)
    compiled(dense._round, {"x": "*fp16", "codes": "*i8", "scales": "*fp32"}, "stride inputs", "inputs", {"TILE": 16})

    whole = "count height sequences blocks width stride_t stride_h window"
    floats = {"scale": "fp32", "cap": "fp32"} | dict.fromkeys(("sinks", "tops", "totals"), "*fp32")
    places = dict.fromkeys(("tables", "rows", "positions"), "*i32")
    for x, ones, split, form, precision in (
        ("bf16", "count height sequences blocks width window", False, "same", "tf32"), ("fp16", "", True, "fp8", "tf32"),
        ("fp32", "", False, "int8", "ieee"),
    ):  # fmt: skip
        dtypes = floats | places | dict.fromkeys(("keys", "values"), f"*{x}" if form == "same" else "*i8")
        dtypes |= {"query": f"*{x}", "result": "*fp32" if split else f"*{x}", "key_scales": "*fp32", "value_scales": "*fp32"}
        constants = {**ATTEND, "SINKS": True, "SPLIT": split, "FORM": form, "PRECISION": precision}
        compiled(attention._attend, dtypes, whole, ones, constants)
    dtypes = dict.fromkeys(("tops", "totals", "outs", "sinks"), "*fp32") | {"positions": "*i32", "rows": "*i32"}
    constants = {"HEADS": 5, "TILE": 8, "DIM": 24, "TILE_D": 32, "SINKS": True}
    for ones in ("", "sequences window"):
        compiled(attention._join, {**dtypes, "result": "*fp16"}, "sequences pieces window", ones, constants)

    dtypes = dict.fromkeys(("logits", "temperatures", "scores"), "*fp32")
    dtypes |= {"seeds": "*i64", "positions": "*i64", "ids": "*i32"}
    for ones in ("", "first stride"):
        compiled(sampling._tiles, dtypes, "stride first", ones, {"cuts": None, "VOCAB": 1000, "TILE": 1024})
    compiled(sampling._tiles, {**dtypes, "cuts": "*i64"}, "stride first", "", {"VOCAB": 1000, "TILE": 1024})
    dtypes = {"logits": "*fp16", "temperatures": "*fp32"}
    for kept in (7, 64):
        constants = {"VOCAB": 1000, "TILE": 1024, "KEPT": kept}
        compiled(sampling._lists, {**dtypes, "keys": "*i64"}, "stride first", "stride", constants)
    constants = {"VOCAB": 1000, "TILE": 1024}
    compiled(sampling._sums, {**dtypes, "tops": "*fp32", "sums": "*fp64"}, "stride", "stride", constants)
    dtypes = {"scores": "*fp32", "ids": "*i32", "best_scores": "*fp32", "best_ids": "*i64"}
    compiled(sampling._merge, dtypes, "first tiles", "first tiles", {"WIDTH": 256})
    for x, form, held in (("fp16", "same", "*fp16"), ("fp32", "int8", "*i8"), ("bf16", "fp8", "*i8")):
        caches = dict.fromkeys(("keys", "values"), held) | dict.fromkeys(("key_scales", "value_scales"), "*fp32")
        dtypes = caches | {"key": f"*{x}", "value": f"*{x}", "slots": "*i64"}
        constants = {"HEADS": 3, "DIM": 24, "SIZE": 1, "FORM": form, "TILE_H": 4, "TILE_D": 32}
        compiled(cache._write, dtypes, "spaces key_token key_head value_token value_head", "spaces", constants)
        dtypes = caches | dict.fromkeys(("qkv", "cos", "sin", "query"), f"*{x}") | {"slots": "*i64", "eps": "fp32"}
        constants = {"HEADS": 3, "KV": 1, "SIZE": 1, "DIM": 24, "TURNED": 12, "EARLY": False, "FORM": form, "TILE": 32}
        if form == "fp8":
            constants |= {"query_norm": None, "key_norm": None}
        else:
            dtypes |= {"query_norm": "*fp32", "key_norm": "*fp32"}
        compiled(layer._rotate, dtypes, "spaces stride turn", "spaces", constants)
        dtypes = {"x": f"*{x}", "weight": "*fp32", "normed": f"*{x}", "total": f"*{x}", "eps": "fp32"}
        constants = {"residual": None, "WIDTH": 31, "EARLY": True, "TILE": 32}
        compiled(layer._norm, dtypes, "stride more", "stride", constants)
        constants = {"ACTIVATION": "gelu_tanh", "TILE": 64}
        compiled(gates._gated, {"both": f"*{x}", "out": f"*{x}"}, "stride width", "width", constants)
    print("compiled")


if __name__ == "__main__":
    main()
