"""The weights that a layer really multiplies with: as they are stored, or as its weight quantizers make them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from bridge_peft.layers.sites import Site


def weight_quantizers(site: Site) -> list[Any]:
    """The enabled weight quantizer of each weight of a ModelOpt-quantised layer; None where there is none.

    One quantizer per expert lies in a list of them (modelopt 0.47, `GroupedQuantizer`); otherwise all experts
    of a module share one. A sequence of quantizers is called as a whole.
    """
    count = len(site.weight_names())
    found = getattr(site.module, "weight_quantizer", None)
    if found is None:
        return [None] * count
    each = list(found) if type(found).__name__ == "GroupedQuantizer" else [found] * count
    return [quantizer if _enabled(quantizer) else None for quantizer in each]


def _enabled(quantizer: Any) -> bool:
    return any(getattr(module, "is_enabled", False) for module in quantizer.modules())


def is_packed(weight: Any) -> bool:
    """Whether a weight is stored in its quantised form alone (modelopt 0.47, `QTensorWrapper`)."""
    return any(cls.__name__ == "QTensorWrapper" for cls in type(weight).__mro__)


@torch.no_grad()
def used_weights(site: Site) -> list[Tensor]:
    """The weights [out, in] that the layer's forward multiplies with: quantised and back, if it does that."""
    pairs = zip(site.weights(), weight_quantizers(site), strict=True)
    return [weight if quantizer is None else quantizer(weight) for weight, quantizer in pairs]


@torch.no_grad()
def recalibrate(site: Site) -> None:
    """Let weight quantizers measure the weights as they are; input quantizers stay. Collective over the layer's group.

    Ranges that a cut of the weight runs through are made equal on the ranks that hold it, as ModelOpt's calibration
    does (modelopt 0.47, model_calib.py, `max_calibrate`): those of the whole tensor, and those of rows that are cut.
    """
    from modelopt.torch.quantization.model_calib import enable_stats_collection, finish_stats_collection

    pairs = list(zip(site.weights(), weight_quantizers(site), strict=True))
    quantizers = list({id(quantizer): quantizer for _, quantizer in pairs if quantizer is not None}.values())
    leaves = [leaf for q in quantizers for leaf in q.modules() if type(leaf).__name__ == "TensorQuantizer"]
    for leaf in leaves:
        leaf.reset_amax()
    for quantizer in quantizers:
        enable_stats_collection(quantizer)
    for weight, quantizer in pairs:
        if quantizer is not None:
            quantizer(weight)
    for quantizer in quantizers:
        finish_stats_collection(quantizer)
    for leaf in leaves:
        cut = leaf.axis is None or (site.linear.mode == "row" and leaf.axis == 0)
        if cut and leaf.block_sizes is None and leaf.amax is not None and site.linear.mode != "replicated":
            torch.distributed.all_reduce(leaf._amax, torch.distributed.ReduceOp.MAX, group=site.group)


def input_scale(site: Site) -> Tensor | None:
    """What a smoothed layer multiplies its input with before its weight, [in]; None if it is not smoothed."""
    quantizer = getattr(site.module, "input_quantizer", None)
    scale = getattr(quantizer, "_pre_quant_scale", None)
    return None if scale is None else scale.detach().float().flatten()
