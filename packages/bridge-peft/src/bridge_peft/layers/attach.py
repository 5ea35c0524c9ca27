"""How an adapter joins a layer: as a child module, and a forward hook that adds to the layer's output.

The layer keeps its class and the names of its parameters. So ModelOpt finds it whether it is quantised
before or after, mcore's code that reaches into it still does, and a checkpoint of the base loads as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from bridge_peft.layers.adapter import LoraAdapter
from bridge_peft.layers.experts import Splits, rows_by_expert, splits_of

if TYPE_CHECKING:
    from bridge_peft.layers.sites import Site


class Adapters(nn.ModuleDict):
    """The named adapters of one layer; its child `adapter`, so that `.adapter.` stands in every factor's name.

    Attributes:
        active: names of the adapters that take part in the forward.
        enabled: whether any does.
        originals: weights of the layer from before a merge, by name; empty if none is merged.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.originals: dict[str, Tensor] = {}

    def taking_part(self) -> list[LoraAdapter]:
        """The adapters whose updates are added in the forward."""
        if not self.enabled or self.originals:
            return []
        return [self[name] for name in self.active if name in self]  # type: ignore[misc]


def adapters_of(chunk: nn.Module) -> Iterator[tuple[str, Adapters]]:
    """Path in the chunk, and adapters, of every adapted layer."""
    for path, module in chunk.named_modules():
        if isinstance(module, Adapters):
            yield path.removesuffix(".adapter"), module


def attach(site: Site) -> Adapters:
    """The adapters of a layer; made and joined to it if there are none yet."""
    found = site.module._modules.get("adapter")
    if isinstance(found, Adapters):
        return found
    from bridge_peft.sharded import sharded_state_dict

    adapters = Adapters(site)
    site.module.add_module("adapter", adapters)
    adapters.hook = site.module.register_forward_hook(_add, with_kwargs=True)  # type: ignore[assignment]
    if hasattr(type(site.module), "sharded_state_dict"):
        site.module.sharded_state_dict = MethodType(sharded_state_dict, site.module)  # type: ignore[assignment]
    return adapters


def detach(site: Site) -> None:
    """Undo `attach`."""
    adapters: Any = site.module._modules["adapter"]
    adapters.hook.remove()
    del site.module._modules["adapter"]
    site.module.__dict__.pop("sharded_state_dict", None)


def _add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook: the layer's output with what its active adapters add."""
    adapters: Adapters = module._modules["adapter"]
    active = adapters.taking_part()
    if not active:
        return None
    result, *rest = output if isinstance(output, tuple) else (output,)
    site = adapters.site
    x = args[0] if args else next(iter(kwargs.values()))
    splits = None
    if site.grouped:
        given = args[1] if len(args) > 1 else kwargs["m_splits"]
        splits = splits_of(given, x.shape[0], where=site.name)
    x = _normalised(module, x) if site.normed else x
    base = result
    if any(adapter.settings.dora for adapter in active):
        base = _without_bias(site, result, bias_is_added=not rest or rest[0] is None, splits=splits)
    for adapter in active:
        result = result + adapter(x, base, splits).to(result.dtype)
    return (result, *rest) if isinstance(output, tuple) else result


def _normalised(module: Any, x: Tensor) -> Tensor:
    """The input of a fused layer's multiplication: [..., in] after its norm, in the dtype of `x`.

    The layer does not give it away, so it is computed once more, in float32 inside the kernel.
    """
    config, weight = module.config, module.layer_norm_weight
    shape, eps = weight.shape, config.layernorm_epsilon
    bias = getattr(module, "layer_norm_bias", None)
    if getattr(config, "layernorm_zero_centered_gamma", False):
        weight = weight.float() + 1
    if weight.dtype != x.dtype:
        x32, bias = x.float(), None if bias is None else bias.float()
        return _norm(config.normalization, x32, shape, weight.float(), bias, eps).to(x.dtype)
    return _norm(config.normalization, x, shape, weight, bias, eps)


def _norm(kind: str, x: Tensor, shape: torch.Size, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if kind == "LayerNorm":
        return F.layer_norm(x, shape, weight, bias, eps)
    return F.rms_norm(x, shape, weight, eps)


def _without_bias(site: Site, output: Tensor, *, bias_is_added: bool, splits: Splits) -> Tensor:
    """The layer's output minus the bias that it has added itself."""
    if not bias_is_added:
        return output
    if site.grouped:
        if not getattr(site.module, "use_bias", False):
            return output
        stacked = torch.stack([site.module.get_parameter(f"bias{index}") for index in range(site.local_experts)])
        return output - rows_by_expert(stacked, splits, output.shape[0], 0.0)
    bias = getattr(site.module, "bias", None)
    return output if bias is None or bias.numel() == 0 else output - bias
