"""A Hugging Face checkpoint folder: its configuration, its tensors, and the files beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bridge_core.checkpoint.encoded import present
from bridge_core.checkpoint.safetensors import Stored, read_header
from bridge_core.codecs import OPTION, Codec, codec_of, codecs_beside
from bridge_core.errors import CheckpointError, UnsafeCheckpointError, preview
from bridge_core.geometry import Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"


@dataclass(frozen=True)
class HfFolder:
    """An HF folder whose headers were read and checked; no tensor data was.

    Attributes:
        path: the folder.
        config: content of config.json.
        tensors: where each tensor lies, in the order of files and of bytes within them. A quantised weight is one
            tensor with its scales, in the dtype that it is read in.
        stored: the same as they lie in the files: scales are tensors of their own.
        codec: how quantised weights are stored; None for plain weights.
        beside: tensors of a quantised checkpoint that are no weights and are not read, with the reasons.
        files: weight file to the names of its tensors, in byte order.
        metadata: weight file to its `__metadata__`.
        headers: weight file to the bytes before its tensors.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Stored] = field(repr=False)
    stored: dict[str, Stored] = field(repr=False)
    codec: Codec | None
    beside: dict[str, str] = field(repr=False)
    files: dict[str, list[str]] = field(repr=False)
    metadata: dict[str, dict[str, str]] = field(repr=False)
    headers: dict[str, bytes] = field(repr=False)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @cached_property
    def quantised(self) -> frozenset[str]:
        """Names of the weights that are stored quantised."""
        return frozenset(name for name, tensor in self.tensors.items() if tensor.encoded is not None)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    def other_files(self) -> list[Path]:
        """Every file that is neither a weight file nor their index nor config.json: tokenizer, generation, docs."""
        own = {*self.files, INDEX, CONFIG}
        return sorted(
            file
            for file in self.path.rglob("*")
            if file.is_file()
            and str(file.relative_to(self.path)) not in own
            and not any(part.startswith(".") for part in file.relative_to(self.path).parts)
        )


_AGAIN = "download the checkpoint again, completely"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            "a checkpoint file is missing", where=path, expected=f"a file {path.name}", got="nothing", fix=_AGAIN
        ) from None
    except ValueError as error:
        raise CheckpointError(
            "a file is not valid JSON", where=path, expected="a JSON object", got=error, fix=_AGAIN
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            "a file is not valid JSON", where=path, expected="a JSON object", got=type(value).__name__, fix=_AGAIN
        )
    return value


def read_config(path: Path, *, quantized: bool = False) -> dict[str, Any]:
    """config.json of an HF folder, or the file itself.

    What a file beside it says of how weights are quantised is in `quantization_config`, as newer folders have it.
    `quantized` takes that of any quantised checkpoint; else only those whose weights can be read are taken.

    Raises:
        CheckpointError: there is no such folder, or it has no readable config.json.
        ConfigError: the checkpoint is quantised in a way that is not known.
        BridgeError: a file beside config.json contradicts it.
    """
    if not path.exists():
        raise CheckpointError(
            "no such folder",
            where=path,
            expected=f"a folder with {CONFIG} and safetensors files",
            got="nothing",
            fix="check the path; models are not downloaded",
        )
    file = path / CONFIG if path.is_dir() else path
    config = _completed(read_json(file), file.parent)
    if not quantized:
        codec_of(config, where=path)
    return config


