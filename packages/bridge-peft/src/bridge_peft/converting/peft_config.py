"""`adapter_config.json`: what PEFT has to know to put the tensors where they belong, and to nothing else.

Fields and their meaning: peft 0.21, tuners/lora/config.py. `target_modules` are ends of names, `rank_pattern` and
`alpha_pattern` regular expressions for ends of names.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import Any

from bridge_core.errors import CheckpointError, ConfigError, preview
from bridge_peft.config import pattern_key
from bridge_peft.converting.layouts import Module, Target
from bridge_peft.errors import MissingCheckpointError
from bridge_peft.settings import AdapterSettings

CONFIG = "adapter_config.json"


def build(
    modules: Sequence[Module],
    settings: Iterable[AdapterSettings],
    known: Iterable[tuple[str, bool]],
    target: Target,
    *,
    base_model: str | None,
) -> dict[str, Any]:
    """The configuration of an export.

    Args:
        modules: what is adapted.
        settings: of the Megatron layers.
        known: every module of the model that could be adapted, and whether it is an expert's.
        target: who is to read it.
        base_model: name or path of the model that the adapter belongs to.

    Raises:
        ConfigError: the layers cannot be said in one configuration, or not so that PEFT gets them right.
    """
    held = list(settings)
    rslora = {one.rslora for one in held}
    if len(rslora) > 1:
        raise ConfigError(
            "some layers are rank-stabilised and others are not", where="use_rslora", expected="one for all", got="both"
        )
    stabilised = rslora == {True}
    if stabilised and target == "peft" and any(module.expert and not module.parameter for module in modules):
        # PEFT doubles r and alpha where it joins gate and up, which keeps alpha / r but not alpha / sqrt(r).
        modules = [replace(module, alpha=module.alpha * sqrt(module.r)) for module in modules]
        stabilised = False
    known = list(known)
    r, alpha = _common(modules)
    if target in ("peft", "peft-target-parameters"):
        _check_peft(modules, known, target, r, alpha)
    parameters = [module for module in modules if module.parameter]
    plain = [module for module in modules if not module.parameter]
    # PEFT refuses dropout in front of parameters, and what is exported is there to be used.
    dropout = 0.0 if any(module.expert for module in modules) else max((one.dropout for one in held), default=0.0)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(alpha),
        "lora_dropout": dropout,
        "modules_to_save": None,
        "r": r,
        "rank_pattern": _pattern(modules, {module.name: module.r for module in modules if module.r != r}),
        "alpha_pattern": _pattern(modules, {m.name: _number(m.alpha) for m in modules if m.alpha != alpha}),
        "target_modules": _ends([module.name for module in plain], [name for name, _ in known]),
        "task_type": "CAUSAL_LM",
        "use_dora": any(one.dora for one in held),
        "use_rslora": stabilised,
    }
    if parameters:
        config["target_parameters"] = [module.name for module in parameters]
    return config


def _common(modules: Sequence[Module]) -> tuple[int, float]:
    """r and alpha of the most modules. On transformers 5, PEFT gives them to experts whatever the patterns say."""
    counted = Counter((module.r, module.alpha) for module in modules if module.expert and not module.parameter)
    counted = counted or Counter((module.r, module.alpha) for module in modules)
    return max(counted, key=lambda value: (counted[value], -value[0]))


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _pattern(modules: Sequence[Module], differing: Mapping[str, Any]) -> dict[str, Any]:
    """Regular expressions for names -> values; one for the last part of a name where all that end so agree."""
    by_leaf: dict[str, set[Any]] = {}
    for module in modules:
        by_leaf.setdefault(module.name.rpartition(".")[2], set()).add(differing.get(module.name))
    found: dict[str, Any] = {}
    for name, value in differing.items():
        leaf = name.rpartition(".")[2]
        found[re.escape(leaf if len(by_leaf[leaf]) == 1 else name)] = value
    return found


def _ends(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Ends of names that fit exactly `names` among all modules: last parts where all modules that end so are meant."""
    wanted = set(names)
    beside = {name.rpartition(".")[2] for name in known if name not in wanted}
    return sorted({leaf if (leaf := name.rpartition(".")[2]) not in beside else name for name in names})


