"""What is written once in an HF folder: headers of the weight files, index, config.json, files carried along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge_core.checkpoint.files import create_file
from bridge_core.checkpoint.hf_folder import CONFIG, INDEX, SINGLE, HfFolder
from bridge_core.checkpoint.hf_layout import HfLayout
from bridge_core.codecs import OPTION, Codec, Fp8Blocks
from bridge_core.dtypes import dtype_of
from bridge_core.errors import UnsafeCheckpointError

# Weights in other formats are not carried along; everything else beside the weights is.
_OTHER_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".nemo"),
    *(".distcp", ".index.json"),
)


def create_weight_files(folder: Path, layout: HfLayout) -> None:
    """Make the weight files at their full size, with their headers; their tensors are holes."""
    for file in layout.files:
        create_file(folder / file.name, file.nbytes, file.header)


def finish_hf_folder(
    folder: Path,
    layout: HfLayout,
    config: Mapping[str, Any],
    *,
    codec: Codec | None = None,
    like: HfFolder | None = None,
    dtype: str | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write what makes weight files a checkpoint: the index, if there is more than one, and config.json.

    The last four are as for `written_config`.
    """
    if [file.name for file in layout.files] != [SINGLE]:
        (folder / INDEX).write_text(layout.index(), encoding="utf-8")
    written = written_config(config, layout, codec, like, dtype=dtype, quantization=quantization)
    (folder / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def written_config(
    config: Mapping[str, Any],
    layout: HfLayout,
    codec: Codec | None = None,
    like: HfFolder | None = None,
    *,
    dtype: str | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """config.json as it goes with the files written: the same, but for the dtype and the quantisation.

    Args:
        config: of the model.
        layout: the files.
        codec: how they store quantised weights; None for plain weights.
        like: the folder whose choice of quantised weights they follow, if it is quantised.
        dtype: of the model, where most elements of the files are packed and have another.
        quantization: `quantization_config` of files that hold what no codec describes.
    """
    config = {name: value for name, value in config.items() if name != OPTION}
    if isinstance(codec, Fp8Blocks):
        said = like.config[OPTION] if like is not None and like.codec == codec else codec.to_hf()
        config[OPTION] = {name: value for name, value in said.items() if name != "scale_fmt"}  # ours are plain float32
    if quantization is not None:
        config[OPTION] = dict(quantization)
    written = dtype_of(dtype or layout.main_dtype()).torch
    if "torch_dtype" in config:
        config["torch_dtype"] = written
    if "dtype" in config or "torch_dtype" not in config:
        config["dtype"] = written
    return config


def carried_files(folder: HfFolder) -> list[Path]:
    """The files of an HF folder that go along with its weights: tokenizer, generation settings, notes.

    What says how they are quantised stays: weights are written in another form, or that is said anew.

    Raises:
        UnsafeCheckpointError: one of them is a link that leaves the folder.
    """
    left = folder.codec.files if folder.codec is not None else frozenset()
    return _checked([file for file in folder.other_files() if file.name not in left], folder.path)


def stored_assets(base: Path) -> list[Path]:
    """The files that an import, or another tool, left below `base` for the HF folders to come.

    Raises:
        UnsafeCheckpointError: one of them is a link that leaves the folder.
    """
    return _checked(sorted(file for file in base.rglob("*") if file.is_file() and file != base / CONFIG), base)


def _checked(files: Iterable[Path], base: Path) -> list[Path]:
    return [_inside(file, base) for file in files if not file.name.endswith(_OTHER_WEIGHTS)]


def _inside(file: Path, base: Path) -> Path:
    """`file`, unless it is a link out of its folder (but for the hub cache's, whose files all are links)."""
    real, root = file.resolve(), base.resolve()
    cache = root.parent.parent / "blobs"
    if root not in real.parents and cache not in real.parents:
        raise UnsafeCheckpointError(
            "a file beside the weights is a link that leaves the folder",
            where=file,
            expected=f"files inside {base}",
            got=real,
            fix="replace the link by the file itself, or remove it",
        )
    return file


def copy_files(base: Path, files: Sequence[Path], target: Path) -> None:
    """Copy files to the same places below another folder."""
    for file in files:
        to = target / file.relative_to(base)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to)
