"""The components of a multimodal model: which tensors each has, and where they lie in megatron-core's `MimoModel`.

A route sends the Megatron tensors of the model's family that begin with a prefix to a module of `MimoModel`. For
families with towers the routes follow from what the family says of itself; others are registered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

from bridge_core.errors import ConfigError, CoverageError, preview
from bridge_core.families import Family, Fields, Tower, register_family
from bridge_core.patterns import alternatives
from bridge_core.plan import scoped
from bridge_core.topology import PipelineStage
from bridge_mimo.hf_towers import with_hf_towers
from bridge_mimo.layout import LANGUAGE

LANGUAGE_MODULES = ("embedding.", "decoder.", "output_layer.")
"""What the names of a language model begin with (megatron-core 0.19.2, `GPTModel`, `HybridModel`)."""

PREDICTION = "mtp."
"""Multi-token prediction layers: `MimoModel` has no place for them. They are carried."""


@dataclass(frozen=True)
class MIMOComponent:
    """A route: Megatron tensors of the family to a module of `MimoModel`.

    Attributes:
        name: the component; several routes may lead to the modules of one.
        source_prefix: what names of the family's table begin with, ending in a dot; cut off. Empty for the modules of
            the language model.
        target_module_path: the module, without a dot at the end.

    Raises:
        ConfigError: a prefix without a dot at its end, or a path with one.
    """

    name: str
    source_prefix: str
    target_module_path: str

    def __post_init__(self) -> None:
        prefix, path = self.source_prefix, self.target_module_path
        if (prefix and not prefix.endswith(".")) or not path or path.endswith("."):
            raise ConfigError(
                "a route of a component is malformed",
                where=self.name,
                expected='a source prefix that is empty or ends in ".", and a module path that does not',
                got=f"{prefix!r} to {path!r}",
            )

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the names begin with that the route is for."""
        return (self.source_prefix,) if self.source_prefix else LANGUAGE_MODULES

    def takes(self, name: str) -> bool:
        """Whether the route is for a Megatron tensor of the family."""
        return name.startswith(self.prefixes)

    @property
    def module(self) -> str:
        """What its names in `MimoModel` begin with: the module's path and a dot."""
        return f"{self.target_module_path}."

    def target(self, name: str) -> str:
        """Its name in `MimoModel`."""
        return self.module + name.removeprefix(self.source_prefix)


Routes = Sequence[MIMOComponent]


def validate_routes(family: Family, fields: Fields, routes: Routes) -> None:
    """Raise unless every Megatron tensor of a model, but for prediction layers, has exactly one route.

    Raises:
        ConfigError: no route for `language`; two routes overlap, on either side; a route that takes nothing.
        CoverageError: tensors without a route; names them.
    """
    if LANGUAGE not in {route.name for route in routes}:
        raise _misrouted("no route is for language", f"a route called {LANGUAGE}", preview(r.name for r in routes))
    for number, one in enumerate(routes):
        for other in routes[:number]:
            for a, b in ((one.prefixes, other.prefixes), ((one.module,), (other.module,))):
                if shared := [(x, y) for x in a for y in b if x.startswith(y) or y.startswith(x)]:
                    what = f"the routes of {other.name} and {one.name} overlap"
                    raise _misrouted(what, "different tensors and modules", "{1!r} and {0!r}".format(*shared[0]))
    names = [name for name in family.table(fields) if not name.startswith(PREDICTION)]
    if unrouted := [name for name in names if not any(route.takes(name) for route in routes)]:
        raise CoverageError(
            f"{len(unrouted)} row(s) of the {family.name} table have no route to a component",
            where=preview(unrouted),
            expected="names that begin with " + ", ".join(p for r in routes for p in r.prefixes),
            got=unrouted[0],
            fix="register a route for them (register_mimo_conversion_spec)",
        )
    if idle := [route for route in routes if not any(route.takes(name) for name in names)]:
        raise _misrouted(
            f"the route of {idle[0].name} takes no tensor of a {family.name} model",
            f"a prefix of {preview(names)}",
            idle[0].source_prefix,
        )


def _misrouted(what: str, expected: str, got: str) -> ConfigError:
    return ConfigError(what, where="components", expected=expected, got=got, fix="correct the routes")


# --- Which routes a family has --------------------------------------------------------------------

Builder = Callable[[Family, Fields], Iterable[MIMOComponent]]
_BUILDERS: dict[str, Builder] = {}


def register_mimo_conversion_spec(family: Family) -> Callable[[Builder], Builder]:
    """Decorator of a function that gives the routes of a family's models where they do not follow from its towers.

    The function gets the family and the Megatron fields of a model. The family is made known to bridge-core as well;
    its `towers` say how each component but `language` is configured and placed on pipeline stages.
    """

    def register(builder: Builder) -> Builder:
        register_family(family)
        _BUILDERS[family.name] = builder
        return builder

    return register


def routes_of(family: Family, fields: Fields) -> tuple[MIMOComponent, ...]:
    """The routes of a model: those registered for its family, or those that follow from the family's towers.

    Raises:
        ConfigError: the family has no towers and nothing is registered; or the routes are wrong.
        CoverageError: a tensor has no route.
    """
    builder = _BUILDERS.get(family.name, _from_towers)
    routes = tuple(builder(family, fields))
    validate_routes(family, fields, routes)
    return routes


def has_components(family: Family) -> bool:
    """Whether the components of a family's models are known."""
    return bool(family.towers) or family.name in _BUILDERS


