"""Four-bit weights times 16-bit rows.

**Layout.** 256 inputs make a block. Word i of an output's 32 words holds the codes of inputs i, 32 + i, ... 224 + i of
its block, four bits each, so that a program takes its words from memory once, 128 bytes an output and outputs side by
side, and finds in each of the eight fields a slice of 32 consecutive inputs. No code ever changes lanes.

**Conversion.** Two codes at once: a field of two neighbouring words, put under the exponent of 128 in bfloat16 (of 1024
in float16), is 128 + code, from which one packed operation takes 128 + zero; -15..15 is exact. A shift, a logical operation
and that one for two codes: two or three instructions a code, as an integer's conversion would take, are more than a card
has time for while it reads four bits. float32 finds its codes under 2^23, one by one.

**Order of additions.** What a row's result is does not depend on the rows beside it, nor on how the work is spread:
within a block, slices are added in order to a group's sum; the sums times their scales are added in order within a piece
of 1024 inputs; pieces are added in order, from zero. Few rows: a program for each piece, and a second kernel adds them.
Many rows: one program goes through all pieces. Nothing is atomic. The weight is the matrix instruction's left side (from
64 outputs on; see `table.Tile`), so rows lie along the side whose length may vary within one instruction: tiles of 16 to
128 rows run the same one. That is also why a prompt's many rows take no other way, such as a library's product of an
expanded weight: it would add in an order of its own, and a row would change when its batch grows. A tile of 128 rows
converts a code for 128 products, which leaves an expanded weight a tenth to gain; before Hopper its sums don't fit into the
registers, and 64 rows are the most.

**Places.** Programs of the same outputs and other rows have numbers side by side, so that they run side by side and the
weight comes from memory once for all of them.

**Gates.** Where a product's outputs are gates and ups, a tile takes half its outputs from either, so that it has both of
a pair and applies the activation to what it would have written; of pieces, the kernel that adds them does.
"""

import logging
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels import reference
from runtime.kernels.arguments import check_linear, check_pack
from runtime.kernels.gpu.dot import INTERPRETED, dot, narrow
from runtime.kernels.gpu.gates import gate
from runtime.kernels.gpu.table import Table, table_of
from runtime.kernels.packed import PackedInt4, narrow_scale
from runtime.quantize.int4 import MIDDLE, Int4Weight

log = logging.getLogger(__name__)

FIELDS = 8  # codes in a word
WIDTH = tl.constexpr(32)  # inputs in a slice, words of an output in a block
BLOCK = tl.constexpr(256)
PIECE = 4  # blocks


def _pairs(kind: str, exponent: str, one: str) -> tl.constexpr:
    """PTX for each place of a field in 16 bits: two codes of `$1` under the exponent, plus the two numbers of `$2`."""
    return tl.constexpr(
        tuple(
            f"{{ .reg .b32 a, b; mov.b32 b, {one}; shr.u32 a, $1, {shift}; lop3.b32 a, a, 0x000f000f, {exponent}, 0xEA; "
            f"fma.rn.{kind}x2 $0, a, b, $2; }}"
            for shift in (0, 4, 8, 12)
        )
    )


PAIRS_BF16 = _pairs("bf16", "0x43004300", "0x3f803f80")
PAIRS_FP16 = _pairs("f16", "0x64006400", "0x3c003c00")


@triton.jit
def put_tile(out, total, n, m, here, there, rows, outputs, SPLIT: tl.constexpr):
    """Writes a tile of sums [N, M] into out [rows, outputs], or into this program's piece of [pieces, rows, outputs]."""
    if SPLIT:
        m += tl.program_id(2) * rows
        there &= m < (tl.program_id(2) + 1) * rows
    at = m[None, :].to(tl.int64) * outputs + n[:, None]
    tl.store(out + at, narrow(total, out.dtype.element_ty), mask=there[None, :] & here[:, None])


