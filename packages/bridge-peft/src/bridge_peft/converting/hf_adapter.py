"""An adapter folder as PEFT saves it, matched against the layers of a Megatron model before anything is read.

Tensor names: peft 0.21, utils/save_and_load.py. Experts may be modules with numbers or parameters of one module
(`bridge_peft.converting.layouts`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bridge_core.checkpoint.safetensors import Stored, read_header
from bridge_core.errors import CheckpointError, CoverageError, preview
from bridge_core.patterns import match
from bridge_peft.converting import peft_config
from bridge_peft.converting.bases import Base, Bases
from bridge_peft.converting.fuse import Pair, join
from bridge_peft.converting.layouts import PREFIX, modules_of, parameter_name, same_module, unpacked
from bridge_peft.converting.peft_config import PeftConfig
from bridge_peft.converting.reading import read_stored
from bridge_peft.errors import MissingCheckpointError
from bridge_peft.settings import AdapterSettings

if TYPE_CHECKING:
    from torch import Tensor

FILE = "adapter_model.safetensors"
_FACTOR = re.compile(r"^(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_MAGNITUDE = "lora_magnitude_vector"
_HOLE = re.compile(r"\{(?:layer|expert)\}")

Names = dict[str, str]  # lora_A, lora_B, lora_magnitude_vector -> tensor of the file


@dataclass(frozen=True)
class Source:
    """Where the adapter of one HF weight lies: its module, the tensors by factor, one set for each expert or for all.

    Attributes:
        module: name of the first module, or of the parameter, for its settings.
        tensors: by the expert's number; by None for a plain layer, or for all experts together.
    """

    module: str
    tensors: dict[int | None, Names]


@dataclass(frozen=True)
class HfAdapter:
    """An adapter folder, opened and matched; no factor was read.

    Attributes:
        path: the folder.
        config: what its configuration says.
        stored: its tensors.
        layers: Megatron layers that it adapts, in the order of the family's table, each with the sources of its
            HF weights by their place in `Base.parts`, or under -1 one source for all of them.
    """

    path: Path
    config: PeftConfig
    stored: dict[str, Stored]
    layers: dict[tuple[str, int], tuple[Base, dict[int, Source]]]

    def read(self, name: str, layer: int, *, canonical: bool = False) -> tuple[AdapterSettings, dict[str, Tensor]]:
        """Settings and whole factors of the adapter of one Megatron layer; see `fuse.join`.

        Args:
            name: of the layer, `{layer}` open.
            layer: its number.
            canonical: keep the parts of a fused layer apart.

        Raises:
            CheckpointError: the parts of the layer cannot be one adapter.
        """
        base, sources = self.layers[name, layer]
        found: dict[int, tuple[AdapterSettings, Pair]] = {}
        descriptor = os.open(self.path / FILE, os.O_RDONLY)
        try:
            for number, source in sources.items():
                settings = self.config.settings(source.module)
                if number >= 0:
                    found[number] = settings, self._pair(descriptor, base, source)
                    continue
                names = source.tensors[None]
                values = (read_stored(descriptor, self.stored[names[factor]]) for factor in ("lora_A", "lora_B"))
                found |= {place: (settings, pair) for place, pair in unpacked(base, *values).items()}
        finally:
            os.close(descriptor)
        return join(base, found, where=base.named(layer), canonical=canonical)

    def _pair(self, descriptor: int, base: Base, source: Source) -> Pair:
        def read(expert: int | None, factor: str) -> Tensor:
            return read_stored(descriptor, self.stored[source.tensors[expert][factor]])

        def values(factor: str) -> Tensor:
            if None in source.tensors:
                return read(None, factor)
            each = [read(expert, factor) for expert in range(base.linear.experts)]
            _check_experts(source, factor, each)
            return torch.stack(each)

        magnitude = values(_MAGNITUDE) if _MAGNITUDE in next(iter(source.tensors.values())) else None
        return Pair(values("lora_A"), values("lora_B"), magnitude)


def _check_experts(source: Source, factor: str, each: list[Tensor]) -> None:
    kinds = {(tuple(tensor.shape), str(tensor.dtype)) for tensor in each}
    if len(kinds) > 1:
        raise CheckpointError(
            "the experts of a layer have adapters of different shapes",
            where=f"{source.module}: {factor}",
            expected="one rank and dtype",
            got=preview(sorted(kinds)),
            fix="merge the adapter into the model (bridge-peft merge)",
        )


def open_adapter(path: str | Path, bases: Bases) -> HfAdapter:
    """Open an adapter folder and match it against a model.

    Args:
        path: folder with `adapter_config.json` and `adapter_model.safetensors`.
        bases: the layers of the model.

    Raises:
        MissingCheckpointError: there is no such folder, or a file is missing.
        CheckpointError, ConfigError: it cannot be read, or uses what Megatron adapters do not have.
        CoverageError: it adapts modules that the model does not have, or lacks a half of something.
    """
    folder = Path(path)
    config = peft_config.read(folder)
    if not (folder / FILE).is_file():
        others = sorted(file.name for file in folder.iterdir())
        raise MissingCheckpointError(
            "an adapter has no weights in safetensors",
            where=folder / FILE,
            expected=FILE,
            got=preview(others),
            fix="save it again with PEFT: save_pretrained(..., safe_serialization=True)",
        )
    stored, _, _ = read_header(folder / FILE)
    modules = _by_module(stored, folder / FILE)
    layers = _matched(modules, bases, config, folder)
    order = [
        (base.name, layer)
        for base, layer in bases.in_order(base.named(layer) for (_, layer), (base, _) in layers.items())
    ]
    found = HfAdapter(folder, config, stored, {key: layers[key] for key in order})
    _check_whole(found, modules, bases)
    return found


def _by_module(stored: Iterable[str], where: Path) -> dict[str, Names]:
    modules: dict[str, Names] = {}
    unknown: list[str] = []
    for name in stored:
        found = _FACTOR.match(name)
        if found is None:
            unknown.append(name)
        else:
            modules.setdefault(found[1].removeprefix(PREFIX), {})[found[2]] = name
    if unknown or not modules:
        raise CheckpointError(
            "an adapter holds tensors that are no factors of linear layers" if unknown else "an adapter is empty",
            where=where,
            expected="lora_A, lora_B and lora_magnitude_vector of linear layers",
            got=preview(unknown) or "no tensors",
            fix="merge the adapter into its model with PEFT, and import the model",
        )
    return modules


def _matched(
    modules: dict[str, Names], bases: Bases, config: PeftConfig, where: Path
) -> dict[tuple[str, int], tuple[Base, dict[int, Source]]]:
    patterns: dict[str, list[tuple[str, Base, int]]] = {}
    for base in bases.all.values():
        for number, tensor in enumerate(base.entry.hf):
            if not base.entry.stack_stride(tensor):
                pattern = tensor.name.removesuffix(".weight")
                patterns.setdefault(_HOLE.sub("#", _NUMBER.sub("#", pattern)), []).append((pattern, base, number))
    flat = _flat_modules(bases, config)
    layers: dict[tuple[str, int], tuple[Base, dict[int, Source]]] = {}
    unknown: list[str] = []
    for module, names in modules.items():
        if module in flat:
            base, layer, parameter = flat[module]
            layers.setdefault((base.name, layer), (base, {}))[1][-1] = Source(parameter, {None: names})
            continue
        for pattern, base, number in patterns.get(_NUMBER.sub("#", module), ()):
            at = match(pattern, module)
            if at is not None and at.get("layer", 0) in base.entry.layers:
                sources = layers.setdefault((base.name, at.get("layer", 0)), (base, {}))[1]
                sources.setdefault(number, Source(module, {})).tensors[at.get("expert")] = names
                break
        else:
            unknown.append(module)
    if unknown:
        raise CoverageError(
            "an adapter is for modules that the model does not have",
            where=where,
            expected=f"modules of a {bases.plan.family.name} such as "
            f"{preview((name for name, _ in modules_of(bases.all.values())), limit=3)}",
            got=f"{len(unknown)}: {preview(sorted(unknown))}",
            fix="check that the adapter belongs to this model",
        )
    return layers


def _flat_modules(bases: Bases, config: PeftConfig) -> dict[str, tuple[Base, int, str]]:
    """Modules of experts whose parameters are adapted, by how deep each is nested -> layer, number, parameter."""
    found: dict[str, tuple[Base, int, str]] = {}
    if not config.target_parameters:
        return found
    targeted = PeftConfig(r=1, alpha=1, target_modules=config.target_parameters)
    for members in same_module(bases.all.values()).values():
        for layer in members[0].entry.layers:
            names = [(base, parameter_name(base).replace("{layer}", str(layer))) for base in members]
            adapted = [(base, name) for base, name in names if targeted.targets(name)]
            for depth, (base, name) in enumerate(reversed(adapted)):
                found[name.rpartition(".")[0] + ".base_layer" * depth] = base, layer, name
    return found


def _check_whole(adapter: HfAdapter, modules: dict[str, Names], bases: Bases) -> None:
    """Refuse an adapter that lacks a half: a factor of a pair, an expert, or a module that it says it adapts."""
    wanted = {"lora_A", "lora_B"}
    missing: list[str] = []
    for module, names in modules.items():
        dora = {"lora_magnitude_vector"} if adapter.config.dora else set()
        missing += [f"{module}.{factor}" for factor in sorted((wanted | dora) - names.keys())]
    for base, sources in adapter.layers.values():
        for source in sources.values():
            if base.is_expert and None not in source.tensors:
                lacking = set(range(base.linear.experts)) - {e for e in source.tensors if e is not None}
                missing += [_NUMBER_OF_EXPERT.sub(rf"\g<1>{expert}", source.module) for expert in sorted(lacking)]
    if adapter.config.target_modules is not None and not missing:
        missing = [
            name for name, _ in modules_of(bases.all.values()) if adapter.config.targets(name) and name not in modules
        ]
        if adapter.config.target_parameters:  # then PEFT may have moved targets of experts there
            missing = [name for name in missing if ".experts." not in name]
    if missing:
        raise CoverageError(
            "a half of an adapter is missing",
            where=adapter.path / FILE,
            expected="both factors of every module that adapter_config.json targets, for every expert",
            got=f"{len(missing)} missing: {preview(missing)}",
            fix="copy or save the adapter again, completely",
        )


_NUMBER_OF_EXPERT = re.compile(r"(\.experts\.)\d+")