def _from_towers(family: Family, fields: Fields) -> list[MIMOComponent]:
    if not family.towers:
        raise ConfigError(
            f"it is not known which components a {family.name} model has",
            where=f"family {family.name}",
            expected="a family with towers, or registered routes",
            got="neither",
            fix="convert a plain language model with bridge-core; register the components of others "
            "(register_mimo_conversion_spec)",
        )
    return [
        MIMOComponent(LANGUAGE, "", "language_model"),
        *(
            MIMOComponent(name, tower.prefix, f"modality_submodules.{name}.encoders.{tower.key}")
            for name, tower in family.towers.items()
        ),
    ]


# --- A model's components -------------------------------------------------------------------------


class Component(NamedTuple):
    """A component as a model of its own, for core's plans.

    Attributes:
        name: as layouts name it.
        routes: where its tensors lie in `MimoModel`.
        family: the part of the model's family that is its; names are those of a model of its own: the layers of a
            tower are `decoder.layers`.
        fields: Megatron fields of its own stack of layers.
        targets: name in `MimoModel` of every row by its own name, both with holes.
        moves: how such a name becomes the other: characters to cut off its beginning, and what comes there.
    """

    name: str
    routes: Routes
    family: Family
    fields: Fields
    targets: dict[str, str]
    moves: dict[str, tuple[int, str]]

    def target(self, row: str, name: str) -> str:
        """The name in `MimoModel` of a tensor that is an instance of one of its own rows."""
        cut, head = self.moves[row]
        return head + name[cut:]

    @property
    def prefix(self) -> str:
        """What its names in `MimoModel` begin with: those of its first route's module."""
        return self.routes[0].module


@dataclass(frozen=True)
class Components:
    """All components of one model.

    Attributes:
        family, fields: of the whole model, as bridge-core has it.
        routes: where its tensors lie in `MimoModel`.
        hf_towers: components whose towers are HF's own, whole on every rank.
    """

    family: Family
    fields: Fields
    routes: tuple[MIMOComponent, ...]
    hf_towers: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        family: Family,
        fields: Fields,
        routes: tuple[MIMOComponent, ...] | None = None,
        *,
        hf_towers: Sequence[str] = (),
    ) -> Components:
        """The components of a model, by its own routes or those given; see `routes_of` for the errors."""
        family = with_hf_towers(family, fields, hf_towers)
        if routes is None:
            routes = routes_of(family, fields)
        else:
            validate_routes(family, fields, routes)
        return cls(family, fields, routes, tuple(hf_towers))

    @property
    def names(self) -> tuple[str, ...]:
        """The components' names, each once."""
        return tuple(dict.fromkeys(route.name for route in self.routes))

    def target(self, name: str) -> str | None:
        """The name of a tensor in `MimoModel`; None for what is carried."""
        return next((route.target(name) for route in self.routes if route.takes(name)), None)

    @cached_property
    def mapped(self) -> Family:
        """The family under the names of `MimoModel`, without prediction layers."""
        reason = "carried: MimoModel has no prediction layers"
        return scoped(self.family, self.fields, self.target, reason=reason, holds=_everywhere)

    @cached_property
    def whole(self) -> Family:
        """The family under the names of a checkpoint: as `mapped`, and prediction layers below the language model."""
        language = next(route.module for route in self.routes if route.name == LANGUAGE)

        def name_of(name: str) -> str | None:
            return language + name if name.startswith(PREDICTION) else self.target(name)

        return scoped(self.family, self.fields, name_of, reason="", holds=_everywhere)

    @property
    def carried(self) -> tuple[str, ...]:
        """HF names (holes open) of what a checkpoint carries along."""
        rows = [rule for name, rule in self.family.table(self.fields).items() if name.startswith(PREDICTION)]
        return tuple(name for rule in rows for name in alternatives(rule.hf))

    @cached_property
    def parts(self) -> dict[str, Component]:
        """Every component by its name."""
        return {name: self._part(name) for name in self.names}

    def _part(self, name: str) -> Component:
        routes = tuple(route for route in self.routes if route.name == name)
        tower = self._tower(name)
        prefix = tower.prefix if tower else ""

        def own(row: str) -> str | None:
            return row.removeprefix(prefix) if any(route.takes(row) for route in routes) else None

        moves: dict[str, tuple[int, str]] = {}
        for row in self.family.table(self.fields):
            for route in (route for route in routes if route.takes(row)):
                alone, rest = row.removeprefix(prefix), row.removeprefix(route.source_prefix)
                moves[alone] = len(alone) - len(rest), route.module
        targets = {row: head + row[cut:] for row, (cut, head) in moves.items()}
        holds = partial(_tower_holds, tower, self.fields) if tower else None
        family = scoped(self.family, self.fields, own, reason="of another component", holds=holds)
        return Component(name, routes, family, self._fields(tower), targets, moves)

    def _fields(self, tower: Tower | None) -> Fields:
        if tower is None:
            return {**self.fields, "mtp_num_layers": None}
        alone = {"vocab_size": 0, "share_embeddings_and_output_weights": False}
        return {**alone, **tower.fields(self.fields)}

    def _tower(self, name: str) -> Tower | None:
        if name == LANGUAGE or name in self.family.towers:
            return self.family.towers.get(name)
        raise ConfigError(
            f"the {self.family.name} family has no tower {name}",
            where=f"component {name}",
            expected=f"one of {', '.join(self.family.towers) or 'none'}",
            got=name,
            fix="give the family a tower of that name, or correct the route",
        )


def _everywhere(name: str, stage: PipelineStage) -> bool:
    return True


def _tower_holds(tower: Tower, fields: Fields, name: str, stage: PipelineStage) -> bool:
    return tower.holds(name, stage, fields)
