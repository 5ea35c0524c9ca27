"""What is quantised to what, in all of a model: the input of both composers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from bridge_core.errors import ConfigError, preview
from bridge_quant_export.formats.format import Format

# Layers that serving engines run as one matrix product, and the name that vLLM gives it (`packed_modules_mapping` of
# its models; of DeepSeek's latent attention model_executor/models/deepseek_v2.py, where queries have a latent, too).
_FUSED = (
    (("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    (("gate_proj", "up_proj"), "gate_up_proj"),
    (("w1", "w3"), "w13"),
    (("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
    (("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
    (("in_proj_b", "in_proj_a"), "in_proj_ba"),
)
_FUSED_AS = {part: whole for parts, whole in _FUSED for part in parts}


@dataclass(frozen=True, kw_only=True)
class QuantizedLayers:
    """Every linear layer and embedding of a model, by its HF module name, from *all* ranks.

    Attributes:
        quantized: the format of each quantised layer; of every expert its own entry.
        unquantized: all others (routers, `lm_head`, embeddings, vision towers, MTP layers that stayed as they were).
        fp8_kv_cache: whether the checkpoint holds FP8 KV scales.
    """

    quantized: Mapping[str, Format]
    unquantized: frozenset[str] = field(default_factory=frozenset)
    fp8_kv_cache: bool = False

    @cached_property
    def formats(self) -> dict[Format, list[str]]:
        """Layers of each format, sorted; formats in the order of their first layer."""
        found: dict[Format, list[str]] = {}
        for name in sorted(self.quantized):
            found.setdefault(self.quantized[name], []).append(name)
        return found

    def check(self) -> None:
        """Refuse what no reader would read as it is meant.

        Raises:
            ConfigError: nothing is quantised; a layer is listed as both; layers that engines fuse disagree.
        """
        if not self.quantized:
            raise ConfigError(
                "no layer of the model is quantised",
                fix="quantise it with modelopt.torch.quantization first, or export it with bridge-core",
            )
        both = sorted(self.unquantized & self.quantized.keys())
        if both:
            raise ConfigError("layers are listed as quantised and as unquantised", got=preview(both))
        self._check_fused()

    def _check_fused(self) -> None:
        seen: dict[str, tuple[str, Format | None]] = {}
        everything: dict[str, Format | None] = {**dict.fromkeys(self.unquantized), **self.quantized}
        for name, format in everything.items():
            at, _, last = name.rpartition(".")
            if last not in _FUSED_AS:
                continue
            first, other = seen.setdefault(f"{at}.{_FUSED_AS[last]}", (name, format))
            if other is not format:
                raise ConfigError(
                    "layers that serving engines run as one matrix have different formats",
                    where=f"{first} and {name}",
                    expected="the same format for both",
                    got=f"{other.name if other else 'unquantised'} and {format.name if format else 'unquantised'}",
                    fix="quantise them alike, or neither",
                )


def fused_name(name: str) -> str:
    """The name under which serving engines look a layer up: that of the fused layer, if it is part of one."""
    at, _, last = name.rpartition(".")
    return f"{at}.{_FUSED_AS[last]}" if last in _FUSED_AS else name
