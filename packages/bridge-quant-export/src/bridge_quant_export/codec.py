"""The way back: packed checkpoints as bridge-core reads them, dequantised region by region.

Found by bridge-core through its entry point `bridge_core.codecs`. Checkpoints of other tools are read, too: scales may
be in half precision, and of one element or of none. What only concerns inputs is not needed and left out; what would
change the weights and is not known (zero points, an order of groups) is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bridge_core.codecs import OPTION, Found, Header
from bridge_core.dtypes import dtype_of, numpy_dtype
from bridge_core.errors import CheckpointError, preview
from bridge_core.geometry import Box, Shape
from bridge_quant_export.configs.modelopt import HF_QUANT_CONFIG
from bridge_quant_export.configs.reading import completed, read_claims
from bridge_quant_export.errors import FormatError
from bridge_quant_export.formats.format import COLS, ROWS, Format, Stored
from bridge_quant_export.formats.names import WHOLE_SHAPE

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_MARKS = ("weight_packed", "weight_scale")
_PLAIN = frozenset({"weight", "bias"})
_OF_INPUTS = "range of a layer's inputs; its weight is read unquantised"
_BESIDE = {
    "input_scale": _OF_INPUTS,
    "input_global_scale": _OF_INPUTS,
    "weight_shape": "the shape of a packed weight, which its codes have, too",
    **dict.fromkeys(("k_scale", "v_scale"), "range of the KV cache"),
}
_FLOATS = ("F32", "BF16", "F16")
_PLAIN_DTYPES = frozenset({*_FLOATS, "F64"})


class _Codecs:
    """The codecs of ModelOpt's and compressed-tensors' formats: a `bridge_core.codecs.Codecs`; see there."""

    files = frozenset({HF_QUANT_CONFIG})

    def __call__(self, config: Mapping[str, Any], *, where: object = "config.json") -> PackedWeights:
        """The codec of a checkpoint.

        Args:
            config: content of config.json, with a `quantization_config`.
            where: what an error names as its place.

        Raises:
            FormatError: an algorithm or a scheme that no format here stores.
        """
        return PackedWeights(config, where=where)

    def completed(
        self, said: Mapping[str, Any] | None, beside: Mapping[str, Any], *, where: object
    ) -> dict[str, Any] | None:
        """`quantization_config`, with hf_quant_config.json beside; see `configs.reading.completed`."""
        return completed(said, beside, where=where)


codec_of = _Codecs()


class PackedWeights:
    """A `bridge_core.codecs.Codec` of one checkpoint; see there. Weights are read in the model's dtype.

    A weight's values are computed in fp32 and rounded once.
    """

    files = _Codecs.files
    names_weights = True

    def __init__(self, config: Mapping[str, Any], *, where: object) -> None:
        try:
            self._claims = read_claims(config[OPTION], weights_only=True)
        except FormatError as error:
            raise FormatError(
                error.what, where=f"{where}: {error.where or OPTION}", expected=error.expected, got=error.got
            ) from None
        self.presented = dtype_of(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")).name
        self._stored: Mapping[str, Header] = {}

    def __str__(self) -> str:
        titles = dict.fromkeys(format.title for format in self._claims.formats.values())
        return f"{self._claims.writer}: {', '.join(titles)}"

    def chosen(self, weights: Mapping[str, Shape]) -> frozenset[str]:
        """Matrices of linear layers that config.json targets and does not exclude."""
        return frozenset(
            name
            for name, shape in weights.items()
            if len(shape) == 2
            and name.endswith(".weight")
            and self._claims.format_of(name.removesuffix(".weight")) is not None
        )

    def find(self, stored: Mapping[str, Header], *, where: object) -> Found:
        """Every layer that has scales; which format it has, config.json says.

        Raises:
            CheckpointError: codes without scales, scales of an unquantised layer, or parts that do not fit one another.
        """
        modules: dict[str, set[str]] = {}
        for name in stored:
            module, _, suffix = name.rpartition(".")
            modules.setdefault(module, set()).add(suffix)
        self._stored = stored
        weights: dict[str, Shape] = {}
        beside: dict[str, str] = {}
        for module, suffixes in modules.items():
            plain = stored.get(f"{module}.weight")
            if suffixes.isdisjoint(_MARKS) and plain is not None and plain.dtype not in _PLAIN_DTYPES:
                raise CheckpointError(
                    "a quantised weight has no scales",
                    where=f"{module}.weight",
                    expected=f"{' or '.join(_MARKS)} beside it",
                    got=f"{plain.dtype}, and {preview(sorted(suffixes - {'weight'})) or 'nothing else'}",
                    fix="download the checkpoint again, completely",
                )
            if not suffixes.isdisjoint(_MARKS):
                weights[f"{module}.weight"] = self._shape_of(module, suffixes)
            beside |= {f"{module}.{suffix}": _BESIDE[suffix] for suffix in _BESIDE if suffix in suffixes}
        if not weights:
            raise CheckpointError(
                "config.json says that weights are quantised, and none is",
                where=where,
                expected=f"tensors named {' or '.join(_MARKS)}",
                got="none",
                fix=f"remove {OPTION} from config.json, if the weights were dequantised",
            )
        return Found(weights, beside)

    def _shape_of(self, module: str, suffixes: set[str]) -> Shape:
        """The shape of a weight; everything that stores it is checked."""
        format = self._claims.format_of(module)
        if format is None:
            raise CheckpointError(
                "a layer has scales, and config.json does not say how it is quantised",
                where=module,
                expected=f"the layer among the targets of {OPTION}",
                got=preview(sorted(suffixes)),
                fix="check that config.json belongs to these weights",
            )
        needed = _needed(format, self._claims.writer)
        if unknown := suffixes - _PLAIN - _BESIDE.keys() - {tensor.suffix for tensor in needed}:
            raise CheckpointError(
                f"a tensor is not of {format.title}, and may change what the weights mean",
                where=f"{module}.{min(unknown)}",
                expected=", ".join(tensor.suffix for tensor in needed),
                got=", ".join(sorted(unknown)),
                fix="dequantise the checkpoint first, with the tool that made it",
            )
        codes = self._part(module, needed[0], format)
        if len(codes.shape) != len(needed[0].axes):
            raise _misfit(module, needed[0], format, codes, "a matrix")
        shape = tuple(axis.per * size for axis, size in zip(needed[0].axes, codes.shape, strict=True))
        format.check_shape(self._claims.writer, shape, where=module)
        for tensor in needed:
            part, wanted = self._part(module, tensor, format), tensor.shape(shape)
            dtypes = _FLOATS if tensor.dtype in (None, "F32") else (tensor.dtype,)
            if part.dtype not in dtypes or _long(part.shape) != _long(wanted):
                raise _misfit(module, tensor, format, part, f"{' or '.join(dtypes)} {list(wanted)}")
        return shape

    def _part(self, module: str, tensor: Stored, format: Format) -> Header:
        found = self._stored.get(f"{module}.{tensor.suffix}")
        if found is None:
            raise CheckpointError(
                f"a tensor of {format.title} is missing",
                where=f"{module}.{tensor.suffix}",
                expected=f"one beside the others of {module}",
                got="nothing",
                fix="download the checkpoint again, completely",
            )
        return found

    def parts(self, weight: str, shape: Shape) -> dict[str, Header]:
        """What its values are made from, as it lies in the files (or would, where none were looked at)."""
        module, found = weight.removesuffix(".weight"), {}
        for tensor in self._tensors(module):
            name = f"{module}.{tensor.suffix}"
            found[name] = self._stored.get(name) or Header(tensor.dtype or self.presented, tensor.shape(shape))
        return found

    def regions(self, weight: str, shape: Shape, box: Box) -> tuple[Box, ...]:
        """Of each part what belongs to the region, widened to whole blocks."""
        module = weight.removesuffix(".weight")
        wide = self._widened(module, shape, box)
        return tuple(
            _in_shape(tensor.box(wide), tensor.shape(shape), part.shape)
            for tensor, part in zip(self._tensors(module), self.parts(weight, shape).values(), strict=True)
        )

    def decode(self, weight: str, shape: Shape, box: Box, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Codes times scales, in fp32, for inputs that are not scaled first; rounded to the model's dtype."""
        import torch

        from bridge_core.runtime.tensors import torch_dtype

        module = weight.removesuffix(".weight")
        format, wide = self._format(module), self._widened(module, shape, box)
        parts: dict[str, Tensor] = {}
        for tensor, part, array in zip(self._tensors(module), self.parts(weight, shape).values(), arrays, strict=True):
            parts[tensor.part] = _decoded(array, part, tensor, format, wide.shape)
        values = format.dequantize(parts, torch.float32)
        if (scale := parts.get("pre_quant_scale")) is not None:
            values = values * scale
        top, left = (start - first for start, first in zip(box.start, wide.start, strict=True))
        values = values[top : top + box.shape[ROWS], left : left + box.shape[COLS]]
        rounded = values.to(torch_dtype(self.presented)).contiguous()
        return rounded.view(torch.uint8).numpy().view(numpy_dtype(self.presented))

    def _format(self, module: str) -> Format:
        format = self._claims.format_of(module)
        assert format is not None
        return format

    def _tensors(self, module: str) -> tuple[Stored, ...]:
        return _needed(self._format(module), self._claims.writer)

    def _widened(self, module: str, shape: Shape, box: Box) -> Box:
        """A region of a weight, with all of the blocks that it touches."""
        grain = self._format(module).granularity(self._claims.writer)
        start = tuple(first // per * per for first, per in zip(box.start, grain, strict=True))
        stop = (
            min(-(-(first + size) // per) * per, whole)
            for first, size, per, whole in zip(box.start, box.shape, grain, shape, strict=True)
        )
        return Box(start, tuple(last - first for first, last in zip(start, stop, strict=True)))


def _needed(format: Format, writer: Any) -> tuple[Stored, ...]:
    """The tensors that a weight's values are made from, the codes first."""
    found = [tensor for tensor in format.stored(writer) if tensor.part not in ("input_scale", WHOLE_SHAPE)]
    return tuple(sorted(found, key=lambda tensor: tensor.part != "codes"))


def _decoded(array: np.ndarray, part: Header, tensor: Stored, format: Format, shape: Shape) -> Tensor:
    """A part of the format, for a region of a weight of a given shape."""
    import numpy as np

    from bridge_core.runtime.tensors import from_numpy
    from bridge_quant_export.formats.encodings import ENCODINGS

    # A copy: what lies in a file is not to be written to.
    found = from_numpy(np.array(array).reshape(-1), part.dtype).reshape(tensor.shape(shape))
    sizes = tuple(axis.length(shape) for axis in format.parts[tensor.part])
    decoded = ENCODINGS[tensor.via].decode(found).reshape(sizes)
    return decoded.float() if part.dtype in _FLOATS else decoded


def _long(shape: Shape) -> Shape:
    """A shape without axes of one element."""
    return tuple(size for size in shape if size != 1)


def _in_shape(box: Box, shape: Shape, actual: Shape) -> Box:
    """A region of a tensor of a given shape, in one that has more or fewer axes of one element."""
    long = iter([(start, size) for start, size, all_of in zip(*box, shape, strict=True) if all_of != 1])
    spans = [(0, 1) if size == 1 else next(long) for size in actual]
    return Box(tuple(start for start, _ in spans), tuple(size for _, size in spans))


def _misfit(module: str, tensor: Stored, format: Format, got: Header, expected: str) -> CheckpointError:
    return CheckpointError(
        f"a tensor does not fit {format.title}",
        where=f"{module}.{tensor.suffix}",
        expected=expected,
        got=f"{got.dtype} {list(got.shape)}",
        fix="check that config.json belongs to these weights",
    )
