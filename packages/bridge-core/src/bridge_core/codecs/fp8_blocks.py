"""fp8 weights with a float32 scale per block of rows and columns, as DeepSeek-V3 is published.

Format: DeepSeek-V3, README_WEIGHTS.md ("FP8 Weight Documentation") and inference/kernel.py (`weight_dequant`):
beside `X.weight` (F8_E4M3, [R, C]) lies `X.weight_scale_inv` (F32, [ceil(R / 128), ceil(C / 128)]); the weight's
value is the stored one times the scale of its block. Blocks at the lower and right edges may be partial.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bridge_core.errors import ConfigError
from bridge_core.geometry import Shape

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

    def scale_name(self, weight: str) -> str:
        """Name of the tensor that holds a weight's scales."""
        return weight.removesuffix(_WEIGHT) + _SCALE

    def weight_name(self, scale: str) -> str | None:
        """Name of the weight that a tensor holds the scales of; None if it is not named like scales."""
        return scale.removesuffix(_SCALE) + _WEIGHT if scale.endswith(_SCALE) else None

    def scale_shape(self, shape: Shape) -> Shape:
        """Blocks down and across a weight [R, C]."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.cols)

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


def codec_of(config: Mapping[str, Any], *, where: object = "config.json") -> Fp8Blocks | None:
    """The codec of the checkpoint that a config.json belongs to; None for plain weights.

    Args:
        config: content of config.json.
        where: what an error names as its place.

    Raises:
        ConfigError: the checkpoint is quantised in a way that is not known here.
    """
    said = config.get(OPTION)
    if said is None:
        return None
    if not isinstance(said, Mapping) or said.get("quant_method") != "fp8" or not _block(said):
        raise ConfigError(
            "checkpoints in this quantised form are not converted",
            where=f"{where}: {OPTION}",
            expected="no quantisation, or quant_method 'fp8' with weight_block_size of two positive numbers",
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
