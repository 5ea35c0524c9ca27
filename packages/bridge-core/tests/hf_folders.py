"""HF checkpoint folders written with numpy alone: small, quick, and easy to break in a chosen place."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import numpy as np
from simulation import CONFIGS, make_plan

from bridge_core.topology import ParallelLayout

DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64"}


def tensors_of(config: dict, dtype: str = "float32") -> dict[str, np.ndarray]:
    """All tensors of a model; no two elements are equal (in float32)."""
    plan = make_plan(config, ParallelLayout())
    shapes = plan.hf_tensors
    total = sum(map(prod, shapes.values()))
    values = np.random.default_rng(0).permutation(total)
    found, at = {}, 0
    for name, shape in shapes.items():
        found[name] = (values[at : at + prod(shape)].reshape(shape) - total // 2).astype(dtype)
        at += prod(shape)
    return found | {name: found[copy.of] for name, copy in plan.written_copies.items()}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, at = {}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(map(np.ndarray.tobytes, tensors.values())))


def write_hf(folder: Path, name: str = "llama", *, files: int = 1, dtype: str = "float32", **changes) -> Path:
    """A folder of one of `simulation.CONFIGS`, with `files` weight files; a change to None leaves an option out."""
    config = {key: value for key, value in (CONFIGS[name] | changes).items() if changes.get(key, 0) is not None}
    return write_folder(folder, config, tensors_of(config, dtype), files=files)


def write_folder(folder: Path, config: dict, tensors: dict[str, np.ndarray], *, files: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    if files == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    names, weight_map = list(tensors), {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        held = names[number::files]
        write_safetensors(folder / file, {held_name: tensors[held_name] for held_name in held})
        weight_map |= dict.fromkeys(held, file)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def change_json(path: Path, **changes) -> None:
    """Set options of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))
