"""Compiles the GPU's kernels with no GPU at hand and lists what the compiler says of them, as a Markdown table.

    python -m bench.compiled            # needs triton, whose package brings NVIDIA's assembler

Registers and spills are a thread's, as `cuobjdump -res-usage` reads them; shared memory is a program's. How many programs a
processor of the card holds at once follows from these and the warps. Times need a card. The exit code is 1 if anything spills.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.tables import table
from runtime import filters
from runtime.kernels.gpu import attention, cache, dense, gates, layer, linear, sampling
from runtime.kernels.gpu.table import FOLDER, parse

TABLES = {80: parse((FOLDER / "default.json").read_text()), 90: parse((FOLDER / "sm-90.json").read_text())}
SHARED = {80: 164 << 10, 90: 228 << 10}  # bytes of a processor
EVEN = {"outputs", "inputs", "width", "stride", "stride_t", "stride_h", "more", "turn"}  # multiples of 16 in every model tested


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
    """Registers, bytes of stack (spills), bytes of shared memory, programs that a processor of the card holds at once, and the
    matrix instructions that occur."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    registers, stack = found.groups() if found else ("?", "?")
    instructions = sorted(set(re.findall(r"(mma\.sync|wgmma)\.[.\w]*?(m\d+n\d+k\d+)", made.asm["ptx"])))
    shared, warps = made.metadata.shared, made.metadata.num_warps
    room = [64 // warps, SHARED[made.metadata.target.arch] // (shared + 1024)]  # a program's own kilobyte among it
    if found:
        room.append(65536 // (-(-int(registers) // 8) * 8 * 32 * warps))
    return [registers, stack, str(shared), str(min(room)), ", ".join(" ".join(i) for i in instructions) or "-"]


def product(
    capability: int, rows: int, split: bool, group: int = 128, zero: bool = False, gate: str | None = None
) -> list[str]:  # fmt: skip
    """The int4 product at a layer's shape."""
    tile = TABLES[capability].product[rows]
    types = dict.fromkeys(("rows", "outputs", "inputs", "stride", "blocks"), "i32")
    types |= {"x": "*bf16", "codes": "*i32", "scale": "*bf16", "out": "*fp32" if split else "*bf16"}
    constants: dict[str, Any] = {"GROUP": group, "SPAN": group, "ZERO": zero, "SPLIT": split, "PRECISION": "tf32"}
    constants |= {"TILE_N": tile.outputs, "TILE_M": rows, "WHOLE": True, "GATE": gate, "PIECE": linear.PIECE}
    _or_none(types, constants, zero="*u8" if zero else None)
    made = build(linear._product, types, constants, capability, tile.warps, tile.stages)
    what = f"int4, {rows} rows, groups of {group}{', zero points' if zero else ''}{', gates' if gate else ''}"
    return [f"{what}, {_spread(split)}", str(tile.warps), *facts(made)]


def wide(capability: int, rows: int, split: bool, eight: bool, head: bool) -> list[str]:
    """Products of sixteen and eight bits, or the head's with its choice."""
    tile = TABLES[capability].dense[rows]
    types = dict.fromkeys(("rows", "outputs", "inputs", "stride"), "i32") | {"x": "*i8" if eight else "*bf16"}
    types |= {"weight": types["x"]}
    constants: dict[str, Any] = {"WHOLE": True, "PIECE": dense.PIECE, "TILE_N": tile.outputs, "TILE_M": rows}
    constants |= {"PRECISION": "tf32"}
    _or_none(types, constants, **dict.fromkeys(("x_scale", "scale"), "*fp32" if eight else None))
    if head:
        types |= {"temperatures": "*fp32", "seeds": "*i64", "positions": "*i64", "scores": "*fp32", "ids": "*i32"}
        types |= {"first": "i32", "tiles": "i32"}
        constants["DTYPE"] = tl.bfloat16
    else:
        types["out"] = "*fp32" if split else "*bf16"
        constants["SPLIT"] = split
    made = build(dense._head if head else dense._dense, types, constants, capability, tile.warps, tile.stages)
    what = f"{'int8' if eight else '16 bit'}, {rows} rows, " + ("with the choice of tokens" if head else _spread(split))
    return [what, str(tile.warps), *facts(made)]


def attend(capability: int, rows: int, split: bool, form: str = "same") -> list[str]:
    """Attention of an 8B model: four query heads share one of keys."""
    types = dict.fromkeys(("count", "height", "sequences", "blocks", "width", "stride_t", "stride_h", "window"), "i32")
    types |= dict.fromkeys(("keys", "values"), "*bf16" if form == "same" else "*i8")
    types |= dict.fromkeys(("key_scales", "value_scales"), "*bf16" if form == "same" else "*fp32") | {"query": "*bf16"}
    types |= dict.fromkeys(("tables", "rows", "positions"), "*i32")
    types |= {"result": "*fp32" if split else "*bf16", "tops": "*fp32", "totals": "*fp32", "scale": "fp32", "cap": "fp32"}
    constants: dict[str, Any] = {"sinks": None, "KV": 8, "GROUP": 4, "SIZE": 16, "DIM": 128, "TILE_D": 128}
    constants |= {"TILE_H": 4, "TILE_T": rows // 4, "FORM": form}
    constants |= {"CAPPED": False, "SINKS": False, "SPLIT": split, "PRECISION": "tf32"}
    launch = TABLES[capability].attention[rows if form == "same" else 32]
    made = build(attention._attend, types, constants, capability, launch.warps, launch.stages)
    held = "" if form == "same" else f", {form} cache"
    return [f"attention, {rows} rows and heads{held}, {_spread(split)}", str(launch.warps), *facts(made)]


def others(capability: int) -> list[list[str]]:
    """The kernels that multiply no matrices."""
    rows = []

    def add(what: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int = 4) -> None:
        rows.append([what, str(warps), *facts(build(kernel, types, constants, capability, warps, 3))])

    types = {"logits": "*bf16", "temperatures": "*fp32", "seeds": "*i64", "positions": "*i64", "scores": "*fp32"}
    types |= {"ids": "*i32", "stride": "i32", "first": "i32"}
    sizes = {"VOCAB": 151936, "TILE": sampling.TILE}
    add("best tokens, tiles", sampling._tiles, types, {"cuts": None, **sizes})
    add("best tokens, tiles, of those above a cut", sampling._tiles, types | {"cuts": "*i64"}, sizes)
    types = {"logits": "*bf16", "temperatures": "*fp32", "stride": "i32"}
    add("candidates, tiles", sampling._lists, types | {"keys": "*i64", "first": "i32"}, {"KEPT": filters.WIDTH, **sizes})
    add("masses, tiles", sampling._sums, types | {"tops": "*fp32", "sums": "*fp64"}, sizes)
    types = {"scores": "*fp32", "ids": "*i32", "best_scores": "*fp32", "best_ids": "*i64", "first": "i32", "tiles": "i32"}
    add("best tokens, merge", sampling._merge, types, {"WIDTH": 256})
    types = {"parts": "*fp32", "out": "*bf16", "count": "i32", "width": "i32", "pieces": "i32"}
    for gate in (None, "silu"):
        what = f"product, pieces added{', gates' if gate else ''}"
        add(what, linear.add_pieces, types, {"GATE": gate, "TILE": 1024})
    types = dict.fromkeys(("tops", "totals", "outs"), "*fp32") | dict.fromkeys(("positions", "rows"), "*i32")
    types |= {"result": "*bf16"} | dict.fromkeys(("sequences", "pieces", "window"), "i32")
    constants: dict[str, Any] = {"sinks": None, "HEADS": 32, "TILE": 16, "DIM": 128, "TILE_D": 128, "SINKS": False}
    add("attention, pieces merged", attention._join, types, constants)
    add("gates", gates._gated, {"both": "*bf16", "out": "*bf16", "stride": "i32", "width": "i32"},
        {"ACTIVATION": "silu", "TILE": gates.TILE})  # fmt: skip
    types = dict.fromkeys(("x", "residual", "normed", "total"), "*bf16")
    types |= {"weight": "*fp32", "eps": "fp32", "stride": "i32", "more": "i32"}
    add("residual and norm", layer._norm, types, {"WIDTH": 4096, "EARLY": True, "TILE": 4096}, 8)
    types = {"x": "*bf16", "codes": "*i8", "scales": "*fp32", "stride": "i32", "inputs": "i32"}
    add("rows to int8", dense._round, types, {"TILE": 4096})
    for form in ("same", "int8", "fp8"):
        caches = dict.fromkeys(("keys", "values"), "*bf16" if form == "same" else "*i8")
        caches |= dict.fromkeys(("key_scales", "value_scales"), "*bf16" if form == "same" else "*fp32")
        held = "" if form == "same" else f", {form} cache"
        types = caches | dict.fromkeys(("qkv", "cos", "sin", "query"), "*bf16") | {"slots": "*i64", "eps": "fp32"}
        types |= dict.fromkeys(("query_norm", "key_norm"), "*fp32") | dict.fromkeys(("spaces", "stride", "turn"), "i32")
        constants = {"HEADS": 32, "KV": 8, "SIZE": 16, "DIM": 128, "TURNED": 128, "EARLY": True, "FORM": form, "TILE": 128}
        add(f"head norms, rotary, cache{held}", layer._rotate, types, constants, 1)
        types = caches | {"key": "*bf16", "value": "*bf16", "slots": "*i64", "spaces": "i32"}
        types |= dict.fromkeys(("key_token", "key_head", "value_token", "value_head"), "i32")
        constants = {"HEADS": 8, "DIM": 128, "SIZE": 16, "FORM": form, "TILE_H": 8, "TILE_D": 128}
        add(f"cache{held}", cache._write, types, constants)
    return rows


def _or_none(types: dict[str, str], constants: dict[str, Any], **given: str | None) -> None:
    """Pointers that may not be there."""
    for name, kind in given.items():
        if kind is None:
            constants[name] = None
        else:
            types[name] = kind


def _spread(split: bool) -> str:
    return "a piece each" if split else "all pieces"


def main() -> int:
    print(f"triton {triton.__version__}, bfloat16, each card with its generation's table or else the default\n")
    spilled = []
    for capability, tiles in TABLES.items():
        lines = [product(capability, rows, split) for rows in tiles.product for split in (True, False)]
        lines += [product(capability, 16, True, group, True) for group in (32, 64, 128)]
        lines += [product(capability, 64, False, group, True) for group in (32, 64, 128)]
        lines += [product(capability, rows, False, gate="silu") for rows in tiles.product]
        lines += [wide(capability, rows, split, False, False) for rows in (16, 64, 128) for split in (True, False)]
        lines += [wide(capability, 16, False, True, False)]
        lines += [wide(capability, rows, False, eight, True) for rows in (16, 32, 64) for eight in (False, True)]
        lines += [attend(capability, rows, split) for rows in (16, 32) for split in (True, False)]
        lines += [attend(capability, rows, True, form) for rows in (16, 32) for form in ("int8", "fp8")]
        lines += others(capability)
        print(f"**sm_{capability}**\n")
        header = ["kernel", "warps", "registers", "spilled bytes", "shared bytes", "at once", "matrix instructions"]
        print(table(header, lines) + "\n")
        spilled += [line[0] for line in lines if line[3] != "0"]
    print("nothing spills" if not spilled else f"spills: {'; '.join(spilled)}")
    return int(bool(spilled))


if __name__ == "__main__":
    raise SystemExit(main())
