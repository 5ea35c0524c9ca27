"""A plan's entries and where a torch_dist checkpoint holds them: matched exactly, or refused by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

from bridge_core.checkpoint.dcp import DcpChunk, DcpTensor
from bridge_core.checkpoint.hf_folder import HfFolder
from bridge_core.checkpoint.keys import (
    Form,
    Forms,
    Place,
    alias_keys,
    by_block,
    is_adapter,
    places,
)
from bridge_core.checkpoint.megatron_folder import MegatronFolder, check_no_adapters, check_weights, forms_of
from bridge_core.dtypes import dtype_of
from bridge_core.errors import CheckpointError, ConfigError, CoverageError, preview
from bridge_core.geometry import Shape
from bridge_core.patterns import fill
from bridge_core.plan import Entry, Plan, compile_entries

FLOATING = ("F64", "F32", "F16", "BF16")
NARROW = ("F16", "BF16")


def check_wanted(dtype: object) -> None:
    """Raise unless weights can be converted to a dtype without a scale: to a floating-point one of 16 bits or more."""
    if dtype is not None and dtype_of(dtype).name not in FLOATING:
        raise ConfigError(
            "weights are not converted to this dtype",
            where="dtype",
            expected="bf16, fp16, fp32 or fp64",
            got=dtype,
            fix="choose one of these; quantised checkpoints have options of their own",
        )


def cast_to(stored: str, wanted: str | None) -> str:
    """The dtype a tensor gets when `wanted` is asked for: integers and fp8 keep theirs."""
    return dtype_of(wanted).name if wanted and stored in FLOATING else stored


@dataclass(frozen=True)
class Wired:
    """A plan's entries and where a checkpoint holds them."""

    plan: Plan
    forms: Forms
    tensors: Mapping[str, DcpTensor]
    folder: Path
    shifted: Mapping[str, str] = field(default_factory=dict)
    _by_index: dict[str, dict[Shape, list[DcpChunk]]] = field(default_factory=dict, repr=False)

    def hf_dtypes(self, wanted: str | None) -> dict[str, str]:
        """Dtype of every HF tensor, from the Megatron tensor it comes from or as asked for.

        A shifted one is wider here than in HF (`lay_out_megatron`): its import recorded what it had there. Without
        a record it gets the dtype that all others have, or stays as wide as it is.
        """
        found: dict[str, str] = {}
        shifted: list[str] = []
        for entry in self.plan.entries:
            for layer, expert in entry.instances():
                keys = [place.key for place in places(entry, self.forms[entry.block], layer, expert)]
                dtypes = {cast_to(self.tensors[key].dtype, None if entry.dtype else wanted) for key in keys}
                if len(dtypes) > 1:
                    raise CheckpointError(
                        "parts of one Megatron tensor differ in dtype",
                        where=", ".join(keys),
                        expected="one dtype",
                        got=", ".join(sorted(dtypes)),
                        fix="choose one with --dtype (dtype=...)",
                    )
                (dtype,) = dtypes
                names = [fill(tensor.name, layer, expert) for tensor in entry.hf]
                found |= dict.fromkeys(names, dtype)
                if entry.shift and entry.dtype is None and wanted is None:
                    recorded = self.shifted.get(entry.name)
                    found |= dict.fromkeys(names, recorded or dtype)
                    shifted += () if recorded else names
        others = {found[name] for name in found.keys() - set(shifted)}
        if len(others) == 1:
            found |= dict.fromkeys(shifted, others.pop())
        return found | {name: found[copy.of] for name, copy in self.plan.copies.items()}

    def chunks(self, place: Place) -> list[DcpChunk]:
        """The chunks that hold parts of a place."""
        depth = len(place.stack)
        by_index = self._by_index.get(place.key)
        if by_index is None:
            by_index = self._by_index[place.key] = defaultdict(list)
            for chunk in self.tensors[place.key].chunks:
                for index in _indices(chunk, depth):
                    by_index[index].append(chunk)
        return by_index[place.stack]


