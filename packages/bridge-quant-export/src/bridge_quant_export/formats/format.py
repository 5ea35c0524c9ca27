"""What a quantised format stores, as data: tensors, their shapes, and the cuts that they allow. No torch.

Everything here is about one linear layer with a weight of `rows` x `cols` (output x input features).
A *writer* is a checkpoint format (`modelopt`, `compressed-tensors`). It gives the tensors of a format their
names, dtypes and shapes, and says how each is made from the format's own *parts* (codes and scales).

The shape of a stored tensor is a tuple of `Axis`: each follows a dim of the weight, so many elements of it
to one of its own, or has a fixed length. Shapes, where a packed shard lies in the packed whole, and the
granularity that a cut must respect all follow from that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import TYPE_CHECKING, Literal, NamedTuple

from bridge_core.geometry import Box, Shape
from bridge_quant_export.errors import FormatError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Writer = Literal["modelopt", "compressed-tensors"]
WRITERS: tuple[Writer, ...] = ("modelopt", "compressed-tensors")
Parts = dict[str, "Tensor"]

ROWS, COLS = 0, 1


class Axis(NamedTuple):
    """One axis of a stored tensor.

    Attributes:
        dim: the dim of the weight that it follows (`ROWS`, `COLS`), or None.
        per: elements of that dim to one of this axis; the length itself where `dim` is None.
        partial: the last block of the weight may be cut short.
    """

    dim: int | None
    per: int = 1
    partial: bool = False

    def length(self, shape: Shape) -> int:
        """Elements along this axis for a weight of `shape`."""
        return self.per if self.dim is None else -(-shape[self.dim] // self.per)


def rows(per: int = 1, *, partial: bool = False) -> Axis:
    """An axis with one element to `per` rows of the weight."""
    return Axis(ROWS, per, partial)


def cols(per: int = 1, *, partial: bool = False) -> Axis:
    """An axis with one element to `per` columns of the weight."""
    return Axis(COLS, per, partial)


def fixed(length: int = 1) -> Axis:
    """An axis that does not depend on the weight."""
    return Axis(None, length)


Axes = tuple[Axis, ...]


class Stored(NamedTuple):
    """One tensor of a layer in a checkpoint.

    Attributes:
        suffix: what follows the layer's name and a dot.
        part: the part of the format that it holds.
        dtype: safetensors' name; None for the dtype of the unquantised weight.
        axes: its shape.
        via: how the part is encoded, a key of `encodings.ENCODINGS`.
    """

    suffix: str
    part: str
    dtype: str | None
    axes: Axes
    via: str = "plain"

    def shape(self, weight: Shape) -> Shape:
        """The shape of this tensor for a weight of a given shape."""
        return tuple(axis.length(weight) for axis in self.axes)

    def box(self, weight: Box) -> Box:
        """The region of this tensor that a region of the weight decides, of the whole or of one shard.

        The region must respect the format's granularity (`Format.check_cut`). An axis that does not follow the
        weight is covered whole: every shard holds the same values there.
        """
        spans = []
        for axis in self.axes:
            if axis.dim is None:
                spans.append((0, axis.per))
            else:
                start, extent = weight.start[axis.dim], weight.shape[axis.dim]
                first = start // axis.per
                spans.append((first, -(-(start + extent) // axis.per) - first))
        return Box(tuple(start for start, _ in spans), tuple(extent for _, extent in spans))


class TensorSpec(NamedTuple):
    """Name, dtype and shape of a tensor that a writer will write."""

    suffix: str
    dtype: str
    shape: Shape


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the quantisers of one layer know, after all ranks agreed on it. Ranges are largest absolute values.

    Attributes:
        weight: range of the weight, in the shape that the format's `amax` gives (of the same shard as the weight).
        weight_2: range of the second level (W4A8: of the weights after INT4, for the whole tensor).
        input: range of the layer's input, one number.
        pre_quant_scale: factor for every input feature, applied before the input is quantised; `[cols]`.
    """

    weight: Tensor | None = None
    weight_2: Tensor | None = None
    input: Tensor | None = None
    pre_quant_scale: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Format:
    """One way to store a quantised weight.

    Attributes:
        name: its key in `FORMATS`.
        title: for messages and tables.
        parts: shapes of the parts that `quantize` makes, by name; `codes` among them.
        amax: shape of the weight's range; None if the range of each block is taken from the weight itself.
        needs: which other fields of `Calibration` it takes; all others must be None.
        group_size: elements that share a scale along a row, where that is a parameter of the format.
        stores: the tensors of each writer that knows the format.
        quantize: weight and checked calibration to parts.
        dequantize: parts and a dtype to the values that they stand for.
    """

    name: str
    title: str
    parts: Mapping[str, Axes]
    amax: Axes | None
    needs: frozenset[str] = frozenset()
    group_size: int | None = None
    stores: Mapping[Writer, tuple[Stored, ...]]
    quantize: Callable[[Tensor, Calibration], Parts]
    dequantize: Callable[[Parts, torch.dtype], Tensor]

    def stored(self, writer: Writer) -> tuple[Stored, ...]:
        """The tensors that a writer stores.

        Raises:
            FormatError: the writer has no layout for this format.
        """
        found = self.stores.get(writer)
        if found is None:
            raise FormatError(
                f"{writer} has no tensors for {self.title}",
                expected=", ".join(self.stores) or "no writer at all",
                got=writer,
            )
        return found

    @cached_property
    def _grain(self) -> dict[Writer, tuple[Shape, tuple[bool, bool]]]:
        found: dict[Writer, tuple[Shape, tuple[bool, bool]]] = {}
        for writer, stored in self.stores.items():
            axes = [axis for tensor in stored for axis in tensor.axes] + list(self.amax or ())
            by_dim = [[axis for axis in axes if axis.dim == dim] for dim in (ROWS, COLS)]
            found[writer] = (
                tuple(lcm(1, *(axis.per for axis in along)) for along in by_dim),
                (_whole_blocks(by_dim[ROWS]), _whole_blocks(by_dim[COLS])),
            )
        return found

    def granularity(self, writer: Writer) -> Shape:
        """Rows and columns of which a cut through the weight must keep a multiple on its left."""
        self.stored(writer)
        return self._grain[writer][0]

    def check_shape(self, writer: Writer, weight: Shape, *, where: object = None) -> None:
        """Refuse a weight whose size the format cannot hold.

        Raises:
            FormatError: not a matrix, empty, or a dim does not divide into blocks.
        """
        grain = self.granularity(writer)
        if len(weight) != 2 or 0 in weight:
            raise FormatError("only matrices are quantised", where=where, expected="[rows, cols]", got=list(weight))
        for dim, must in enumerate(self._grain[writer][1]):
            if must and weight[dim] % grain[dim]:
                raise FormatError(
                    f"{self.title} does not divide the weight's {'rows' if dim == ROWS else 'columns'} into blocks",
                    where=where,
                    expected=f"a multiple of {grain[dim]} ({writer})",
                    got=weight[dim],
                    fix="leave the layer unquantised, or choose a format with smaller blocks",
                )

    def check_cut(self, writer: Writer, weight: Shape, shard: Box, *, where: object = None) -> None:
        """Refuse a shard that, packed on its own, would not be a part of the packed whole.

        Args:
            writer: the checkpoint format.
            weight: shape of the whole weight.
            shard: the region of it that a rank holds.
            where: what to name in the message.

        Raises:
            FormatError: the whole does not fit the format, or a side of the shard lies inside a block.
        """
        self.check_shape(writer, weight, where=where)
        for dim, grain in enumerate(self.granularity(writer)):
            start, stop = shard.start[dim], shard.start[dim] + shard.shape[dim]
            if start % grain or (stop % grain and stop != weight[dim]):
                raise FormatError(
                    f"a cut through the {'rows' if dim == ROWS else 'columns'} splits blocks of {self.title}",
                    where=where,
                    expected=f"sides at multiples of {grain} ({writer})",
                    got=f"{start} to {stop} of {weight[dim]}",
                    fix="export from a layout with a smaller tensor-parallel size",
                )

    def tensors(self, writer: Writer, weight: Shape, dtype: str = "BF16") -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of what a writer stores for a weight, before anything is packed.

        Args:
            writer: the checkpoint format.
            weight: shape of the weight, whole or a shard that `check_cut` admits.
            dtype: safetensors' name of the unquantised weight's dtype.

        Raises:
            FormatError: the writer does not know the format, or the weight does not fit it.
        """
        self.check_shape(writer, weight)
        return tuple(
            TensorSpec(tensor.suffix, tensor.dtype or dtype, tensor.shape(weight)) for tensor in self.stored(writer)
        )


def _whole_blocks(along: list[Axis]) -> bool:
    return any(axis.per > 1 and not axis.partial for axis in along)
