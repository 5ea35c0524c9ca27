"""Codecs: formats in which one weight of a checkpoint is stored as several tensors that belong together.

fp8 in blocks is read and written here. Other packages bring codecs that are read, through an entry point in the group
`bridge_core.codecs`: its name is the `quant_method` of config.json, and it gives a `Codecs`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from bridge_core.codecs.codec import Codec, Codecs, Found, Header
from bridge_core.codecs.fp8_blocks import METHOD, OPTION, Fp8Blocks, fp8_blocks_of
from bridge_core.errors import ConfigError

__all__ = ["ENTRY_POINTS", "OPTION", "Codec", "Codecs", "Found", "Fp8Blocks", "Header", "codec_of", "codecs_beside"]

ENTRY_POINTS = "bridge_core.codecs"


@cache
def _third_party() -> dict[str, Codecs]:
    return {point.name: point.load() for point in entry_points(group=ENTRY_POINTS)}


def codec_of(config: Mapping[str, Any], *, where: object = "config.json") -> Codec | None:
    """The codec of the checkpoint that a config.json belongs to; None for plain weights.

    Args:
        config: content of config.json.
        where: what an error names as its place.

    Raises:
        ConfigError: the checkpoint is quantised in a way that is not known here.
    """
    said = config.get(OPTION)
    if said is None:
        return None
    method = _method(said) if isinstance(said, Mapping) else None
    if method == METHOD:
        return fp8_blocks_of(said, where=where)
    if method in _third_party():
        return _third_party()[method](config, where=where)
    raise ConfigError(
        "checkpoints in this quantised form are not converted",
        where=f"{where}: {OPTION}",
        expected=f"no quantisation, or a quant_method of {', '.join([METHOD, *_third_party()])}",
        got=said,
        fix="install bridge-quant-export for modelopt and compressed-tensors; dequantise others first, with the tool "
        "that made them",
    )


def _method(said: Mapping[str, Any]) -> str | None:
    """The `quant_method`; older files of ModelOpt name their producer only (0.31)."""
    producer = said.get("producer")
    return said.get("quant_method") or (producer.get("name") if isinstance(producer, Mapping) else None)


def codecs_beside(names: Collection[str]) -> dict[str, Codecs]:
    """Those of some files beside config.json that say how weights are quantised, each with who reads it."""
    found = {name: codecs for codecs in _third_party().values() for name in codecs.files}
    return {name: codecs for name, codecs in found.items() if name in names}
