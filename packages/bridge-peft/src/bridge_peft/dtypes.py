"""Element types of adapter factors: the one place where their names are understood."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_core.errors import ConfigError

if TYPE_CHECKING:
    import torch

# Name that is kept -> the other spellings that mean it.
_SPELLINGS = {
    "bf16": ("bfloat16",),
    "fp16": ("float16", "half"),
    "fp32": ("float32", "float"),
}
_NAMES = {spelling: name for name, others in _SPELLINGS.items() for spelling in (name, *others)}
_TORCH = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def lora_dtype_name(value: object, *, where: str = "lora_dtype") -> str | None:
    """`"bf16"`, `"fp16"` or `"fp32"` for any of their spellings, or a torch dtype; None stays None.

    Raises:
        ConfigError: anything else, with the list of what is allowed.
    """
    if value is None:
        return None
    name = _NAMES.get(str(value).strip().lower().removeprefix("torch."))
    if name is None:
        raise ConfigError(
            "adapter factors cannot have this dtype",
            where=where,
            expected=", ".join(_NAMES),
            got=repr(value),
            fix="take one of these, or None for the dtype of the layer that is adapted",
        )
    return name


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name that `lora_dtype_name` gave."""
    import torch

    return getattr(torch, _TORCH[name])
