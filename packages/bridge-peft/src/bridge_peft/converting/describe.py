"""What an adapter folder of either kind holds, told from headers and tables of contents; no model is needed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bridge_core.checkpoint.dcp import read_dcp
from bridge_core.checkpoint.megatron_folder import NOT_WEIGHTS, find_iteration
from bridge_core.checkpoint.run_config import RUN_CONFIG, read_run_config
from bridge_core.checkpoint.safetensors import read_header
from bridge_peft.converting import peft_config
from bridge_peft.errors import MissingCheckpointError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def describe(path: str | Path) -> dict[str, Any]:
    """What an adapter folder holds, as JSON values: its kind, its settings, and its tensors by kind of name.

    Raises:
        MissingCheckpointError: there is no such folder.
        CheckpointError, ConfigError: it is neither kind of folder, or cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise MissingCheckpointError("no such folder", where=folder, expected="an adapter", got="nothing")
    if (folder / peft_config.CONFIG).is_file():
        config = peft_config.read(folder)
        stored, _, _ = read_header(folder / "adapter_model.safetensors")
        tensors = [(name, tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in stored.items()]
        said: dict[str, Any] = {"format": "hf", "base": config.base_model, "r": config.r, "alpha": config.alpha}
        return said | {"rslora": config.rslora, "dora": config.dora} | _tensors(tensors)
    folder = find_iteration(folder)
    found = read_dcp(folder).tensors.items()
    adapters = [(key, t) for key, t in found if ".adapter." in key and not key.startswith(NOT_WEIGHTS)]
    said = {"format": "megatron", "folder": str(folder)}
    if (folder / RUN_CONFIG).is_file():
        section = read_run_config(folder / RUN_CONFIG).get("peft")
        if isinstance(section, dict):
            said |= {"kind": section.get("_target_"), "r": section.get("dim"), "alpha": section.get("alpha")}
    return said | _tensors([(key, t.dtype, t.shape, t.nbytes) for key, t in adapters])


def _tensors(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {}
    count = total = 0
    for name, dtype, shape, nbytes in tensors:
        count, total = count + 1, total + nbytes
        kind = kinds.setdefault(_NUMBER.sub("*", name), {"count": 0, "dtype": dtype, "shape": list(shape)})
        kind["count"] += 1
    return {"tensors": count, "nbytes": total, "kinds": kinds}
