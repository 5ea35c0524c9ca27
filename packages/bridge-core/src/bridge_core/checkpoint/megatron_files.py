"""The files that make a torch.distributed.checkpoint folder a Megatron-Core one, and the state common to all ranks.

megatron-core 0.16 keeps that state in `common.pt`; 0.19 keeps it as the object `common_state/shard_0_1`, and reads
`common.pt` first where there is one (`load_common_state_dict` in `dist_checkpointing/serialization.py` of 0.19.2).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge_core.checkpoint.dcp import DcpFolder, read_dcp
from bridge_core.checkpoint.items import load_object, save_object
from bridge_core.errors import CheckpointError

CONFIG_FILE = "metadata.json"
COMMON_FILE = "common.pt"
COMMON_STATE_KEY = "common_state/shard_0_1"

# 0.16 knows all four fields and refuses unknown ones; 0.19 knows the first two and ignores the others
# (`CheckpointingConfig` and `maybe_load_config` in `dist_checkpointing/core.py` of 0.16.1 and 0.19.2).
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def megatron_side_files(common: Mapping[str, Any]) -> dict[str, bytes]:
    """Name and content of the files beside `.metadata` and `*.distcp`, readable by megatron-core 0.16 to 0.19.

    Args:
        common: plain values that every rank gets back from `dist_checkpointing.load`, for example
            `{"iteration": 0, "checkpoint_version": 3.0}`.

    Raises:
        CheckpointError: a value is not plain (see `save_object`).
    """
    return {
        COMMON_FILE: save_object(dict(common), where=COMMON_FILE),
        CONFIG_FILE: json.dumps(_CONFIG).encode(),
    }


def extra_state_object() -> bytes:
    """The item of an empty extra state: mcore stores an object as the list of the shards that one rank holds."""
    return save_object([None])


def has_common(folder: DcpFolder) -> bool:
    """Whether there is a common state; what other tools write with torch alone has none."""
    return (folder.path / COMMON_FILE).is_file() or COMMON_STATE_KEY in folder.objects


def read_common(folder: str | os.PathLike[str] | DcpFolder) -> dict[str, Any]:
    """The common state, from wherever it is; objects such as `args` come out as `pickles.Inert`, and nothing runs.

    Args:
        folder: a path, or what `read_dcp` returned for it.

    Raises:
        CheckpointError: there is none, or it is malformed.
    """
    root = folder.path if isinstance(folder, DcpFolder) else Path(folder)
    if (path := root / COMMON_FILE).is_file():
        where, value = path, load_object(path.read_bytes(), where=path)
    else:
        contents = folder if isinstance(folder, DcpFolder) else read_dcp(root)
        if COMMON_STATE_KEY not in contents.objects:
            raise CheckpointError(
                "the checkpoint has no common state", where=root, expected=f"{COMMON_FILE} or {COMMON_STATE_KEY}"
            )
        where = f"{root}, {COMMON_STATE_KEY}"
        shards = load_object(contents.read_object_bytes(COMMON_STATE_KEY), where=where)
        value = shards[0] if isinstance(shards, list) and shards else None
    if not isinstance(value, dict):
        raise CheckpointError("the common state is not a dict", where=where, got=type(value).__name__)
    return value
