"""The model families, found by the architecture that config.json names.

To add one in this package: write `families/<name>.py` and add a line to `_BUILT_IN`. To add one
without touching it: expose a `Family` through an entry point of group `bridge_core.families`, or
call `register_family` in every process that is to know it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from bridge_core.errors import ConfigError, preview
from bridge_core.families.family import Config, Copy, Family, Field, Fields, Section, Table, Tower

__all__ = [
    "Config",
    "Copy",
    "Family",
    "Field",
    "Fields",
    "Section",
    "Table",
    "Tower",
    "all_families",
    "family_for",
    "family_named",
    "recognise",
    "register_family",
]

ENTRY_POINTS = "bridge_core.families"

_BUILT_IN = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "NemotronHForCausalLM": "nemotron_h",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}


def _load(name: str) -> Family:
    return import_module(f"bridge_core.families.{name}").FAMILY


_REGISTERED: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known to this process, in place of one that has its name; returns it.

    Raises:
        ConfigError: it is not a `Family`.
    """
    _REGISTERED[_checked("register_family", family).name] = family
    return family


def _third_party() -> tuple[Family, ...]:
    return (*_REGISTERED.values(), *_from_entry_points())


@cache
def _from_entry_points() -> tuple[Family, ...]:
    return tuple(_checked(point.name, point.load()) for point in entry_points(group=ENTRY_POINTS))


def _checked(name: str, family: Any) -> Family:
    if not isinstance(family, Family):
        raise ConfigError(
            "what was registered is no model family",
            where=f"{ENTRY_POINTS}: {name}",
            expected="an instance of bridge_core.families.Family",
            got=type(family).__name__,
            fix="mend or uninstall the package that brings it",
        )
    return family


def all_families() -> tuple[Family, ...]:
    """Every known family: those of this package, then those that were registered or that entry points bring."""
    built_in = tuple(_load(name) for name in dict.fromkeys(_BUILT_IN.values()))
    return built_in + _third_party()


def family_for(config: Config) -> Family:
    """The family of an HF configuration, by its `architectures`, or its `model_type` where it names none.

    Raises:
        ConfigError: no architecture is named, or none that is known; says how to add one.
    """
    architectures = config.get("architectures") or ()
    if not isinstance(architectures, list | tuple):
        raise ConfigError(
            "config.json does not give its architectures as a list",
            where="config.json: architectures",
            expected="a list of one name",
            got=repr(architectures),
            fix="correct config.json",
        )
    named = [str(name) for name in architectures]
    for name in named:
        for family in _third_party():
            if name in family.architectures:
                return family
        if name in _BUILT_IN:
            return _load(_BUILT_IN[name])
    if not named:
        for family in all_families():
            if family.model_type == config.get("model_type"):
                return family
    known = sorted({name for family in all_families() for name in family.architectures})
    raise ConfigError(
        "no model family handles this architecture" if named else "config.json does not say its architecture",
        where="config.json: architectures",
        expected=f"one of {', '.join(known)}",
        got=", ".join(named) or "nothing",
        fix="write a family (one short file, docs: 'Add a model family') and register it "
        f"through an entry point of group {ENTRY_POINTS!r}",
    )


def family_named(name: str) -> Family:
    """The family with a given short name."""
    families = {family.name: family for family in all_families()}
    if name in families:
        return families[name]
    raise ConfigError(
        "no such model family",
        where="family",
        expected=f"one of {', '.join(sorted(families))}",
        got=name,
        fix="install the package that brings it, or pass the HF folder (or its config.json) that the model came from",
    )


def recognise(fields: Fields) -> Family:
    """The family that a checkpoint with these Megatron fields belongs to, when nothing names it.

    Raises:
        ConfigError: none, or more than one, recognises the model.
    """
    found = [family for family in all_families() if family.recognises(fields)]
    if len(found) == 1:
        return found[0]
    raise ConfigError(
        "the model family cannot be told from the checkpoint's configuration",
        expected="exactly one family that recognises it",
        got=preview(family.name for family in found) or "none",
        fix="pass the HF folder (or its config.json) that the model came from",
    )
