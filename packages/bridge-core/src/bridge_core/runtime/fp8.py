"""Live weights to fp8 blocks: codes by whoever owns them, scales agreed by all.

The formula is that of `checkpoint.fp8`, in torch and on the device of the weights. A block may lie on several ranks:
each finds the largest value of its part, and the largest of those makes the scale. So no weight travels for it, and
the result is the same in every layout.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from bridge_core.checkpoint.fp8 import not_finite
from bridge_core.checkpoint.workers import jointly
from bridge_core.codecs import Fp8Blocks
from bridge_core.errors import GeometryError
from bridge_core.geometry import Piece, Shape, View, dim_steps, in_source_order, row_major
from bridge_core.runtime.agreement import combine
from bridge_core.runtime.live import LiveModel
from bridge_core.runtime.tensors import flat, torch_dtype, window
from bridge_core.runtime.workers import TorchWorkers

if TYPE_CHECKING:
    from torch import Tensor

_BUCKET = 16 * 1024 * 1024
"""Scales that one collective agrees on."""


def quantise(weight: Tensor, codec: Fp8Blocks, *, where: str) -> tuple[Tensor, Tensor]:
    """A whole matrix [R, C] as codes (float8_e4m3fn) and scales (float32, one per block).

    Raises:
        CheckpointError: a value is not finite.
    """
    shape = tuple(weight.shape)
    view = View(where, 0, row_major(shape))
    piece = Piece(shape, view, view)
    largest = _largest(flat(weight), piece, shape, codec)
    scales = _scales(largest, codec, where)
    codes, _ = quantised(flat(weight), piece, shape, scales, codec)
    return codes.view(shape), scales


def agreed_scales(live: LiveModel, dtypes: dict[str, str], group: Any) -> dict[str, Tensor]:
    """The scales of every weight of which this rank holds a part and that is to be quantised. Collective over `group`.

    Args:
        live: the model; its plan has a codec.
        dtypes: HF name to the dtype that the weight is cast to before it is quantised.
        group: all ranks of the model.

    Raises:
        CheckpointError: on every rank, if a value is not finite.
    """
    import torch

    codec = live.plan.codec
    assert isinstance(codec, Fp8Blocks)
    names = [name for name in live.plan.hf_tensors if name in live.plan.quantised]
    buckets = _buckets({name: prod(codec.scale_shape(live.plan.hf_tensors[name])) for name in names})

    def fill() -> list[Tensor]:
        held = _largest_held(live, dtypes, codec)
        filled = [torch.zeros(sum(bucket.values()), device=live.device) for bucket in buckets]
        for bucket, data in zip(buckets, filled, strict=True):
            for name, part in zip(bucket, data.split(list(bucket.values())), strict=True):
                if name in held:
                    part.copy_(held[name].view(-1))
        return filled

    agreed: dict[str, Tensor] = {}
    for bucket, data in zip(buckets, jointly(TorchWorkers(group), fill), strict=True):
        combine(data, group, lambda parts: parts.amax(0))
        for name, part in zip(bucket, data.split(list(bucket.values())), strict=True):
            shape = codec.scale_shape(live.plan.hf_tensors[name])
            agreed[name] = _scales(part.view(shape), codec, name)
    return agreed


def _largest_held(live: LiveModel, dtypes: dict[str, str], codec: Fp8Blocks) -> dict[str, Tensor]:
    """The largest absolute values that this rank holds of every block of a weight, by HF name."""
    import torch

    held: dict[str, Tensor] = {}
    for shard in live.shards:
        for piece in shard.pieces:
            name = piece.source.tensor
            if name not in live.plan.quantised:
                continue
            memory, shift = flat(live.tensor(shard)), live.plan.entry(shard.entry).shift
            values = (memory.float() - shift if shift else memory).to(torch_dtype(dtypes[name]))
            found = _largest(values, piece.inverse(), live.plan.hf_tensors[name], codec)
            held[name] = torch.maximum(held[name], found) if name in held else found
    return held


def _buckets(sizes: dict[str, int]) -> list[dict[str, int]]:
    buckets: list[dict[str, int]] = []
    held = _BUCKET
    for name, size in sizes.items():
        if held + size > _BUCKET:
            buckets.append({})
            held = 0
        buckets[-1][name] = size
        held += size
    return buckets


def _scales(largest: Tensor, codec: Fp8Blocks, where: str) -> Tensor:
    """From the largest absolute value of each block; 1 for a block of zeros."""
    if not largest.isfinite().all():
        raise not_finite(where)
    # By a tensor: a GPU multiplies by the rounded inverse of a number, which is not what a CPU computes.
    scales = largest / largest.new_full((), codec.largest)
    return scales.masked_fill_(scales == 0, 1)


def _matrix(memory: Tensor, piece: Piece, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Piece]:
    """What a piece takes from memory as a matrix [r, c], and the rows and columns of the HF weight that these are.

    The last result is the copy from that matrix, flat, to the HF weight.
    """
    import torch

    back = in_source_order(piece.inverse()).inverse()  # axes in the order of the HF weight: rows, then columns
    values = window(memory, back.shape, back.source)
    device, width = memory.device, shape[1]
    first, left = divmod(back.target.offset, width)
    if any(dim > 1 for dim, _ in dim_steps(back.target, back.shape, shape)):
        raise GeometryError("only matrices are quantised", where=back.target.tensor, got=shape)
    rows, cols = torch.full((1,), first, device=device), torch.full((1,), left, device=device)
    for extent, stride in zip(back.shape, back.target.strides, strict=True):
        steps = torch.arange(extent, device=device)
        if stride % width == 0:
            rows = (rows[:, None] + steps * (stride // width)).view(-1)
        else:
            cols = (cols[:, None] + steps * stride).view(-1)
    compact = Piece(back.shape, View("", 0, row_major(back.shape)), back.target)
    return values.reshape(len(rows), len(cols)), rows, cols, compact


def _largest(memory: Tensor, piece: Piece, shape: Shape, codec: Fp8Blocks) -> Tensor:
    """The largest absolute value that a piece has in each block of its HF weight; zero where it has none.

    NaN is given as infinity, which survives a maximum over ranks.
    """
    import torch

    values, rows, cols, _ = _matrix(memory, piece, shape)
    values = values.abs().nan_to_num(torch.inf, torch.inf)
    down, across = codec.scale_shape(shape)
    by_row = torch.zeros(len(rows), across, dtype=values.dtype, device=values.device)
    by_row.scatter_reduce_(1, (cols // codec.cols).expand(len(rows), -1), values, "amax")
    found = torch.zeros(down, across, device=values.device)
    return found.scatter_reduce_(0, (rows // codec.rows)[:, None].expand(-1, across), by_row.float(), "amax")


def quantised(memory: Tensor, piece: Piece, shape: Shape, scales: Tensor, codec: Fp8Blocks) -> tuple[Tensor, Piece]:
    """The codes of what a piece takes from memory, flat, and the copy of them to the HF weight.

    Args:
        memory: a flat tensor, in the dtype that the weight is cast to before it is quantised.
        piece: from memory to the HF weight.
        shape: of the HF weight.
        scales: of the whole HF weight.
        codec: the format.
    """
    import torch

    values, rows, cols, back = _matrix(memory, piece, shape)
    codes = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    for start in range(0, len(rows), codec.rows):  # float32 values and their scales take eight times as much as codes
        part = slice(start, start + codec.rows)
        scale = scales[(rows[part] // codec.rows)[:, None], cols // codec.cols]
        codes[part] = (values[part].float() / scale).to(codes.dtype)
    return codes.view(-1), back
