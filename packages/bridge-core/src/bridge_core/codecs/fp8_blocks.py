"""fp8 weights with a float32 scale per block of rows and columns, as DeepSeek-V3 is published.

Format: DeepSeek-V3, README_WEIGHTS.md ("FP8 Weight Documentation") and inference/kernel.py (`weight_dequant`):
beside `X.weight` (F8_E4M3, [R, C]) lies `X.weight_scale_inv` (F32, [ceil(R / 128), ceil(C / 128)]); the weight's
value is the stored one times the scale of its block. Blocks at the lower and right edges may be partial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from bridge_core.codecs.codec import Found, Header
from bridge_core.dtypes import numpy_dtype
from bridge_core.errors import CheckpointError, ConfigError, preview
from bridge_core.geometry import Box, Shape

if TYPE_CHECKING:
    import numpy as np

METHOD = "fp8"
OPTION = "quantization_config"
_WEIGHT, _SCALE = ".weight", ".weight_scale_inv"

# What may stand beside the method and the block. None of it changes what a stored weight means: `fmt` and `scale_fmt`
# are checked, the scheme is about activations, and which tensors are quantised their dtypes say.
_ACCEPTED = frozenset({
    "quant_method", "weight_block_size", "fmt", "scale_fmt", "activation_scheme", "modules_to_not_convert",
    "ignored_layers",
})  # fmt: skip


class Fp8Blocks(NamedTuple):
    """The format with a block of `rows` x `cols` elements. Weights are F8_E4M3, scales F32."""

    rows: int = 128
    cols: int = 128

    dtype = "F8_E4M3"
    scale_dtype = "F32"
    presented = "BF16"  # the dtype in which the publisher's formula gives a weight
    largest = 448.0  # of float8_e4m3fn
    files = frozenset[str]()
    names_weights = False

    def scale_name(self, weight: str) -> str:
        """Name of the tensor that holds a weight's scales."""
        return weight.removesuffix(_WEIGHT) + _SCALE

    def weight_name(self, scale: str) -> str | None:
        """Name of the weight that a tensor holds the scales of; None if it is not named like scales."""
        return scale.removesuffix(_SCALE) + _WEIGHT if scale.endswith(_SCALE) else None

    def scale_shape(self, shape: Shape) -> Shape:
        """Blocks down and across a weight [R, C]."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.cols)

    def chosen(self, weights: Mapping[str, Shape]) -> frozenset[str]:
        """None: config.json does not say which weights are quantised."""
        return frozenset()

    def parts(self, weight: str, shape: Shape) -> dict[str, Header]:
        """Codes, and scales."""
        scales = Header(self.scale_dtype, self.scale_shape(shape))
        return {weight: Header(self.dtype, shape), self.scale_name(weight): scales}

    def find(self, stored: Mapping[str, Header], *, where: object) -> Found:
        """Every weight in fp8, with its scales.

        Raises:
            CheckpointError: a weight lacks its scales, scales lack their weight or have another shape or dtype, or
                nothing is quantised although config.json says so. Names the first.
        """
        scales = {weight: name for name in stored if (weight := self.weight_name(name)) is not None}
        quantised = [name for name, tensor in stored.items() if tensor.dtype == self.dtype]
        self._check_pairs(stored, scales, quantised, where)
        return Found({name: stored[name].shape for name in quantised}, {})

    def _check_pairs(
        self, stored: Mapping[str, Header], scales: Mapping[str, str], quantised: list[str], where: object
    ) -> None:
        again = "download the checkpoint again, completely"
        if not quantised:
            raise CheckpointError(
                "config.json says that weights are quantised, and none is",
                where=where,
                expected=f"weights in {self.dtype}: {self}",
                got="none",
                fix="remove quantization_config from config.json, if the weights were dequantised",
            )
        if bare := [name for name in quantised if name not in scales]:
            raise CheckpointError(
                "quantised weights have no scales",
                where=preview(bare),
                expected=f"{self.scale_name(bare[0])} beside {bare[0]}",
                got="nothing",
                fix=again,
            )
        known = set(quantised)
        if orphans := [scale for weight, scale in scales.items() if weight not in known]:
            weight = self.weight_name(orphans[0]) or ""
            raise CheckpointError(
                "scales belong to no quantised weight",
                where=preview(orphans),
                expected=f"{weight} in {self.dtype}",
                got=stored[weight].dtype if weight in stored else "no such tensor",
                fix=again,
            )
        for name in quantised:
            shape, scale = stored[name].shape, stored[scales[name]]
            expected = self.scale_shape(shape) if len(shape) == 2 else ()
            if scale.dtype != self.scale_dtype or scale.shape != expected:
                raise CheckpointError(
                    "the scales of a quantised weight do not fit it",
                    where=scales[name],
                    expected=f"{self.scale_dtype} {list(expected)}, one for each block of {name} {list(shape)}",
                    got=f"{scale.dtype} {list(scale.shape)}",
                    fix=f"check weight_block_size in config.json; else {again}",
                )

    def regions(self, weight: str, shape: Shape, box: Box) -> tuple[Box, ...]:
        """The same of the codes, and the blocks that it touches."""
        (top, left), (height, width) = box
        first = top // self.rows, left // self.cols
        last = (top + height - 1) // self.rows, (left + width - 1) // self.cols
        return box, Box(first, (last[0] + 1 - first[0], last[1] + 1 - first[1]))

    def decode(self, weight: str, shape: Shape, box: Box, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """DeepSeek-V3, inference/kernel.py (`weight_dequant`): the stored value to float32, times its block's scale."""
        import numpy as np

        codes, scales = arrays
        (top, left), (height, width) = box
        codes = codes.view(np.uint8)
        columns = np.arange(left, left + width) // self.cols - left // self.cols
        found = np.empty((height, width), numpy_dtype(self.presented))
        first = top // self.rows
        for row in range(top - top % self.rows, top + height, self.rows):
            rows = slice(max(row, top) - top, min(row + self.rows, top + height) - top)
            values = _float32_of_codes()[codes[rows]]
            with np.errstate(over="ignore"):
                values *= scales[row // self.rows - first, columns]
                found[rows] = values
        return found

    def to_hf(self) -> dict[str, Any]:
        """`quantization_config` of a checkpoint in this format, as DeepSeek-V3's config.json has it."""
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [self.rows, self.cols],
        }

    def __str__(self) -> str:
        return f"fp8 in blocks of {self.rows} x {self.cols}"