def _indices(chunk: DcpChunk, depth: int) -> Iterator[Shape]:
    """The stacked indices (layer, expert) that a chunk covers; nearly always one."""
    yield from product(*(range(o, o + n) for o, n in zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)))


def megatron_entries(plan: Plan, checkpoint: MegatronFolder) -> Wired:
    """Match a plan against a checkpoint's tensors, exactly.

    Raises:
        CoverageError: tensors are missing, unexpected or of another shape; or there are adapters beside the model's
            tensors, and no pattern of the plan's `ignore` says that they are to be left out.
    """
    weights = without_aliases(plan.entries, checkpoint.weights())
    for key in _left_out(plan, checkpoint, weights):
        del weights[key]
    weights = {key: tensor for key, tensor in weights.items() if not (is_adapter(key) and plan.ignores(key))}
    check_no_adapters(weights, where=checkpoint.path)
    forms = forms_of(plan.entries, weights, where=checkpoint.path)
    check_weights(plan.entries, forms, weights, where=checkpoint.path)
    return Wired(plan, forms, weights, checkpoint.path, checkpoint.shifted)


def _left_out(plan: Plan, checkpoint: MegatronFolder, weights: Mapping[str, DcpTensor]) -> set[str]:
    """Keys of a checkpoint that hold what the plan was asked to ignore."""
    if not plan.ignore:
        return set()
    kept = {entry.name for entry in plan.entries}
    whole = compile_entries(checkpoint.family, checkpoint.fields, padded_vocab=plan.padded_vocab)
    ignored = tuple(entry for entry in whole if entry.name not in kept)
    keys = {
        place.key
        for form in Form
        for entry in ignored
        for layer, expert in entry.instances()
        for place in places(entry, form, layer, expert)
    }
    return keys & weights.keys()


def without_aliases(entries: tuple[Entry, ...], tensors: Mapping[str, DcpTensor]) -> dict[str, DcpTensor]:
    """The tensors under their own keys; an alias is renamed, or dropped where it stands for the same bytes."""
    found = dict(tensors)
    for form in Form:
        for key, alias in alias_keys(entries, dict.fromkeys(by_block(entries), form)):
            if alias in found and (key not in found or found[key] == found[alias]):
                found[key] = found.pop(alias)
    return found


def elsewhere(
    plan: Plan, checkpoint: MegatronFolder, patterns: Sequence[str], source: HfFolder | None
) -> frozenset[str]:
    """Names of the entries that an export takes from its source: no tensor of theirs is in the checkpoint.

    Args:
        plan: of the export.
        checkpoint: the Megatron folder.
        patterns: patterns (as in a shell) of the HF names for which that is allowed.
        source: the HF folder to take them from.

    Raises:
        CoverageError: there are such entries, and no source that holds them.
    """
    names = {
        name for e in plan.entries for name in (t.name for t in e.hf) if any(fnmatchcase(name, p) for p in patterns)
    }
    allowed = {e.name for e in plan.entries if all(t.name in names for t in e.hf)}
    absent = [e for e in plan.entries if e.name in allowed and not _is_held(e, checkpoint)]
    if not any(_is_held(entry, checkpoint) for entry in plan.entries if entry.name not in allowed):
        return frozenset()  # a checkpoint of something else: what is wrong with it is said later
    wanted = [name for entry in absent for name, _ in entry.hf_names()]
    if missing := [name for name in wanted if source is None or name not in source.tensors]:
        raise CoverageError(
            "the Megatron checkpoint does not hold tensors that belong to the model",
            where=preview(missing),
            expected="these, or an HF folder to take them from",
            got="no such folder" if source is None else f"{source.path} without them",
            fix="pass the HF folder that the model came from as `source` (--source), or leave them out with "
            f"ignore={list(patterns)!r} (--ignore)",
        )
    return frozenset(entry.name for entry in absent)


def _is_held(entry: Entry, checkpoint: MegatronFolder) -> bool:
    """Whether a checkpoint has a tensor of an entry, in any form."""
    weights = checkpoint.weights()
    return any(
        place.key in weights
        for form in Form
        for layer, expert in entry.instances()
        for place in places(entry, form, layer, expert)
    )
