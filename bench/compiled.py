"""Compiles the GPU's kernels with no GPU at hand and lists what the compiler says of them, as a Markdown table.

    python -m bench.compiled            # needs triton, whose package brings NVIDIA's assembler

Registers and spills are a thread's, as `cuobjdump -res-usage` reads them; shared memory is a program's. Times need a card.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.tables import table
from runtime.kernels.gpu import attention, cache, linear, sampling
from runtime.kernels.gpu.table import FOLDER, parse

EVEN = {"outputs", "inputs", "stride", "stride_t", "stride_h"}  # multiples of 16 in every model tested


def build(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, warps: int, stages: int) -> Any:
    """Triton's compiled kernel. types: of the arguments that aren't constants; pointers are aligned to 16 bytes."""
    names = kernel.arg_names
    aligned = [i for i, name in enumerate(names) if types.get(name, "").startswith("*") or name in EVEN & types.keys()]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def facts(made: Any) -> list[str]:
    """Registers, bytes of stack (spills), bytes of shared memory, and the matrix instructions that occur."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    registers, stack = found.groups() if found else ("?", "?")
    instructions = sorted(set(re.findall(r"(mma\.sync|wgmma)\.[.\w]*?(m\d+n\d+k\d+)", made.asm["ptx"])))
    return [registers, stack, str(made.metadata.shared), ", ".join(" ".join(i) for i in instructions) or "-"]


def product(capability: int, rows: int, split: bool, group: int, zero: bool) -> list[str]:
    tile = parse((FOLDER / "default.json").read_text()).product[rows]
    types = dict.fromkeys(("rows", "outputs", "inputs", "stride", "blocks", "pieces"), "i32")
    types |= {"x": "*bf16", "codes": "*i32", "scale": "*bf16", "out": "*fp32" if split else "*bf16"}
    constants: dict[str, Any] = {"GROUP": group, "SPAN": group, "ZERO": zero, "SPLIT": split, "PRECISION": "tf32"}
    constants |= {"TILE_N": tile.outputs, "TILE_M": rows}
    if zero:
        types["zero"] = "*u8"
    else:
        constants["zero"] = None
    made = build(linear._product, types, constants, capability, tile.warps, tile.stages)
    spread = "a piece each" if split else "all pieces"
    what = f"product, {rows} rows, groups of {group}{', zero points' if zero else ''}, {spread}"
    return [what, str(tile.warps), *facts(made)]


def attend(capability: int, rows: int, split: bool) -> list[str]:
    own = parse((FOLDER / "default.json").read_text())
    types = dict.fromkeys(("count", "sequences", "blocks", "width", "stride_t", "stride_h", "window"), "i32")
    types |= dict.fromkeys(("query", "keys", "values"), "*bf16") | dict.fromkeys(("tables", "rows", "positions"), "*i32")
    types |= {"result": "*fp32" if split else "*bf16", "tops": "*fp32", "totals": "*fp32", "scale": "fp32", "cap": "fp32"}
    constants: dict[str, Any] = {"sinks": None, "KV": 8, "GROUP": 4, "SIZE": 16, "DIM": 128, "TILE_D": 128}
    constants |= {"TILE_H": 4, "TILE_T": rows // 4}
    constants |= {"CAPPED": False, "SINKS": False, "SPLIT": split, "PRECISION": "tf32"}
    made = build(attention._attend, types, constants, capability, own.attention_warps, own.attention_stages)
    spread = "a piece each" if split else "all pieces"
    return [f"attention, {rows} rows and heads, {spread}", str(own.attention_warps), *facts(made)]


def others(capability: int) -> list[list[str]]:
    """The kernels that multiply no matrices."""
    rows = []
    types = {"logits": "*bf16", "temperatures": "*fp32", "seeds": "*i64", "positions": "*i64", "scores": "*fp32"}
    types |= {"ids": "*i32", "stride": "i32", "first": "i32"}
    made = build(sampling._tiles, types, {"VOCAB": 151936, "TILE": sampling.TILE}, capability, 4, 3)
    rows.append(["best tokens, tiles", "4", *facts(made)])
    types = {"scores": "*fp32", "ids": "*i32", "best_scores": "*fp32", "best_ids": "*i64", "first": "i32", "tiles": "i32"}
    rows.append(["best tokens, merge", "4", *facts(build(sampling._merge, types, {"WIDTH": 256}, capability, 4, 3))])
    types = {"parts": "*fp32", "out": "*bf16", "count": "i32", "pieces": "i32"}
    rows.append(["product, pieces added", "4", *facts(build(linear._add_pieces, types, {"TILE": 1024}, capability, 4, 3))])
    types = dict.fromkeys(("tops", "totals", "outs"), "*fp32") | dict.fromkeys(("positions", "rows"), "*i32")
    types |= {"result": "*bf16"} | dict.fromkeys(("sequences", "pieces", "window"), "i32")
    constants: dict[str, Any] = {"sinks": None, "HEADS": 32, "TILE": 16, "DIM": 128, "TILE_D": 128, "SINKS": False}
    rows.append(["attention, pieces merged", "4", *facts(build(attention._join, types, constants, capability, 4, 3))])
    types = dict.fromkeys(("key", "value", "keys", "values"), "*bf16") | {"slots": "*i64", "spaces": "i32"}
    types |= dict.fromkeys(("key_token", "key_head", "value_token", "value_head"), "i32")
    constants = {"HEADS": 8, "DIM": 128, "SIZE": 16, "TILE_H": 8, "TILE_D": 128}
    rows.append(["cache", "4", *facts(build(cache._write, types, constants, capability, 4, 3))])
    return rows


def main() -> None:
    print(f"triton {triton.__version__}, the default table, bfloat16\n")
    for capability in (80, 90):
        lines = [product(capability, rows, split, 128, False) for rows in (16, 32, 64, 128) for split in (True, False)]
        lines += [product(capability, 16, True, group, True) for group in (32, 64, 128)]
        lines += [attend(capability, rows, split) for rows in (16, 32) for split in (True, False)]
        lines += others(capability)
        print(f"**sm_{capability}**\n")
        print(table(["kernel", "warps", "registers", "spilled bytes", "shared bytes", "matrix instructions"], lines) + "\n")


if __name__ == "__main__":
    main()
