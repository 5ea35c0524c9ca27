"""What a checkpoint folder holds, HF or Megatron, told from its headers alone."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bridge_core.checkpoint.dcp import read_dcp
from bridge_core.checkpoint.hf_folder import CONFIG, INDEX, SINGLE, open_hf
from bridge_core.checkpoint.matching import without_aliases
from bridge_core.checkpoint.megatron_files import COMMON_STATE_KEY
from bridge_core.checkpoint.megatron_folder import (
    LATEST,
    METADATA,
    NOT_WEIGHTS,
    find_iteration,
    forms_of,
    open_megatron,
)
from bridge_core.dtypes import dtype_of
from bridge_core.errors import CheckpointError, ConfigError, preview
from bridge_core.families import family_for
from bridge_core.geometry import Shape
from bridge_core.plan import compile_entries

Kind = Literal["hf", "megatron"]

# The number of a layer or an expert: a dotted part of its own, or the end of a grouped expert's `weight3`.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=\.weight)\d+$|(?<=\.bias)\d+$")


class Pattern(NamedTuple):
    """Tensors that differ only in the numbers of their names.

    Attributes:
        name: the common name; `{0-3}` stands for the numbers at that place, as ranges.
        tensors: how many there are.
        dtype: safetensors name.
        shape: of one of them.
        nbytes: of all of them.
    """

    name: str
    tensors: int
    dtype: str
    shape: Shape
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a checkpoint folder holds.

    Attributes:
        path: the folder that was read; of a Megatron run, that of one iteration.
        kind: `hf` or `megatron`.
        family: name of the model family; None where no family handles the model.
        form: how weights are laid out: `sharded` or `single file`; for Megatron the form of its layers and
            experts (`stacked`, `per layer`, `singleton`), None where that cannot be told without a family.
        parameters: elements of all weights; on the Megatron side with the padding of the vocabulary. Scales of
            quantised weights are no parameters.
        nbytes: bytes of all weights.
        dtypes: safetensors dtype to the number of elements that have it.
        files: weight file to its size in bytes.
        tensors: the weights, folded.
        training_state: tensors and objects beside the weights (optimizer and the like), by the first part
            of their name, with their number.
        note: why something above could not be told, or None.
        quantised: how quantised weights are stored, or None.
    """

    path: Path
    kind: Kind
    family: str | None
    form: str | None
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    files: dict[str, int]
    tensors: tuple[Pattern, ...]
    training_state: dict[str, int]
    note: str | None
    quantised: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The description as JSON values."""
        patterns = [pattern._asdict() for pattern in self.tensors]
        return asdict(self) | {"path": str(self.path), "tensors": patterns}


def kind_of(path: Path) -> Kind:
    """Whether a folder is an HF or a Megatron checkpoint, by the files that make it one.

    Raises:
        CheckpointError: there is no such folder, or it is neither.
    """
    if not path.is_dir():
        raise CheckpointError(
            "no such folder",
            where=path,
            expected="an HF or a Megatron checkpoint folder",
            got="a file" if path.exists() else "nothing",
            fix="check the path; models are not downloaded",
        )
    if (path / METADATA).exists() or (path / LATEST).exists() or any(path.glob("iter_*")):
        return "megatron"
    if any((path / name).exists() for name in (CONFIG, INDEX, SINGLE)):
        return "hf"
    raise CheckpointError(
        "the folder is not a checkpoint",
        where=path,
        expected=f"{CONFIG} and {INDEX} or {SINGLE} (HF); {METADATA} or {LATEST} (Megatron torch_dist)",
        got=preview(sorted(file.name for file in path.iterdir())) or "an empty folder",
        fix="give the folder that holds these files",
    )


def inspect(path: str | Path) -> Description:
    """Describe an HF or a Megatron checkpoint folder. No tensor data is read.

    Raises:
        CheckpointError: the folder is no checkpoint, or an incomplete or corrupt one.
    """
    folder = Path(path)
    return _inspect_hf(folder) if kind_of(folder) == "hf" else _inspect_megatron(find_iteration(folder))


def _inspect_hf(path: Path) -> Description:
    folder = open_hf(path)
    note = None
    try:
        family = family_for(folder.config).name
    except ConfigError as error:
        family, note = None, f"{error.what}: {error.got}"
    sums = _sums((name, tensor.dtype, tensor.shape) for name, tensor in folder.stored.items())
    sums["parameters"] = sum(prod(tensor.shape) for tensor in folder.tensors.values())
    return Description(
        path=path,
        kind="hf",
        family=family,
        form="single file" if len(folder.files) == 1 else "sharded",
        files={name: (path / name).stat().st_size for name in folder.files},
        training_state={},
        note=note,
        quantised=f"{len(folder.quantised)} weights, {folder.codec}" if folder.codec else None,
        **sums,
    )


def _inspect_megatron(path: Path) -> Description:
    dcp = read_dcp(path)
    stored = {key: tensor for key, tensor in dcp.tensors.items() if not key.startswith(NOT_WEIGHTS)}
    # Two names for the same bytes are one weight, under the first name.
    names = {tensor.chunks: key for key, tensor in reversed(stored.items())}
    weights = {key: tensor for key, tensor in stored.items() if names[tensor.chunks] == key}
    family = form = note = None
    try:
        checkpoint = open_megatron(path)
        family, fields = checkpoint.family.name, checkpoint.fields
        entries = compile_entries(checkpoint.family, fields)
        own = without_aliases(entries, stored)
        form = forms_of(entries, own, where=path)["decoder.layers"].value
    except ConfigError as error:
        note = error.what
    # An `_extra_state` belongs to a weight; what else is no weight is the state of a training run.
    objects = [key for key in dcp.objects if "._extra_state" not in key and key != COMMON_STATE_KEY]
    others = [*(dcp.tensors.keys() - stored.keys()), *objects]
    files = {chunk.file for tensor in weights.values() for chunk in tensor.chunks}
    return Description(
        path=path,
        kind="megatron",
        family=family,
        form=form,
        files={name: (path / name).stat().st_size for name in sorted(files)},
        training_state=dict(sorted(Counter(key.partition(".")[0].partition("/")[0] for key in others).items())),
        note=note,
        **_sums((key, tensor.dtype, tensor.shape) for key, tensor in weights.items()),
    )


def _sums(tensors: Iterable[tuple[str, str, Shape]]) -> dict[str, Any]:
    """What a description says of its tensors, from name, dtype and shape of each."""
    tensors = list(tensors)
    dtypes: Counter[str] = Counter()
    for _, dtype, shape in tensors:
        dtypes[dtype] += prod(shape)
    return {
        "parameters": dtypes.total(),
        "nbytes": sum(count * dtype_of(dtype).itemsize for dtype, count in dtypes.items()),
        "dtypes": dict(dtypes.most_common()),
        "tensors": tuple(fold(tensors)),
    }


def fold(tensors: Iterable[tuple[str, str, Shape]]) -> list[Pattern]:
    """Names, dtypes and shapes of tensors, with those that differ only in numbers made one; in order of appearance."""
    groups: Mapping[tuple[str, str, Shape], list[str]] = defaultdict(list)
    for name, dtype, shape in tensors:
        groups[template(name), dtype, tuple(shape)].append(name)
    return [
        Pattern(common_name(names), len(names), dtype, shape, len(names) * prod(shape) * dtype_of(dtype).itemsize)
        for (_, dtype, shape), names in groups.items()
    ]


def template(name: str) -> str:
    """A tensor's name with the numbers of its layer and expert replaced by `#`."""
    return _NUMBER.sub("#", name)


def common_name(names: Sequence[str]) -> str:
    """Names of one template as one, numbers that vary as ranges: `model.layers.{0-3}.mlp.gate.weight`."""
    common = template(names[0])
    for column in zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True):
        common = common.replace("#", str(column[0]) if len(set(column)) == 1 else f"{{{ranges(column)}}}", 1)
    return common


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as ranges: `0-3,7`."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