@triton.jit
def _take(word, zero, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    """Field FIELD of int32 words [N, 32], less the zero, exactly; zero: float32, [N, 1] or a number."""
    if INTERPRETED or tl.float32 == DTYPE:
        SHIFT: tl.constexpr = 0 if FIELD < 5 else 20
        PLACE: tl.constexpr = 4 * FIELD - SHIFT
        PART: tl.constexpr = 0.0625 ** (PLACE // 4)
        high = ((word >> SHIFT) & (15 << PLACE)) | 0x4B000000
        return tl.fma(high.to(tl.float32, bitcast=True), PART, -(8388608.0 * PART + zero)).to(DTYPE)
    half = (word if FIELD < 4 else word >> 16).to(tl.int16)
    if tl.bfloat16 == DTYPE:
        minus = (tl.zeros(word.shape, tl.float32) - (128.0 + zero)).to(DTYPE)
        return tl.inline_asm_elementwise(PAIRS_BF16[FIELD % 4], "=r,r,r", [half, minus], minus.dtype, True, 2)
    minus = (tl.zeros(word.shape, tl.float32) - (1024.0 + zero)).to(DTYPE)
    return tl.inline_asm_elementwise(PAIRS_FP16[FIELD % 4], "=r,r,r", [half, minus], minus.dtype, True, 2)


@triton.jit
def _product(
    x, codes, scale, zero, out, rows, outputs, inputs, stride, blocks,
    GROUP: tl.constexpr, SPAN: tl.constexpr, ZERO: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr,
    GATE: tl.constexpr, PIECE: tl.constexpr, TILE_N: tl.constexpr, TILE_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x.dtype.element_ty
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    i = tl.arange(0, WIDTH)
    there = m < rows
    source = tl.minimum(m, rows - 1)  # rows that aren't there repeat the last, which costs fewer registers than a mask
    if GATE is not None:  # gates and their ups in turn
        pair = tl.program_id(1) * (TILE_N // 2) + tl.arange(0, TILE_N) // 2
        here = pair < outputs // 2
        n = pair + tl.arange(0, TILE_N) % 2 * (outputs // 2)
    else:
        n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
        here = n < outputs
    first, last = tl.program_id(2) * PIECE, blocks
    if SPLIT:
        last = tl.minimum(first + PIECE, blocks)
    total = tl.zeros((TILE_N, TILE_M), tl.float32)
    acc = tl.zeros((TILE_N, TILE_M), tl.float32)
    for block in range(first, last):
        place = (block * outputs + n).to(tl.int64)[:, None] * WIDTH + i[None, :]
        word = tl.load(codes + place, mask=here[:, None], other=0)
        part = tl.zeros((TILE_N, TILE_M), tl.float32)
        for j in tl.static_range(8):
            k = block * BLOCK + j * WIDTH
            group = k // GROUP
            if not WHOLE:  # words of padding have no group: their rows are zero
                group = tl.minimum(k, inputs - 1) // GROUP
            at = group * outputs + n
            point = tl.load(zero + at, mask=here, other=0).to(tl.float32)[:, None] if ZERO else 8.0
            weight = _take(word, point, j, DTYPE)
            spot = x + source[None, :].to(tl.int64) * stride + (k + i)[:, None]
            row = tl.load(spot) if WHOLE else tl.load(spot, mask=(k + i < inputs)[:, None], other=0.0)
            part = dot(weight, row, part, PRECISION)
            if (j + 1) * WIDTH % SPAN == 0:
                step = tl.load(scale + at, mask=here, other=0).to(tl.float32)
                acc = tl.fma(part, step[:, None] + tl.zeros_like(acc), acc)
                part = tl.zeros((TILE_N, TILE_M), tl.float32)
        # One loop over all pieces keeps loads under way from one to the next.
        if not SPLIT:  # noqa: SIM102  which the compiler knows
            if ((block + 1) % PIECE == 0) | (block + 1 == last):
                total += acc
                acc = tl.zeros((TILE_N, TILE_M), tl.float32)
    if SPLIT:
        total = acc
    if GATE is not None:
        both = narrow(tl.trans(total), out.dtype.element_ty).reshape(TILE_M, TILE_N // 2, 2)
        gates, ups = tl.split(both)
        n = tl.program_id(1) * (TILE_N // 2) + tl.arange(0, TILE_N // 2)
        at = m[:, None].to(tl.int64) * (outputs // 2) + n[None, :]
        tl.store(out + at, gate(gates, ups, GATE), mask=there[:, None] & (n < outputs // 2)[None, :])
    else:
        put_tile(out, total, n, m, here, there, rows, outputs, SPLIT)


@triton.jit
def add_pieces(parts, out, count, width, pieces, GATE: tl.constexpr, TILE: tl.constexpr):
    """parts float32 [pieces, rows, outputs] -> out, `count` elements in rows of `width`: sums, or gates of sums and ups."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = place < count
    DTYPE: tl.constexpr = out.dtype.element_ty
    if GATE is not None:
        spot = place // width * (2 * width) + place % width
        gates, ups = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
        for piece in range(pieces):
            gates += tl.load(parts + piece * 2 * count + spot, mask=inside, other=0.0)
            ups += tl.load(parts + piece * 2 * count + spot + width, mask=inside, other=0.0)
        tl.store(out + place, gate(narrow(gates, DTYPE), narrow(ups, DTYPE), GATE), mask=inside)
    else:
        total = tl.zeros((TILE,), tl.float32)
        for piece in range(pieces):
            total += tl.load(parts + piece * count + place, mask=inside, other=0.0)
        tl.store(out + place, narrow(total, DTYPE), mask=inside)


def pack_int4(weight: Int4Weight, activations: str) -> PackedInt4:
    """With "int8", or groups that aren't a multiple of 32 inputs, the reference's layout: its product is used."""
    check_pack(weight, activations)
    outputs, inputs = weight.codes.shape
    if activations == "int8" or weight.group_size % WIDTH.value:
        log.warning("no fast kernel for %s activations and groups of %d on a GPU", activations, weight.group_size)
        return reference.pack_int4(weight, activations)
    codes = torch.nn.functional.pad(weight.codes, (0, -inputs % BLOCK.value))
    fields = codes.view(outputs, codes.shape[1] // BLOCK.value, FIELDS, WIDTH.value)
    words = torch.zeros(outputs, fields.shape[1], WIDTH.value, dtype=torch.int32, device=codes.device)
    for j in range(FIELDS):
        words |= fields[:, :, j].int() << 4 * j
    symmetric = bool((weight.zero == MIDDLE).all())
    return PackedInt4(
        codes=words.transpose(0, 1).contiguous(),
        scale=narrow_scale(weight.scale.t().contiguous()),
        zero=None if symmetric else weight.zero.t().contiguous(),
        out_features=outputs,
        in_features=inputs,
        group_size=weight.group_size,
        activations=activations,
        axis=1,
    )


def int4_linear(
    x: Tensor, packed: PackedInt4, gate: str | None = None, borders: Sequence[int] = (), dtype: torch.dtype | None = None
) -> Tensor:
    check_linear(x, packed, gate)
    if packed.codes.dtype != torch.int32:
        return reference.int4_linear(x, packed, gate, borders, dtype)
    if borders:
        raise ValueError("this product has pieces of 1024 inputs, and no segments")
    return multiply(x, packed, gate, table_of(x.device), dtype)


def multiply(x: Tensor, packed: PackedInt4, gate: str | None, table: Table, dtype: torch.dtype | None = None) -> Tensor:
    """`int4_linear` with a table of one's own; any table gives the same bits."""
    rows, outputs, inputs = len(x), packed.out_features, packed.in_features
    width = outputs // 2 if gate else outputs
    if not rows or not outputs or not inputs:
        return x.new_zeros(rows, width, dtype=dtype)
    if x.stride(1) != 1:
        x = x.contiguous()
    # float32 has no matrix instruction to use and fills twice the room; zero points take registers.
    most = 16 if x.dtype == torch.float32 else 128 if packed.zero is None else 64
    high, tile = table.tile(table.product, rows, most)
    blocks = packed.codes.shape[0]
    pieces = triton.cdiv(blocks, PIECE)
    grid = triton.cdiv(rows, high), triton.cdiv(outputs, tile.outputs)
    split = pieces > 1 and grid[0] * grid[1] < table.programs
    out = x.new_empty(rows, width, dtype=dtype)
    parts = x.new_empty(pieces, rows, outputs, dtype=torch.float32) if split else out
    _product[(*grid, pieces if split else 1)](
        x, packed.codes, packed.scale, packed.zero, parts, rows, outputs, inputs, x.stride(0), blocks,
        GROUP=packed.group_size, SPAN=math.gcd(packed.group_size, BLOCK.value), ZERO=packed.zero is not None, SPLIT=split,
        WHOLE=inputs % BLOCK.value == 0, GATE=None if split else gate, PIECE=PIECE,
        TILE_N=tile.outputs, TILE_M=high, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if split:
        add_pieces[(triton.cdiv(out.numel(), 1024),)](
            parts, out, out.numel(), width, pieces, GATE=gate, TILE=1024, enable_fp_fusion=False
        )  # fmt: skip
    return out