def fp8_blocks_of(said: Mapping[str, Any], *, where: object) -> Fp8Blocks:
    """The codec that a `quantization_config` with the method `fp8` describes.

    Raises:
        ConfigError: it has no blocks, or an option that is not known.
    """
    if not _block(said):
        raise ConfigError(
            "fp8 weights without blocks are not converted",
            where=f"{where}: {OPTION}",
            expected="weight_block_size of two positive numbers",
            got=said,
            fix="dequantise the checkpoint first, with the tool that made it",
        )
    unknown = {name: said[name] for name in said if name not in _ACCEPTED}
    if said.get("fmt", "e4m3") != "e4m3":
        unknown["fmt"] = said["fmt"]
    if unknown:
        raise ConfigError(
            "an option of the quantisation is not translated",
            where=f"{where}: {OPTION}",
            expected=f"of {', '.join(sorted(_ACCEPTED))}; fmt='e4m3'",
            got=", ".join(f"{name}={value!r}" for name, value in sorted(unknown.items())),
            fix="teach codecs/fp8_blocks.py what it means for the stored weights",
        )
    return Fp8Blocks(*_block(said))


def _block(said: Mapping[str, Any]) -> tuple[int, ...]:
    size = said.get("weight_block_size")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        return ()
    return tuple(size)


@cache
def _float32_of_codes() -> np.ndarray:
    """The value of each of the 256 codes: looking up is several times faster than casting."""
    import numpy as np

    return np.arange(256, dtype=np.uint8).view(numpy_dtype(Fp8Blocks.dtype)).astype(np.float32)