def _check_peft(
    modules: Sequence[Module], known: Sequence[tuple[str, bool]], target: Target, r: int, alpha: float
) -> None:
    """Refuse what PEFT would put elsewhere, where transformers 5 holds the experts of a layer in one parameter.

    It then takes every target whose name ends like an expert's projection for all experts of all layers, with the
    common r and alpha (peft 0.21, utils/transformers_weight_conversion.py, `_convert_peft_config_moe`).
    """
    experts = {name for name, is_expert in known if is_expert and re.search(r"\.experts\.\d+\.", name)}
    leaves = {name.rpartition(".")[2] for name in experts}
    taken = [module.name for module in modules if not module.expert and module.name.rpartition(".")[2] in leaves]
    if taken:
        raise ConfigError(
            "PEFT would take layers for experts, because their names end alike",
            where=preview(taken, limit=2),
            expected="no adapter on dense layers or shared experts beside routed ones",
            got=f"{len(taken)} of them",
            fix='target="vllm" writes them; for PEFT, train without them or merge the adapter',
        )
    named = {module.name for module in modules if module.expert and not module.parameter}
    if target != "peft" or not named:
        return
    lacking = [name for name in experts if name not in named and name.rpartition(".")[2] in _leaves(named)]
    differing = [m.name for m in modules if m.name in named and (m.r, m.alpha) != (r, alpha)]
    pairs = {"gate_proj": "up_proj", "up_proj": "gate_proj", "w1": "w3", "w3": "w1"}
    halves = [leaf for leaf in _leaves(named) if pairs.get(leaf, leaf) not in _leaves(named)]
    if lacking or differing or halves:
        raise ConfigError(
            "PEFT cannot tell these experts apart",
            where=preview([*lacking, *differing, *halves], limit=2),
            expected="all experts of all layers, gate and up together, with one r and one alpha",
            got=f"{len(lacking)} without an adapter, {len(differing)} with another r or alpha, "
            f"{len(halves)} half pairs",
            fix='target="peft-target-parameters" says it layer by layer',
        )


def _leaves(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


# --- Reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter_config.json says, as far as converting needs it.

    Attributes:
        r, alpha, rslora, dora, dropout: as in PEFT.
        rank_pattern, alpha_pattern: regular expressions for ends of names -> values.
        target_modules: ends of names, or one regular expression for whole names; None if it does not say.
        exclude_modules: the same for what is not adapted.
        layers: numbers of the adapted layers; None for all.
        target_parameters: ends of names of adapted parameters.
        base_model: `base_model_name_or_path`.
    """

    r: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers: tuple[int, ...] | None = None
    target_parameters: tuple[str, ...] = ()
    base_model: str | None = None

    def targets(self, module: str) -> bool:
        """Whether it says that an HF module is adapted (peft 0.21, tuners/tuners_utils.py)."""
        if self.target_modules in (None, "all-linear") or not _fits(self.target_modules, module):
            return False
        if self.exclude_modules is not None and _fits(self.exclude_modules, module):
            return False
        number = re.search(r"\.(\d+)\.", module)
        return self.layers is None or (number is not None and int(number[1]) in self.layers)

    def settings(self, module: str) -> AdapterSettings:
        """The settings of one HF module or parameter."""
        rank, alpha = pattern_key(self.rank_pattern, module), pattern_key(self.alpha_pattern, module)
        return AdapterSettings(
            r=self.r if rank is None else self.rank_pattern[rank],
            alpha=self.alpha if alpha is None else self.alpha_pattern[alpha],
            rslora=self.rslora,
            dora=self.dora,
            dropout=self.dropout,
        )


def _fits(patterns: Iterable[str] | str | None, name: str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    held = frozenset(patterns or ())
    parts = name.split(".")
    return any(".".join(parts[at:]) in held for at in range(len(parts)))


def _names(value: Any) -> tuple[str, ...] | str | None:
    return value if value is None or isinstance(value, str) else tuple(value)


def _numbers(value: Any) -> tuple[int, ...] | None:
    return None if value is None else (value,) if isinstance(value, int) else tuple(value)


# Fields that change what an adapter computes, and the values that mean that they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
}


def _check_options(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ConfigError(
            "only LoRA can be imported", where=path, expected="peft_type LORA", got=config.get("peft_type")
        )
    for name, neutral in _NEUTRAL.items():
        if name in config and config[name] not in neutral:
            raise ConfigError(
                "an adapter uses an option that is not imported",
                where=f"{path}: {name}",
                expected=repr(neutral[0]),
                got=repr(config[name]),
                fix="merge the adapter into its model with PEFT, and import the model",
            )


def read(folder: Path) -> PeftConfig:
    """The configuration of an adapter folder.

    Raises:
        MissingCheckpointError: there is no folder, or no configuration in it.
        CheckpointError: it cannot be read.
        ConfigError: it is not LoRA, or has an option that Megatron adapters do not have.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise MissingCheckpointError(
            "no such adapter",
            where=path if folder.is_dir() else folder,
            expected=f"a folder with {CONFIG} and adapter_model.safetensors",
            got="a folder without it" if folder.is_dir() else "nothing",
            fix="check the path",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        _check_options(config, path)
        return PeftConfig(
            r=int(config["r"]),
            alpha=config.get("lora_alpha", 8),
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            dropout=float(config.get("lora_dropout") or 0.0),
            rank_pattern=dict(config.get("rank_pattern") or {}),
            alpha_pattern=dict(config.get("alpha_pattern") or {}),
            target_modules=_names(config.get("target_modules")),
            exclude_modules=_names(config.get("exclude_modules")),
            layers=_numbers(config.get("layers_to_transform")),
            target_parameters=tuple(config.get("target_parameters") or ()),
            base_model=config.get("base_model_name_or_path"),
        )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(
            "an adapter's configuration cannot be read",
            where=path,
            expected="JSON with r, lora_alpha, peft_type, ...",
            got=f"{type(error).__name__}: {error}",
            fix="copy the file again",
        ) from None
