"""FP8 KV cache: a static scale each for keys and values of a layer, fp32 `[1]`.

Names: ModelOpt's Hugging Face export puts them at the projections (0.47, export/quant_utils.py,
`_KV_CACHE_REPLACEMENTS`). vLLM and SGLang rename those and bare `k_scale` alike; TensorRT-LLM looks for them among the
tensors of the projections only. compressed-tensors 0.20 has them at the attention module
(quantization/lifecycle/initialize.py, `initialize_attn_qparams`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from bridge_quant_export.errors import CalibrationError
from bridge_quant_export.formats.format import TensorSpec, Writer

if TYPE_CHECKING:
    from torch import Tensor

_AT: dict[Writer, str] = {"modelopt": "{which}_proj.{which}_scale", "compressed-tensors": "{which}_scale"}


def kv_tensor(which: Literal["k", "v"], writer: Writer) -> TensorSpec:
    """Suffix (after the attention module's name), dtype and shape of a KV scale."""
    return TensorSpec(_AT[writer].format(which=which), "F32", (1,))


def pack_kv(amax: Tensor, *, at_least_one: bool = True, where: object = None) -> Tensor:
    """The scale for a range of keys or values.

    Args:
        amax: largest absolute value seen; one element.
        at_least_one: never scale up, as ModelOpt does by default: FP8 has the exponents for small values anyway,
            and values beyond the calibrated range are not clipped.
        where: the layer, for messages.

    Raises:
        CalibrationError: the range is not one positive finite number.
    """
    import torch

    from bridge_quant_export.codes import e4m3

    found = amax.detach().float().reshape(-1)
    if found.numel() != 1 or not bool(torch.isfinite(found).all()) or not bool((found > 0).all()):
        raise CalibrationError(
            "the range of a KV cache is no positive number",
            where=where,
            expected="one finite number above zero",
            got=found.tolist()[:4],
            fix="calibrate with the KV cache quantisers enabled, or export without a quantised KV cache",
        )
    scale = found / e4m3.MAX
    return scale.clamp(min=1.0) if at_least_one else scale