def _completed(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """config.json with a `quantization_config` that a file beside it has, or confirms."""
    # Packages that read codecs are not loaded for folders that have no such file.
    names = {file.name for file in folder.glob("*quant*.json")}
    for name, codecs in (codecs_beside(names) if names else {}).items():
        said = codecs.completed(config.get(OPTION), read_json(folder / name), where=folder)
        config = config if said is None else {**config, OPTION: said}
    return config


def open_hf(path: str | Path, *, quantized: bool = False) -> HfFolder:
    """Read the configuration and all headers of an HF checkpoint folder.

    `quantized` takes any quantised checkpoint, with its tensors as they lie in the files.

    Raises:
        CheckpointError: something is missing, truncated, corrupt or contradictory; names the file.
        UnsafeCheckpointError: the index names a file outside of the folder.
    """
    folder = Path(path)
    config = read_config(folder, quantized=quantized)
    if not folder.is_dir():
        raise CheckpointError(
            "a file was given in place of a folder",
            where=folder,
            expected=f"the folder with {CONFIG} and safetensors files",
            got="a file",
            fix="give the folder that it is in",
        )
    weight_map = _weight_map(folder)
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    tensors: dict[str, Stored] = {}
    files: dict[str, list[str]] = {}
    metadata: dict[str, dict[str, str]] = {}
    headers: dict[str, bytes] = {}
    for name in names:
        found, metadata[name], headers[name] = read_header(folder / name)
        if doubled := [tensor for tensor in found if tensor in tensors]:
            raise CheckpointError(
                "a tensor is in two files",
                where=preview(doubled),
                expected="each tensor once",
                got=f"in {Path(tensors[doubled[0]].path).name} and in {name}",
                fix="remove the file that does not belong to this checkpoint",
            )
        tensors.update(found)
        files[name] = list(found)
    if weight_map is not None:
        _check_index(folder, weight_map, files)
    codec = None if quantized else codec_of(config, where=folder)
    if codec is None and not quantized:
        _check_plain(tensors)
    presented, beside = (tensors, {}) if codec is None else present(tensors, codec, where=folder)
    return HfFolder(folder, config, presented, tensors, codec, beside, files, metadata, headers)


_CODES = frozenset({"F8_E4M3", "F8_E5M2", "I8", "U8", "I16", "I32", "I64", "BOOL"})


def _check_plain(tensors: Mapping[str, Stored]) -> None:
    """Without a `quantization_config`, weights are numbers: codes would be read as if they were."""
    codes = [
        name for name, t in tensors.items() if t.dtype in _CODES and len(t.shape) >= 2 and name.endswith(".weight")
    ]
    if codes:
        raise CheckpointError(
            "weights are stored as codes, and config.json does not say that they are quantised",
            where=preview(codes),
            expected=f"floats, or {OPTION} in config.json",
            got=tensors[codes[0]].dtype,
            fix="download config.json and the files beside it again; bridge-quant-export reads hf_quant_config.json",
        )


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor to file, from the index; None for a folder with one file."""
    single = (folder / SINGLE).exists()
    if not (folder / INDEX).exists():
        if single:
            return None
        raise CheckpointError(
            "the folder holds no safetensors checkpoint",
            where=folder,
            expected=f"{INDEX} or {SINGLE}",
            got=preview(sorted(file.name for file in folder.iterdir())) or "an empty folder",
            fix="convert pickled weights (.bin, .pt) to safetensors first; pickles are not read",
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "the index has no weight_map",
            where=folder / INDEX,
            expected="an object `weight_map`, tensor to file",
            got=f"{weight_map!r:.80}",
            fix=_AGAIN,
        )
    _check_file_names(folder, weight_map)
    if single and SINGLE not in weight_map.values():
        raise CheckpointError(
            "the folder holds two checkpoints",
            where=folder,
            expected=f"either {SINGLE}, or {INDEX} and the files that it names",
            got="both; transformers would read the first, other tools the second",
            fix="remove the one that does not belong here",
        )
    return weight_map


def _check_file_names(folder: Path, weight_map: dict[str, str]) -> None:
    """An index names files, and only inside its folder."""
    if odd := [name for name in weight_map.values() if not isinstance(name, str) or name in ("", ".") or "\0" in name]:
        raise CheckpointError(
            "the index names something that is no file",
            where=folder / INDEX,
            expected="file names",
            got=repr(odd[0]),
            fix="write the index again",
        )
    for name in set(weight_map.values()):
        if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in str(name):
            raise UnsafeCheckpointError(
                "the index names a file outside of the checkpoint's folder",
                where=folder / INDEX,
                expected="file names inside the folder",
                got=name,
                fix="do not use this checkpoint",
            )


def _check_index(folder: Path, weight_map: dict[str, str], files: dict[str, list[str]]) -> None:
    """The index and the files' own headers say the same."""
    actual = {tensor: file for file, tensors in files.items() for tensor in tensors}
    if absent := [name for name in weight_map if name not in actual]:
        raise CheckpointError(
            "the index names tensors that are in no file",
            where=folder / INDEX,
            expected=f"{preview(absent)} in {weight_map[absent[0]]}",
            got="not in that file's header",
            fix=_AGAIN,
        )
    if unlisted := [name for name in actual if name not in weight_map]:
        raise CheckpointError(
            "a file holds tensors that the index does not name",
            where=actual[unlisted[0]],
            expected="every tensor in the index",
            got=preview(unlisted),
            fix="remove files of another checkpoint, or write the index again",
        )
    if moved := [name for name in actual if weight_map[name] != actual[name]]:
        first = moved[0]
        raise CheckpointError(
            "the index names another file for a tensor than the one it is in",
            where=first,
            expected=weight_map[first],
            got=actual[first],
            fix="write the index again",
        )
