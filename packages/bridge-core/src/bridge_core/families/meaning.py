"""Settings under which tensors of the same shapes are other weights: no comparison of shapes finds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge_core.errors import ConfigError, preview
from bridge_core.families.family import Fields

# 8 heads of 8 have the rows of 4 heads of 16. With each setting, what mcore takes where nothing is said; None where
# there is no such thing. What holds no weights may differ: a rotary base, a router's top k, training options.
_MEANING: Mapping[str, Any] = {
    **dict.fromkeys(("num_attention_heads", "num_query_groups", "kv_channels")),
    **dict.fromkeys(("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")),
    **dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim")),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")),
    "layernorm_zero_centered_gamma": False,
    "rotary_interleaved": False,
    "gated_linear_unit": False,
    "attention_output_gate": False,
}
_LATENT = ("num_query_groups", "kv_channels")  # say nothing of latent attention


def check_meaning(fields: Fields, found: Mapping[str, Any], *, what: str, where: object, fix: str) -> None:
    """Raise unless weights mean what the fields say, as far as both say something.

    Args:
        fields: Megatron fields of the model that is expected.
        found: those that weights were made with.
        what, where, fix: facts of the error.

    Raises:
        ConfigError: names the settings that differ.
    """
    names = [name for name in _MEANING if not (fields.get("multi_latent_attention") and name in _LATENT)]
    said = {name: fields.get(name, _MEANING[name]) for name in names}
    wrong = [name for name in names if None not in (said[name], found.get(name)) and said[name] != found[name]]
    if wrong:
        raise ConfigError(
            what,
            where=f"{where}: {preview(wrong)}",
            expected=preview(f"{name}={said[name]!r}" for name in wrong),
            got=preview(f"{name}={found[name]!r}" for name in wrong),
            fix=fix,
        )
