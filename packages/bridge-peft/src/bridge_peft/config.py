"""What to adapt, and how: Hugging Face PEFT's field names, and what Megatron needs beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Literal, get_args

from bridge_core.errors import ConfigError
from bridge_peft.dtypes import lora_dtype_name

Variant = Literal["lora", "canonical"]
ExpertAdapters = Literal["each", "shared", "shared_outer"]
InitMethod = Literal["kaiming_zeros", "svdquant", "svdquant_weight", "pissa", "olora"]
ALL_LINEAR = "all-linear"
CHANGES_BASE = ("svdquant_weight", "pissa", "olora")
"""Methods of `lora_init_method` that take a part out of the base weight."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Settings of one adapter. Fields without a note mean what they mean in PEFT (0.21, `LoraConfig`).

    Attributes:
        r: rank of the factors, where `rank_pattern` does not say another.
        lora_alpha: the update is scaled by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
        target_modules: Megatron module names (`"linear_qkv"`, or longer ends of a name), patterns as in a
            shell (`"*.layers.0.*.linear_qkv"`), or one regular expression for the whole name as a string.
            Layers and experts are numbered as in the whole model, not as on one pipeline stage. By default
            `"all-linear"`: every linear layer that can be adapted, but the output layer. With `variant="canonical"`
            also parts of fused layers: `linear_q`, `linear_k`, `linear_v`, `linear_fc1_gate`, `linear_fc1_up`, or
            the Hugging Face names `q_proj`, `k_proj`, `v_proj`, `gate_proj`, `up_proj`.
        exclude_modules: what not to adapt although `target_modules` says so; written in the same way.
        lora_dropout: probability; drops elements of the input of the adapter while training.
        use_dora: weight-decomposed adaptation with one magnitude per output row.
        rank_pattern, alpha_pattern: regular expression for the end of a module name -> `r`, `lora_alpha`.
        layers_to_transform: numbers of the layers to adapt, counted from 0 over the whole model; default all.
        bias, modules_to_save: accepted with PEFT's defaults only; nothing but adapters is trained.
        lora_dtype: `"bf16"`, `"fp16"`, `"fp32"`, a longer spelling or a torch dtype; None takes the dtype
            of the adapted layer. An explicit dtype survives `model.bfloat16()` and its like.
        lora_init_method: `"kaiming_zeros"` leaves the output as it was, to the bit. `"svdquant"` makes B A
            the best approximation of `W - quant(W)`. The others take the leading part of W out of the base weight
            and into the factors, so they change the base: `"pissa"` and `"olora"` where W is not quantised,
            `"svdquant_weight"` where it is (what the SVDQuant paper does: W smoothed, what is left quantised anew).
        variant: `"lora"` gives a fused layer (q, k, v; gate, up) one pair of factors, `"canonical"` one each.
        expert_adapters: `"each"` expert its own factors; one pair `"shared"` by all experts of a layer; or
            `"shared_outer"`: A of `linear_fc1` and B of `linear_fc2` shared, the inner factors per expert.
        seed: initial factors depend on it, on the module's name and on nothing else, whatever the layout.

    Raises:
        ConfigError: a value that is not understood, or two that contradict each other.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    lora_dtype: Any = None
    lora_init_method: InitMethod = "kaiming_zeros"
    variant: Variant = "lora"
    expert_adapters: ExpertAdapters = "each"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_dtype", lora_dtype_name(self.lora_dtype))
        layers = self.layers_to_transform
        object.__setattr__(self, "layers_to_transform", (layers,) if isinstance(layers, int) else layers)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        self._check_numbers()
        self._check_choices()
        self._check_together()

    def _check_numbers(self) -> None:
        for where, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(
                    "a rank must be a positive whole number", where=where, expected=">= 1", got=repr(rank), fix="set r"
                )
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                "a dropout probability is out of range",
                where="lora_dropout",
                expected="0 <= p < 1",
                got=self.lora_dropout,
                fix="0 for no dropout",
            )
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            _compiled(pattern, where="rank_pattern, alpha_pattern")

    def _check_choices(self) -> None:
        choices = {"variant": Variant, "expert_adapters": ExpertAdapters, "lora_init_method": InitMethod}
        for name, literal in choices.items():
            if (value := getattr(self, name)) not in get_args(literal):
                raise ConfigError(
                    f"`{name}` has no such value",
                    where=name,
                    expected=", ".join(get_args(literal)),
                    got=repr(value),
                    fix="take one of these",
                )
        for name, default in {"bias": "none", "modules_to_save": None}.items():
            if (value := getattr(self, name)) != default:
                raise ConfigError(
                    "only adapters are trained",
                    where=name,
                    expected=repr(default),
                    got=repr(value),
                    fix="train other parameters by setting their requires_grad after apply_lora",
                )
        if not self.target_modules:
            raise ConfigError(
                "there is nothing to adapt",
                where="target_modules",
                expected='module names, a pattern, or "all-linear"',
                got=repr(self.target_modules),
                fix='leave it out for "all-linear"',
            )

    def _check_together(self) -> None:
        if self.expert_adapters != "each" and (self.use_dora or self.lora_init_method != "kaiming_zeros"):
            what = "use_dora" if self.use_dora else f"lora_init_method={self.lora_init_method!r}"
            raise ConfigError(
                "factors that experts share cannot follow the weight of each expert",
                where=f"expert_adapters={self.expert_adapters!r}",
                expected='use_dora=False and lora_init_method="kaiming_zeros"',
                got=what,
                fix='expert_adapters="each"',
            )
        if self.variant == "canonical" and self.lora_init_method != "kaiming_zeros":
            raise ConfigError(
                "factors from a decomposition belong to whole weights",
                where='variant="canonical"',
                expected='lora_init_method="kaiming_zeros"',
                got=f"lora_init_method={self.lora_init_method!r}",
                fix='variant="lora"',
            )

    def rank(self, name: str) -> int:
        """Rank of the adapter of a module."""
        key = pattern_key(self.rank_pattern, name)
        return self.r if key is None else self.rank_pattern[key]

    def alpha(self, name: str) -> float:
        """alpha of the adapter of a module."""
        key = pattern_key(self.alpha_pattern, name)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def scaling(self, name: str) -> float:
        """What the product B A of a module's factors is multiplied with."""
        return scaling(self.alpha(name), self.rank(name), rslora=self.use_rslora)


def scaling(alpha: float, rank: int, *, rslora: bool) -> float:
    """What B A is multiplied with: alpha / r, or with rank stabilisation alpha / sqrt(r)."""
    return alpha / (sqrt(rank) if rslora else rank)


def pattern_key(patterns: Mapping[str, Any], name: str) -> str | None:
    """The first pattern that fits the end of a name at a dot (peft 0.21, `utils.other.get_pattern_key`)."""
    return next((pattern for pattern in patterns if re.match(rf"(?:.*\.)?(?:{pattern})$", name)), None)


def _compiled(pattern: str, *, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            "a regular expression cannot be read",
            where=where,
            expected="a regular expression for the end of a module name",
            got=repr(pattern),
            fix=str(error),
        ) from error
