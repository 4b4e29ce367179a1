"""Compiles every kernel for GPUs in variants that a run may meet; a process of its own, as tests interpret kernels.

The interpreter takes code that the compiler refuses. An integer argument of 1 becomes a constant, and so does None.
"""

from __future__ import annotations

from typing import Any

from bench.compiled import build
from runtime.kernels.gpu import attention, cache, linear, sampling

PRODUCT: dict[str, Any] = {"GROUP": 32, "SPAN": 32, "ZERO": True, "SPLIT": False, "TILE_N": 64, "TILE_M": 16}
ATTEND: dict[str, Any] = {"KV": 1, "GROUP": 5, "SIZE": 48, "DIM": 24, "TILE_H": 8, "TILE_T": 2, "TILE_D": 32, "CAPPED": True}


def compiled(kernel: Any, dtypes: dict[str, str], integers: str, ones: str, constants: dict[str, Any]) -> None:
    """dtypes: of all pointers and floats; integers and ones: names, the latter's of arguments that are 1."""
    types = {**dtypes, **dict.fromkeys(integers.split(), "i32")}
    for name in ones.split():
        types.pop(name)
    build(kernel, types, {**constants, **dict.fromkeys(ones.split(), 1)}, 90, 4, 2)


def main() -> None:
    whole = "rows outputs inputs stride blocks pieces"
    for x, scale, ones, precision in (
        ("fp16", "fp32", "rows blocks pieces", "tf32"), ("bf16", "bf16", "outputs", "tf32"), ("fp32", "bf16", "rows", "ieee"),
    ):  # fmt: skip
        dtypes = {"x": f"*{x}", "codes": "*i32", "scale": f"*{scale}", "zero": "*u8", "out": f"*{x}"}
        compiled(linear._product, dtypes, whole, ones, {**PRODUCT, "PRECISION": precision})
    compiled(linear._add_pieces, {"parts": "*fp32", "out": "*fp16"}, "count pieces", "count", {"TILE": 1024})

    whole = "count sequences blocks width stride_t stride_h window"
    floats = {"scale": "fp32", "cap": "fp32"} | dict.fromkeys(("sinks", "tops", "totals"), "*fp32")
    places = dict.fromkeys(("tables", "rows", "positions"), "*i32")
    for x, ones, split, precision in (
        ("bf16", "count sequences blocks width window", False, "tf32"), ("fp16", "", True, "tf32"), ("fp32", "", False, "ieee"),
    ):  # fmt: skip
        dtypes = floats | places | dict.fromkeys(("query", "keys", "values"), f"*{x}")
        dtypes["result"] = "*fp32" if split else f"*{x}"
        compiled(attention._attend, dtypes, whole, ones, {**ATTEND, "SINKS": True, "SPLIT": split, "PRECISION": precision})
    dtypes = dict.fromkeys(("tops", "totals", "outs", "sinks"), "*fp32") | {"positions": "*i32", "rows": "*i32"}
    constants = {"HEADS": 5, "TILE": 8, "DIM": 24, "TILE_D": 32, "SINKS": True}
    for ones in ("", "sequences window"):
        compiled(attention._join, {**dtypes, "result": "*fp16"}, "sequences pieces window", ones, constants)

    dtypes = dict.fromkeys(("logits", "temperatures", "scores"), "*fp32")
    dtypes |= {"seeds": "*i64", "positions": "*i64", "ids": "*i32"}
    for ones in ("", "first stride"):
        compiled(sampling._tiles, dtypes, "stride first", ones, {"VOCAB": 1000, "TILE": 1024})
    dtypes = {"scores": "*fp32", "ids": "*i32", "best_scores": "*fp32", "best_ids": "*i64"}
    compiled(sampling._merge, dtypes, "first tiles", "first tiles", {"WIDTH": 256})
    dtypes = dict.fromkeys(("key", "value", "keys", "values"), "*fp16") | {"slots": "*i64"}
    strides = "spaces key_token key_head value_token value_head"
    constants = {"HEADS": 3, "DIM": 24, "SIZE": 1, "TILE_H": 4, "TILE_D": 32}
    compiled(cache._write, dtypes, strides, "spaces", constants)
    print("compiled")


if __name__ == "__main__":
    main()
