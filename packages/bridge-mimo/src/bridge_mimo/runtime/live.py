"""A live `MimoModel`, seen as the plan sees it: this rank's components, and their tensors under `MimoModel`'s names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bridge_core.codecs import Codec
from bridge_core.errors import ConfigError, CoverageError, LayoutError
from bridge_core.geometry import Shape
from bridge_core.plan import Shard
from bridge_core.runtime.homes import config_of, gather_late, stored, unwrap
from bridge_core.runtime.live import LiveModel, check_settings, matched, matches, padded_vocab, remembered
from bridge_core.runtime.shared_files import GroupOf
from bridge_mimo.components import Components
from bridge_mimo.layout import LANGUAGE
from bridge_mimo.plan import MimoPlan

if TYPE_CHECKING:
    from torch.nn import Module

    from bridge_mimo.runtime.groups import MimoGroups

LANGUAGE_MODULE = "language_model"
"""Where `MimoModel` keeps the language model."""


def open_mimo(
    model: Any,
    components: Components,
    groups: MimoGroups,
    *,
    excepted: Collection[str] = (),
    inventory: Mapping[str, Shape] | None = None,
    ignore: Sequence[str] = (),
    codec: Codec | None = None,
    quantised: Collection[str] | None = None,
    known: dict[Any, MimoPlan] | None = None,
) -> LiveModel:
    """Match a live `MimoModel` against its plan, before any byte is copied. Nothing is communicated.

    Adapters on its layers (`<layer>.adapter.<...>`) are left alone: what is matched is the base model.

    Args:
        model: the `MimoModel`, its components wrapped or not.
        components: of the HF model.
        groups: of the model.
        excepted: patterns (as in a shell) of parameter names that need not match.
        inventory, ignore, codec, quantised: as for a `MimoPlan`.
        known: plans made before of the same components and options; the plan is taken from there, or put there.

    Returns:
        The model with the names of `MimoModel`; its rank is that of the world, its plan a `MimoPlan`.

    Raises:
        CoverageError: a component has other parameters, or of other shapes, than the plan; or is not there at all.
        ConfigError: a component was built with settings under which the same shapes mean other weights.
        LayoutError: the groups do not divide the model.
    """
    import torch.distributed as dist

    parts = modules_of(model, groups)
    named = {(0, prefix + name): tensor for prefix, module in parts.values() for name, tensor in stored(module)}
    left = {key for key in named if matches(key[1], excepted)}
    padded = _padded_vocab(model, parts, groups, components.fields["vocab_size"])

    def make() -> MimoPlan:
        options: dict[str, Any] = {"inventory": inventory, "ignore": ignore, "codec": codec, "quantised": quantised}
        return MimoPlan(components, groups.layouts, colocated=groups.colocated, padded_vocab=padded, **options)

    plan = remembered(known, (*groups.layouts.items(), groups.colocated, padded), components.fields, make)
    live = matched(plan, dist.get_rank(), {key: named[key] for key in named if key not in left}, excepted)
    for name, (_, module) in parts.items():
        encoders = len(getattr(module, "encoders", ()))  # of several, the plan's fields are those of one
        if encoders < 2 and name not in components.hf_towers and (config := config_of(module)) is not None:
            check_settings(config, plan.components[name].plan.fields, f"component {name}")
    excepted = tuple(name for _, name in sorted(left))
    return replace(live, excepted=excepted, renew=lambda: gather_late([_wrapped(model, name) for name in groups.mine]))


def _padded_vocab(model: Any, parts: Mapping[str, tuple[str, Module]], groups: MimoGroups, tokens: int) -> int | None:
    """Rows of the whole embedding, also on ranks of other components: as the language model is specified."""
    if LANGUAGE in parts:
        module = parts[LANGUAGE][1]
        own = {(0, name): tensor for name, tensor in stored(module)}
        return padded_vocab(module, own, groups.mine[LANGUAGE].tp.size(), tokens)
    return model.mimo_config.language_model_spec.params.get("vocab_size")


def modules_of(model: Any, groups: MimoGroups) -> dict[str, tuple[str, Module]]:
    """This rank's components: what names below each begin with in a bare `MimoModel`, and the bare module.

    Raises:
        CoverageError: the model lacks a component of this rank.
    """
    found: dict[str, tuple[str, Module]] = {}
    for name in groups.mine:
        path = LANGUAGE_MODULE if name == LANGUAGE else f"modality_submodules.{name}"
        module = _wrapped(model, name)
        if module is None:
            raise CoverageError(
                "the live model does not have a component that its groups say",
                where=f"component {name}",
                expected=path,
                got="nothing",
                fix="build the model with the same groups (MimoProvider.provide)",
            )
        found[name] = (f"{path}.", unwrap(module)[0])
    return found


def _wrapped(model: Any, name: str) -> Any:
    """A component as the model has it, or None."""
    return model.language_model if name == LANGUAGE else dict(model.modality_submodules.items()).get(name)


def groups_of(model: Any, groups: MimoGroups | None = None) -> MimoGroups:
    """The groups given, or those that the model was built with.

    Raises:
        ConfigError: it does not know them.
        LayoutError: this rank has no component.
    """
    found = groups or getattr(model, "mimo_groups", None)
    if found is None:
        raise ConfigError(
            "the model does not know the process groups of its components",
            where=type(model).__name__,
            expected="a MimoModel from MimoProvider.provide, or `groups`",
            got="neither",
            fix="pass groups=make_groups(layouts)",
        )
    if not found.mine:
        raise LayoutError("this rank has no component", where=", ".join(found.layouts), fix="leave no rank idle")
    return found


def cut_over(live: LiveModel, groups: MimoGroups) -> GroupOf:
    """Of a shard, the tensor-parallel group of its component."""
    plan = mimo_plan(live)

    def group_of(shard: Shard) -> Any:
        mine = groups.mine[plan.component_by_entry[shard.entry]]
        return mine.expt_tp if plan.entry(shard.entry).is_expert else mine.tp

    return group_of


def mimo_plan(live: LiveModel) -> MimoPlan:
    """The plan of a model from `open_mimo`."""
    assert isinstance(live.plan, MimoPlan)
    return live.plan


def component_models(live: LiveModel) -> list[tuple[int, LiveModel]]:
    """This rank's components as models of their own: own names, ranks from 0; each with its first rank in the world."""
    plan = mimo_plan(live)
    found: list[tuple[int, LiveModel]] = []
    for name in plan.components_of(live.rank):
        part = plan.components[name]
        shards = [shard for shard in live.shards if plan.component_by_entry[shard.entry] == name]
        owned = tuple(part.own(shard) for shard in shards)
        own = replace(live, plan=part.plan, rank=part.local_rank(live.rank), shards=owned)
        found.append((part.layout.ranks.start, own))
    return found
