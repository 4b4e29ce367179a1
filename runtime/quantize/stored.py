"""Weights of four and eight bits out of files: each layout's bits, and this rank's slices of them.

A word is 32 bits and holds eight codes of four bits or four of eight, the first in its lowest bits. P is their number.

- `pack-quantized` (compressed-tensors): weight_packed [N, K / P], codes along the inputs, a code being the signed value
  plus 8 or 128; weight_scale [N, G]; weight_zero_point [N / P, G], packed along the outputs.
- `int-quantized` (compressed-tensors): weight int8 [N, K] and weight_zero_point int8 [N, G], signed values as they are.
- `gptq` (AutoGPTQ, GPTQModel): qweight [K / P, N], packed along the inputs; scales [G, N]; qzeros [G, N / P], packed
  along the outputs. The first version took 1 from every zero point as it lies in a word, `gptq_v2` doesn't.
- `awq` (AutoAWQ, version GEMM): qweight [K, N / 8] and qzeros [G, N / 8], packed along the outputs, which lie in a word
  in the order 0 2 4 6 1 3 5 7; scales [G, N].

A weight whose groups follow the activations' order (g_idx: the group of each input) is brought into groups that lie
together by sorting this rank's own inputs; `sort` says how.

A code of eight bits is two of four: (c - z) s = (c / 16 - z / 16) 16 s + (c % 16 - z % 16) s, each half with a zero point
and a scale of its own. So such a weight is held as one of four bits with twice the inputs, each of which comes in twice;
the bytes are the same, and every kernel that knows four bits knows it. With scales of 16 bit nothing is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.checkpoint import Checkpoint, ModelError
from runtime.quantize.int4 import Int4Weight
from runtime.quantize.schemes import COMPRESSED, WORD, Scheme
from runtime.shard import Span

AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word the outputs 0..7 lie
SUBGROUPS = (128, 64, 32, 16, 8)
ONES = {4: 0x11111111, 8: 0x01010101}  # a word whose codes are all 1


@dataclass(frozen=True)
class Order:
    """Inputs sorted by their group, each group cut into subgroups of `size` and filled up by repeating an input.

    places: int64 [k'], which input stands there; kept: bool [k'], False where it only fills; groups: int64 [k' / size], the
    group of each subgroup.
    """

    places: Tensor
    kept: Tensor
    groups: Tensor
    size: int


def read_int4(
    checkpoint: Checkpoint, path: str, scheme: Scheme, rows: Span, columns: Span, sorted_: Order | None
) -> tuple[Int4Weight, Tensor | None]:
    """These outputs and inputs of a linear: the weight [n, k'] and the order its inputs come in, None for their own.

    The order is int64 [k'], positions within `columns`: input i of the weight is theirs at order[i]. `columns` starts
    and ends with a group. sorted_: what `order_of` says of these columns. Raises ModelError.
    """
    size, inputs = scheme.group_size, columns.width
    if scheme.channel:
        groups = Span(0, 1)
    elif sorted_ is None:
        groups = Span(columns.start // size, -(-columns.stop // size))
    else:
        groups = Span(0, checkpoint.shapes[scheme.order(path)][0] // size)
    read = _of_compressed_tensors if scheme.layout in COMPRESSED else _of_gptq_and_awq
    codes, scale, zero = read(checkpoint, path, scheme, rows, columns, groups)
    scale = scale.float()
    if not bool(torch.isfinite(scale).all()):
        raise ModelError(f"{path} in {checkpoint.directory} has scales that aren't finite; download the model again")
    if scheme.channel:
        scale, zero = (x.expand(-1, inputs // size) for x in (scale, zero))
    order = None
    if scheme.bits == 8:
        order = torch.arange(inputs).repeat(2)
        codes, zero = (torch.cat([x >> 4, x & 15], dim=1) for x in (codes, zero))
        scale = torch.cat([scale * 16, scale], dim=1)
    if sorted_ is not None:
        return arrange(codes, scale, zero, sorted_), sorted_.places if order is None else order[sorted_.places]
    return Int4Weight(codes.contiguous(), scale.contiguous(), zero.contiguous(), size), order


def order_of(checkpoint: Checkpoint, path: str, scheme: Scheme, columns: Span) -> Order | None:
    """The order in which these inputs of a linear are held; None where groups lie together in the inputs' own order. Eight
    bits are two inputs of four, all the upper ones before all the lower. Raises ModelError."""
    name = scheme.order(path)
    shape = checkpoint.shapes.get(name, (0,))
    if scheme.channel or shape == (0,):
        return None
    if len(shape) != 1 or shape[0] < columns.stop:
        raise ModelError(f"{name} in {checkpoint.directory} is {list(shape)}: too short; download the model again")
    found = checkpoint.read(name).long()
    if torch.equal(found, torch.arange(len(found)) // scheme.group_size):
        return None
    groups = len(found) // scheme.group_size
    if int(found.min()) < 0 or int(found.max()) >= groups:
        raise ModelError(f"{name} in {checkpoint.directory} names groups that aren't there; download the model again")
    group_of = found[columns.start : columns.stop]
    return sort(group_of if scheme.bits == 4 else torch.cat([group_of, group_of + groups]), scheme.group_size)


def _of_compressed_tensors(
    checkpoint: Checkpoint, path: str, scheme: Scheme, rows: Span, columns: Span, groups: Span
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [n, k], scales as stored [n, g], zero points uint8 [n, g]."""
    bits, middle = scheme.bits, 1 << scheme.bits - 1
    scale = checkpoint.read(f"{path}.weight_scale", rows, groups)
    zero = torch.full(scale.shape, middle, dtype=torch.uint8)
    if scheme.layout == "int-quantized":
        codes = (checkpoint.read(f"{path}.weight", rows, columns).short() + middle).to(torch.uint8)
        if not scheme.symmetric:
            zero = (checkpoint.read(f"{path}.weight_zero_point", rows, groups).short() + middle).to(torch.uint8)
        return codes, scale, zero
    codes = _unpack(checkpoint.read(f"{path}.weight_packed", rows, _words(columns, bits)), columns, bits)
    if not scheme.symmetric:
        words = checkpoint.read(f"{path}.weight_zero_point", _words(rows, bits), groups)
        zero = _unpack(words.t(), rows, bits).t()
    return codes, scale, zero


def _of_gptq_and_awq(
    checkpoint: Checkpoint, path: str, scheme: Scheme, rows: Span, columns: Span, groups: Span
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [n, k], scales as stored [n, g], zero points uint8 [n, g]."""
    bits = scheme.bits
    places = AWQ_PLACES if scheme.layout == "awq" else None
    if scheme.layout == "awq":
        codes = _unpack(checkpoint.read(f"{path}.qweight", columns, _words(rows, bits)), rows, bits, places).t()
    else:
        codes = _unpack(checkpoint.read(f"{path}.qweight", _words(columns, bits), rows).t(), columns, bits)
    scale = checkpoint.read(f"{path}.scales", groups, rows).t()
    words = checkpoint.read(f"{path}.qzeros", groups, _words(rows, bits))
    if scheme.layout == "gptq":
        # One addition to the whole word undoes the one subtraction, borrows between zero points included.
        words = ((words.long() + ONES[bits] + 2**31) % 2**32 - 2**31).int()
    return codes, scale, _unpack(words, rows, bits, places).t()


def sort(group_of: Tensor, size: int) -> Order:
    """Sorts inputs by their group, int64 [k], of at most `size` each.

    With all K inputs every group is whole. A rank with some of the inputs has a part of each group only, so that groups
    are cut into the subgroups that cost the fewest bytes, filled up by repeating an input under a code that means zero:
    the sum is the same, the input's largest magnitude too, and no rank needs another's inputs.
    """
    counts = torch.bincount(group_of)

    def bytes_of(sub: int) -> float:
        return float((-(-counts // sub)).sum()) * (sub / 2 + 2)

    sub = min(dict.fromkeys((size, *SUBGROUPS)), key=bytes_of)
    order, keeps, groups = [torch.arange(0)], [torch.arange(0) < 0], [torch.arange(0)]
    for group in torch.nonzero(counts).flatten().tolist():
        found = torch.nonzero(group_of == group).flatten()
        more = -len(found) % sub
        order.append(torch.cat([found, found[-1:].expand(more)]))
        keeps.append(torch.arange(len(found) + more) < len(found))
        groups.append(torch.full((-(-len(found) // sub),), group))
    return Order(torch.cat(order), torch.cat(keeps), torch.cat(groups), sub)


def arrange(codes: Tensor, scale: Tensor, zero: Tensor, order: Order) -> Int4Weight:
    """codes [N, k], scale and zero [N, G], in the inputs' own order -> the weight in that one."""
    scale, zero = scale[:, order.groups].contiguous(), zero[:, order.groups].contiguous()
    arranged = codes[:, order.places].where(order.kept, zero.repeat_interleave(order.size, dim=1))
    return Int4Weight(arranged, scale, zero, order.size)


def expand(weight: Int4Weight, order: Tensor | None, inputs: int) -> Tensor:
    """float32 [N, inputs] in the inputs' own order, of what `read_int4` returns."""
    values = weight.dequantize()
    # An input that stands twice is zero all but once, or brings the two halves of its codes.
    return values if order is None else values.new_zeros(len(values), inputs).index_add_(1, order, values)


def _words(span: Span, bits: int) -> Span:
    """The words that hold these codes."""
    return Span(span.start * bits // WORD, -(-span.stop * bits // WORD))


def _unpack(words: Tensor, span: Span, bits: int, places: list[int] | None = None) -> Tensor:
    """Words [A, B] int32 -> the codes of `span`, uint8 [A, span]; places: where in a word of eight the codes 0..7 lie."""
    codes = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # a single column may be contiguous as it is
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).view(len(words), -1)
    if places is not None:
        codes = codes.view(len(words), -1, 8)[..., places].reshape(len(words), -1)
    first = span.start % (WORD // bits)
    return codes[:, first : first + span.width]
