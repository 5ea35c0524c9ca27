"""A quantised checkpoint folder from its configuration and headers; no tensor is read, no torch is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bridge_core.checkpoint.hf_folder import HfFolder, open_hf
from bridge_core.dtypes import dtype_of
from bridge_core.errors import ConfigError
from bridge_core.geometry import Shape
from bridge_quant_export.configs.layers import QuantizedLayers
from bridge_quant_export.configs.reading import LINEAR, Claims, is_pattern, read_claims
from bridge_quant_export.errors import FormatError
from bridge_quant_export.formats.format import Format, TensorSpec, Writer
from bridge_quant_export.formats.kv_cache import kv_tensor

_SCALES = ("weight_scale", "weight_scale_2", "weight_packed", "weight_global_scale", "input_scale", "pre_quant_scale")


@dataclass(frozen=True)
class QuantizedFolder:
    """What a folder holds, and what is wrong with it.

    Attributes:
        folder: its headers.
        claims: what its configuration says.
        layers: what its tensors and its configuration say together.
        shapes: of the weights of quantised layers, by module, as they were before.
        kv_scales: names of the KV scales.
        wrong: how configuration, tensors and what readers require contradict each other; empty if they do not.
    """

    folder: HfFolder
    claims: Claims
    layers: QuantizedLayers
    shapes: Mapping[str, Shape]
    kv_scales: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def writer(self) -> Writer:
        """The checkpoint format."""
        return self.claims.writer

    def stored_of(self, module: str) -> list[TensorSpec]:
        """The tensors that a quantised module should have."""
        return list(self.layers.quantized[module].tensors(self.writer, self.shapes[module], self.dtype))

    @property
    def dtype(self) -> str:
        """The model's dtype, by its safetensors name."""
        config = self.folder.config
        return dtype_of(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")).name


def open_quantized(path: str | Path) -> QuantizedFolder:
    """Read what a quantised checkpoint folder says of itself.

    Raises:
        ConfigError: it is not quantised.
        FormatError: it is, but in a way that is not known here.
        CheckpointError: a file is missing, truncated or corrupt.
    """
    folder = open_hf(path, quantized=True)
    config = folder.config.get("quantization_config")
    if config is None:
        raise ConfigError(
            "the checkpoint is not quantised",
            where=folder.path / "config.json",
            expected="quantization_config",
            fix="give the folder of a quantised checkpoint; bridge-core describes others",
        )
    return _described(folder, read_claims(config))


def _described(folder: HfFolder, claims: Claims) -> QuantizedFolder:
    modules: dict[str, set[str]] = {}
    for name in folder.tensors:
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, set()).add(suffix)
    quantized: dict[str, Format] = {}
    unquantized, wrong = set(), []
    shapes: dict[str, Shape] = {}
    for module, suffixes in modules.items():
        if not suffixes & {*_SCALES}:
            stored = folder.tensors.get(f"{module}.weight")
            if stored is not None and len(stored.shape) == 2:
                unquantized.add(module)
                if claims.format_of(module) is not None:
                    wrong.append(f"{module} has no scales, but the configuration says that it is quantised")
            continue
        format = claims.format_of(module)
        if format is None:
            wrong.append(f"{module} has scales, but the configuration says that it is not quantised")
            continue
        quantized[module] = format
    kv = tuple(name for name in folder.tensors if name.endswith((".k_scale", ".v_scale")))
    wrong += [
        f"{name} promised by the configuration has no tensor" for name in claims.formats if _absent(name, modules)
    ]
    layers = QuantizedLayers(
        quantized=quantized,
        unquantized=frozenset(unquantized | {e for e in claims.excluded if not is_pattern(e)} - quantized.keys()),
        fp8_kv_cache=bool(kv),
    )
    found = QuantizedFolder(folder, claims, layers, shapes, kv, ())
    wrong += _check_tensors(found, modules, shapes) + _check_kv(found)
    return QuantizedFolder(folder, claims, layers, shapes, kv, tuple(wrong))


def _absent(name: str, modules: Mapping[str, set[str]]) -> bool:
    if name == LINEAR or is_pattern(name) or name in modules:
        return False
    return not any(module.startswith(f"{name}.") for module in modules)


def _check_tensors(found: QuantizedFolder, modules: Mapping[str, set[str]], shapes: dict[str, Shape]) -> list[str]:
    """Notes the shape of every weight; how tensors differ from what the format has."""
    wrong = []
    for module, format in found.layers.quantized.items():
        stored = format.stored(found.writer)
        codes = next(tensor for tensor in stored if tensor.part == "codes")
        held = found.folder.tensors.get(f"{module}.{codes.suffix}")
        if held is None or len(held.shape) != len(codes.axes):
            wrong.append(f"{module} has no {codes.suffix} of {format.title}")
            continue
        shapes[module] = tuple(axis.per * size for axis, size in zip(codes.axes, held.shape, strict=True))
        try:
            specs = {spec.suffix: spec for spec in found.stored_of(module)}
        except FormatError as error:
            wrong.append(f"{module}: {error.what}")
            continue
        for suffix, spec in specs.items():
            tensor = found.folder.tensors.get(f"{module}.{suffix}")
            if tensor is None:
                wrong.append(f"{module}.{suffix} is missing")
            elif (tensor.dtype, tensor.shape) != (spec.dtype, spec.shape):
                wrong.append(
                    f"{module}.{suffix} is {tensor.dtype} {list(tensor.shape)}, not {spec.dtype} {list(spec.shape)}"
                )
        extra = modules[module] - specs.keys() - {"bias", "k_scale", "v_scale"}
        wrong += [f"{module}.{suffix} is not of {format.title}" for suffix in sorted(extra)]
    return wrong


def _check_kv(found: QuantizedFolder) -> list[str]:
    if bool(found.kv_scales) != found.claims.fp8_kv_cache:
        said = "promises" if found.claims.fp8_kv_cache else "does not mention"
        return [f"the configuration {said} an FP8 KV cache, and there are {len(found.kv_scales)} KV scales"]
    ends = tuple(kv_tensor("k" if which == "k" else "v", found.writer).suffix for which in ("k", "v"))
    return [f"{name} is no KV scale of {found.writer}" for name in found.kv_scales if not name.endswith(ends)]
