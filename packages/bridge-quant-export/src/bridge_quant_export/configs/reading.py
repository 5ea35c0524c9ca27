"""The formats that a `quantization_config` (or `hf_quant_config.json`) names: the way back of the two composers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from typing import Any

from bridge_quant_export.configs import compressed_tensors, modelopt
from bridge_quant_export.configs.layers import fused_name
from bridge_quant_export.errors import FormatError
from bridge_quant_export.formats import format_of
from bridge_quant_export.formats.format import Format, Writer

# Matrices that are no linear layers; published folders do not always exclude them.
_NOT_LINEAR = frozenset({"embed_tokens", "embeddings", "gate"})


@dataclass(frozen=True)
class Claims:
    """What a configuration says of a checkpoint.

    Attributes:
        writer: the checkpoint format.
        formats: by module, by the parent of modules (`mlp.experts`), or by a pattern; under `Linear` that of all linear
            layers that are not excluded.
        excluded: names, or patterns, of modules that are not quantised.
        fp8_kv_cache: whether it promises KV scales.
    """

    writer: Writer
    formats: Mapping[str, Format]
    excluded: frozenset[str]
    fp8_kv_cache: bool

    def format_of(self, module: str) -> Format | None:
        """The format of a linear layer; None for one that is not quantised.

        Its own name goes first, then what is excluded, then the names of its parents, patterns, and all linear layers
        (compressed-tensors 0.20, utils/match.py, has the same order of names, patterns and classes).
        """
        if module in self.formats:
            return self.formats[module]
        if self.excludes(module) or module.rpartition(".")[2] in _NOT_LINEAR:
            return None
        parent = module
        while parent := parent.rpartition(".")[0]:
            if parent in self.formats:
                return self.formats[parent]
        for pattern, format in self._by_pattern:
            if pattern.match(module):
                return format
        return self.formats.get(LINEAR)

    def excludes(self, module: str) -> bool:
        """Whether a module, or the layer that engines fuse it into, is excluded."""
        names = {module, fused_name(module)}
        return not names.isdisjoint(self.excluded) or any(
            pattern.match(name) for pattern in self._excluding for name in names
        )

    @cached_property
    def _excluding(self) -> list[re.Pattern[str]]:
        return [_pattern(entry) for entry in sorted(self.excluded) if is_pattern(entry)]

    @cached_property
    def _by_pattern(self) -> list[tuple[re.Pattern[str], Format]]:
        return [(_pattern(target), format) for target, format in self.formats.items() if is_pattern(target)]


LINEAR = "Linear"


def is_pattern(entry: str) -> bool:
    """Whether an entry of a configuration may be many modules: a pattern as in a shell, or `re:` and an expression."""
    return entry.startswith("re:") or any(mark in entry for mark in "*?[")


def _pattern(entry: str) -> re.Pattern[str]:
    return re.compile(entry.removeprefix("re:") if entry.startswith("re:") else translate(entry))


def completed(said: Mapping[str, Any] | None, beside: Mapping[str, Any], *, where: object) -> dict[str, Any] | None:
    """`quantization_config` of a folder with hf_quant_config.json, which many published folders have alone.

    Args:
        said: config.json's own, or None.
        beside: content of hf_quant_config.json.
        where: the folder.

    Returns:
        config.json's own with its method; without one, the same facts from the file beside it; None if that says
        that nothing is quantised.

    Raises:
        FormatError: the two contradict each other, or a format is not known.
    """
    quantization = beside.get("quantization")
    if not isinstance(quantization, Mapping):
        raise FormatError(
            "hf_quant_config.json does not say how weights are quantised",
            where=where,
            expected="an object `quantization`",
            got=f"{quantization!r:.80}",
            fix="download the file again, or remove it if the weights are not quantised",
        )
    if said is None:
        if not quantization.get("quant_algo") and not quantization.get("quantized_layers"):
            return None
        made = {**quantization, "producer": beside.get("producer") or {"name": "modelopt"}, "quant_method": "modelopt"}
        read_claims(made, where=where)
        return made
    read_claims(said, beside, where=where)
    return {**said, "quant_method": "modelopt"}


def read_claims(
    config: Mapping[str, Any],
    beside: Mapping[str, Any] | None = None,
    *,
    weights_only: bool = False,
    where: object = None,
) -> Claims:
    """The claims of a `quantization_config`, and of `hf_quant_config.json` where there is one.

    With `weights_only`, formats are told by their weights: how inputs are quantised is of no account.

    Raises:
        FormatError: a method, an algorithm or a scheme that no format here stores; or the two files disagree.
    """
    method = config.get("quant_method") or (config.get("producer") or {}).get("name")
    if beside is not None and method != "modelopt":
        raise FormatError(
            "config.json and hf_quant_config.json name different methods",
            where=where or modelopt.HF_QUANT_CONFIG,
            expected="modelopt, of which hf_quant_config.json is a file",
            got=method,
            fix="remove the file that does not belong to these weights",
        )
    if method == "compressed-tensors":
        return _of_compressed_tensors(config, weights_only)
    if method == "modelopt":
        found = _of_modelopt(config, config)
        if beside is not None:
            _check_agree(found, _of_modelopt(beside.get("quantization", {}), config), where)
        return found
    raise FormatError(
        "the checkpoint is quantised in a way that is not known here",
        where="quantization_config, quant_method",
        expected="modelopt or compressed-tensors",
        got=method,
    )


def _check_agree(found: Claims, other: Claims, where: object) -> None:
    """Weights are read alike by both files. Of the KV cache one may be silent: published folders are."""
    if (found.formats, found.excluded) == (other.formats, other.excluded):
        return
    differing = sorted(
        {
            name
            for name in found.formats.keys() | other.formats.keys()
            if found.formats.get(name) is not other.formats.get(name)
        }
        | (found.excluded ^ other.excluded)
    )
    raise FormatError(
        "config.json and hf_quant_config.json say different things",
        where=where or modelopt.HF_QUANT_CONFIG,
        expected="the same formats, and the same modules excluded",
        got=f"{len(differing)} module(s) or patterns that only one of them has, first: {differing[0]}",
        fix="write the checkpoint again, or remove the file that does not belong to these weights",
    )


def _of_modelopt(said: Mapping[str, Any], config: Mapping[str, Any]) -> Claims:
    layers = said.get("quantized_layers")
    if layers:
        formats = {name: _algorithm(entry) for name, entry in layers.items()}
    else:
        groups = config.get("config_groups") or {}
        sizes = [g.get("weights", {}).get("group_size") for g in groups.values()]
        formats = {LINEAR: _algorithm({"group_size": next(iter(sizes), None), **said})}
    scheme = said.get("kv_cache_scheme")
    kv = said.get("kv_cache_quant_algo") == "FP8" or isinstance(scheme, Mapping) or scheme == "FP8"
    return Claims("modelopt", formats, frozenset(said.get("ignore") or said.get("exclude_modules") or ()), kv)


def _algorithm(entry: Mapping[str, Any]) -> Format:
    said = str(entry.get("quant_algo"))
    name = next((name for name, word in modelopt.ALGORITHMS.items() if word.lower() == said.lower()), None)
    if name is None:
        raise FormatError(
            "no format here has this algorithm",
            where="quant_algo",
            expected=", ".join(modelopt.ALGORITHMS.values()),
            got=said,
        )
    return format_of(name, entry.get("group_size") if name in ("int4_awq", "w4a8_awq") else None)


def _of_compressed_tensors(config: Mapping[str, Any], weights_only: bool) -> Claims:
    formats: dict[str, Format] = {}
    for number, group in (config.get("config_groups") or {}).items():
        format = _scheme(group, config.get("format"), number, weights_only)
        formats |= dict.fromkeys(group.get("targets") or (), format)
    return Claims(
        "compressed-tensors", formats, frozenset(config.get("ignore") or ()), bool(config.get("kv_cache_scheme"))
    )


_COMPARED = ("num_bits", "type", "strategy", "dynamic", "block_structure", "symmetric")


def _scheme(group: Mapping[str, Any], stored: Any, number: str, weights_only: bool) -> Format:
    def essence(args: Any) -> Any:
        said = args and {key: args[key] for key in _COMPARED if args.get(key) is not None}
        return said and {"symmetric": True, "dynamic": False, **said}  # what its QuantizationArgs have by default

    stored = group.get("format") or stored
    operands = [essence(group.get(which)) for which in ("weights", "input_activations")]
    for name, scheme in compressed_tensors.SCHEMES.items():
        described = [essence(scheme.weights), operands[1] if weights_only else essence(scheme.input_activations)]
        if scheme.format == stored and described == operands:
            return format_of(name, group["weights"].get("group_size") if name == "int4" else None)
    raise FormatError(
        "no format here has this scheme",
        where=f"config_groups, {number}",
        expected=", ".join(compressed_tensors.SCHEMES),
        got={"format": stored, "weights": operands[0], "input_activations": operands[1]},
    )
