"""The weight files of an HF folder that is still to be written, laid out by arithmetic."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

from bridge_core.checkpoint.hf_folder import SINGLE, HfFolder
from bridge_core.checkpoint.safetensors import Laid, lay_out, place
from bridge_core.codecs import Fp8Blocks, Header
from bridge_core.dtypes import dtype_of
from bridge_core.errors import CoverageError, preview
from bridge_core.geometry import Shape
from bridge_core.plan import Plan

FORMAT = {"format": "pt"}


@dataclass(frozen=True)
class HfLayout:
    """Weight files, each with its header and the place of every tensor."""

    files: tuple[Laid, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(file.nbytes for file in self.files)

    @property
    def tensor_nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(file.nbytes - len(file.header) for file in self.files)

    def main_dtype(self) -> str:
        """The dtype that most elements have: what config.json calls the model's dtype."""
        count: Counter[str] = Counter()
        for file in self.files:
            for _, dtype, shape in file.tensors.values():
                # A weight in fp8 is of the dtype that it is read in.
                count[Fp8Blocks.presented if dtype == Fp8Blocks.dtype else dtype] += prod(shape)
        return count.most_common(1)[0][0]

    def index(self) -> str:
        """Content of `model.safetensors.index.json`, as transformers writes it."""
        weight_map = {tensor: file.name for file in self.files for tensor in file.tensors}
        elements = sum(prod(shape) for file in self.files for _, _, shape in file.tensors.values())
        metadata = {"total_parameters": elements, "total_size": self.tensor_nbytes}
        return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def as_written(plan: Plan, dtypes: Mapping[str, str]) -> tuple[dict[str, Shape], dict[str, str]]:
    """Shapes and dtypes of all tensors to be written: with a codec, those that store a quantised weight.

    Args:
        plan: of the export.
        dtypes: of the weights, as they are without a codec.
    """
    codec = plan.codec
    if codec is None:
        return plan.hf_tensors, dict(dtypes)
    shapes: dict[str, Shape] = {}
    dtypes = dict(dtypes)
    for name, shape in plan.hf_tensors.items():
        parts = codec.parts(name, shape) if name in plan.quantised else {name: Header(dtypes[name], shape)}
        for part, (dtype, extent) in parts.items():
            shapes[part], dtypes[part] = extent, dtype
    return shapes, dtypes


def lay_out_files(shapes: Mapping[str, Shape], dtypes: Mapping[str, str], max_shard_size: int) -> HfLayout:
    """Files of at most `max_shard_size` bytes of tensors (but at least one tensor), in the order of `shapes`.

    Names are transformers': `model.safetensors`, or `model-00001-of-00002.safetensors` and so on.
    """
    shards: list[list[tuple[str, str, Shape]]] = [[]]
    held = 0
    for name, shape in shapes.items():
        nbytes = prod(shape) * dtype_of(dtypes[name]).itemsize
        if shards[-1] and held + nbytes > max_shard_size:
            shards.append([])
            held = 0
        shards[-1].append((name, dtypes[name], shape))
        held += nbytes
    if len(shards) == 1:
        return HfLayout((lay_out(SINGLE, shards[0], metadata=FORMAT),))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return HfLayout(tuple(lay_out(n, shard, metadata=FORMAT) for n, shard in zip(names, shards, strict=True)))


def lay_out_like(source: HfFolder, plan: Plan, dtypes: Mapping[str, str], carried: Collection[str] = ()) -> HfLayout:
    """The files of `source`, with the same tensors in the same order; only dtypes may differ, and scales come or go.

    Tensors in `carried` are in none of the plan's rows, and stay as they are.

    Raises:
        CoverageError: the source holds other tensors than the plan, or other shapes.
    """
    ignored = set(plan.audit(source.shapes).ignored) - set(carried)
    repeated = {name: copy.of for name, copy in plan.copies.items() if name in source.tensors}
    shapes, dtypes = as_written(plan, dtypes)
    shapes = shapes | {name: shapes[of] for name, of in repeated.items()} | {n: source.shapes[n] for n in carried}
    dtypes |= {name: source.tensors[name].dtype for name in carried}
    written = shapes.keys() - ignored
    files: list[Laid] = []
    read_as = {t.encoded.parts[0]: name for name, t in source.tensors.items() if t.encoded is not None}
    for name, tensors in source.files.items():
        wanted = [t for tensor in tensors for t in _as_stored(tensor, read_as.get(source.stored[tensor]), source, plan)]
        kept = [(tensor, dtypes[tensor], shapes[tensor]) for tensor in wanted if tensor in written]
        unchanged = wanted == tensors and all(dtype == source.stored[tensor].dtype for tensor, dtype, _ in kept)
        if unchanged and len(kept) == len(tensors):
            # The very same header, however its writer formatted it: then the whole file will be the same.
            placed = {t: (source.stored[t].offset, dtype, shape) for t, dtype, shape in kept}
            end = max(source.stored[t].offset + source.stored[t].nbytes for t in tensors)
            files.append(Laid(name, source.headers[name], placed, end))
        elif wanted != tensors:
            files.append(lay_out(name, kept, metadata=source.metadata[name] or None))  # aligned for every dtype
        elif kept:
            files.append(place(name, kept, metadata=source.metadata[name] or None))
    if not files:
        raise CoverageError("the source holds no tensor of the model", where=source.path, got=preview(source.tensors))
    return HfLayout(tuple(files))


def _as_stored(tensor: str, weight: str | None, source: HfFolder, plan: Plan) -> tuple[str, ...]:
    """What is written in place of a tensor of the source: more where scales come, and other names where codes go.

    Args:
        tensor: a tensor of the source, as it is stored.
        weight: the weight whose codes it holds; None for any other.
        source: the folder.
        plan: of the export.
    """
    name = weight or tensor
    if plan.codec is None or name not in plan.quantised:
        return (name,)
    parts = tuple(plan.codec.parts(name, plan.hf_tensors[name]))
    # Where scales lie is kept, too.
    return (tensor,) if source.codec == plan.codec and name in source.quantised else parts
