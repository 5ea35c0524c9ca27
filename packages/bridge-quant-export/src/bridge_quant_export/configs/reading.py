"""The formats that a `quantization_config` (or `hf_quant_config.json`) names: the way back of the two composers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bridge_quant_export.configs import compressed_tensors, modelopt
from bridge_quant_export.errors import FormatError
from bridge_quant_export.formats import format_of
from bridge_quant_export.formats.format import Format, Writer


class Claims(NamedTuple):
    """What a configuration says of a checkpoint.

    Attributes:
        writer: the checkpoint format.
        formats: by module; under `Linear` that of all linear layers that are not excluded.
        excluded: names, or patterns, of modules that are not quantised.
        fp8_kv_cache: whether it promises KV scales.
    """

    writer: Writer
    formats: Mapping[str, Format]
    excluded: frozenset[str]
    fp8_kv_cache: bool


LINEAR = "Linear"


def read_claims(
    config: Mapping[str, Any], beside: Mapping[str, Any] | None = None, *, weights_only: bool = False
) -> Claims:
    """The claims of a `quantization_config`, and of `hf_quant_config.json` where there is one.

    With `weights_only`, formats are told by their weights: how inputs are quantised is of no account.

    Raises:
        FormatError: a method, an algorithm or a scheme that no format here stores; or the two files disagree.
    """
    method = config.get("quant_method")
    if method == "compressed-tensors":
        return _of_compressed_tensors(config, weights_only)
    if method == "modelopt":
        found = _of_modelopt(config, config)
        if beside is not None and (other := _of_modelopt(beside.get("quantization", {}), config)) != found:
            raise FormatError(
                "config.json and hf_quant_config.json say different things",
                where=modelopt.HF_QUANT_CONFIG,
                expected=found,
                got=other,
                fix="write the checkpoint again",
            )
        return found
    raise FormatError(
        "the checkpoint is quantised in a way that is not known here",
        where="quantization_config, quant_method",
        expected="modelopt or compressed-tensors",
        got=method,
    )


def _of_modelopt(said: Mapping[str, Any], config: Mapping[str, Any]) -> Claims:
    layers = said.get("quantized_layers")
    if layers:
        formats = {name: _algorithm(entry) for name, entry in layers.items()}
    else:
        groups = config.get("config_groups") or {}
        sizes = [g.get("weights", {}).get("group_size") for g in groups.values()]
        formats = {LINEAR: _algorithm({"group_size": next(iter(sizes), None), **said})}
    kv = said.get("kv_cache_quant_algo") == "FP8" or isinstance(said.get("kv_cache_scheme"), Mapping)
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
        return args and {key: args.get(key) for key in _COMPARED if args.get(key) is not None}

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
