"""Four-bit weights times 16-bit rows.

**Layout.** 256 inputs make a block. Word i of an output's 32 words holds the codes of inputs i, 32 + i, ... 224 + i of
its block, four bits each, so that a program takes its words from memory once, 128 bytes an output and outputs side by
side, and finds in each of the eight fields a slice of 32 consecutive inputs. No code ever changes lanes.

**Conversion.** A field stays where it is in its word: under the exponent of 2^23 it is the float 2^23 + code * 16^j, of
which one multiply-add by 16^-j leaves code - zero. Three fields lie too high for that and are first shifted, once
together. So a code costs one logical operation, one multiply-add and half a conversion, and -15..15 is exact in 16 bit.

**Order of additions.** What a row's result is does not depend on the rows beside it, nor on how the work is spread:
within a block, slices are added in order to a group's sum; the sums times their scales are added in order within a piece
of 1024 inputs; pieces are added in order, from zero. Few rows: a program for each piece, and a second kernel adds them.
Many rows: one program goes through all pieces. Nothing is atomic. The weight is the matrix instruction's left side (from
64 outputs on; see `table.Tile`), so rows lie along the side whose length may vary within one instruction: tiles of 16 to
128 rows run the same one. That is also why a prompt's many rows take no other way, such as a library's product of an
expanded weight: it would add in an order of its own, and a row would change when its batch grows.
"""

import logging
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels import reference
from runtime.kernels.arguments import check_linear, check_pack
from runtime.kernels.gpu.dot import dot
from runtime.kernels.gpu.table import Table, table_of
from runtime.kernels.packed import PackedInt4, narrow_scale
from runtime.quantize.int4 import MIDDLE, Int4Weight

log = logging.getLogger(__name__)

FIELDS = 8  # codes in a word
WIDTH = tl.constexpr(32)  # inputs in a slice, words of an output in a block
BLOCK = tl.constexpr(256)
PIECE = tl.constexpr(4)  # blocks


@triton.jit
def _take(word, zero, FIELD: tl.constexpr):
    """Field FIELD of int32 words, less the zero, as float32, exactly."""
    SHIFT: tl.constexpr = 0 if FIELD < 5 else 20
    PLACE: tl.constexpr = 4 * FIELD - SHIFT
    PART: tl.constexpr = 0.0625 ** (PLACE // 4)
    high = ((word >> SHIFT) & (15 << PLACE)) | 0x4B000000
    return tl.fma(high.to(tl.float32, bitcast=True), PART, -(8388608.0 * PART + zero))


@triton.jit
def _product(
    x, codes, scale, zero, out, rows, outputs, inputs, stride, blocks, pieces,
    GROUP: tl.constexpr, SPAN: tl.constexpr, ZERO: tl.constexpr, SPLIT: tl.constexpr, TILE_N: tl.constexpr,
    TILE_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    i = tl.arange(0, WIDTH)
    here, there = n < outputs, m < rows
    first, last = 0, pieces
    if SPLIT:
        first = tl.program_id(2)
        last = first + 1
    total = tl.zeros((TILE_N, TILE_M), tl.float32)
    for piece in range(first, last):
        acc = tl.zeros((TILE_N, TILE_M), tl.float32)
        for block in range(piece * PIECE, tl.minimum((piece + 1) * PIECE, blocks)):
            place = (block * outputs + n).to(tl.int64)[:, None] * WIDTH + i[None, :]
            word = tl.load(codes + place, mask=here[:, None], other=0)
            part = tl.zeros((TILE_N, TILE_M), tl.float32)
            for j in tl.static_range(8):
                k = block * BLOCK + j * WIDTH
                group = tl.minimum(k, inputs - 1) // GROUP  # words of padding have no group: their rows are zero
                at = group * outputs + n
                point = tl.load(zero + at, mask=here, other=0).to(tl.float32)[:, None] if ZERO else 8.0
                weight = _take(word, point, j).to(x.dtype.element_ty)
                inside = there[None, :] & (k + i < inputs)[:, None]
                row = tl.load(x + m[None, :].to(tl.int64) * stride + (k + i)[:, None], mask=inside, other=0.0)
                part = dot(weight, row, part, PRECISION)
                if (j + 1) * WIDTH % SPAN == 0:
                    step = tl.load(scale + at, mask=here, other=0).to(tl.float32)
                    acc = tl.fma(part, step[:, None] + tl.zeros_like(acc), acc)
                    part = tl.zeros((TILE_N, TILE_M), tl.float32)
        total += acc
    if SPLIT:
        m += tl.program_id(2) * rows
        there &= m < (tl.program_id(2) + 1) * rows
    place = m[None, :].to(tl.int64) * outputs + n[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=there[None, :] & here[:, None])


@triton.jit
def _add_pieces(parts, out, count, pieces, TILE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for piece in range(pieces):
        total += tl.load(parts + piece * count + place, mask=place < count, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < count)


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
    )


def int4_linear(x: Tensor, packed: PackedInt4) -> Tensor:
    check_linear(x, packed)
    if packed.codes.dtype != torch.int32:
        return reference.int4_linear(x, packed)
    return multiply(x, packed, table_of(x.device))


def multiply(x: Tensor, packed: PackedInt4, table: Table) -> Tensor:
    """`int4_linear` with a table of one's own; any table gives the same bits."""
    rows, outputs, inputs = len(x), packed.out_features, packed.in_features
    if not rows or not outputs or not inputs:
        return x.new_zeros(rows, outputs)
    if x.stride(1) != 1:
        x = x.contiguous()
    # float32 has no matrix instruction to use and fills twice the room.
    tiles = [16] if x.dtype == torch.float32 else list(table.product)
    high = min((r for r in tiles if r >= rows), default=max(tiles))
    tile = table.product[high]
    blocks = packed.codes.shape[0]
    pieces = triton.cdiv(blocks, PIECE.value)
    grid = triton.cdiv(outputs, tile.outputs), triton.cdiv(rows, high)
    split = pieces > 1 and grid[0] * grid[1] < table.programs
    out = x.new_empty(rows, outputs)
    parts = x.new_empty(pieces, rows, outputs, dtype=torch.float32) if split else out
    _product[(*grid, pieces if split else 1)](
        x, packed.codes, packed.scale, packed.zero, parts, rows, outputs, inputs, x.stride(0), blocks, pieces,
        GROUP=packed.group_size, SPAN=math.gcd(packed.group_size, BLOCK.value), ZERO=packed.zero is not None, SPLIT=split,
        TILE_N=tile.outputs, TILE_M=high, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if split:
        _add_pieces[(triton.cdiv(out.numel(), 1024),)](parts, out, out.numel(), pieces, TILE=1024)
    return out
