"""Whether two checkpoint folders hold the same tensors, to the bit. HF or Megatron, in any pairing.

Both sides are seen as HF tensors; quantised ones as they are read, unless both folders hold such. Those of a
Megatron folder are assembled from its chunks by the very pieces that an export would use, block by block, and never
written. Blocks are compared as they come; where they differ, both tensors are read to the end for the content hashes
that the result names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from hashlib import blake2b
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from bridge_core.checkpoint.files import OpenFiles
from bridge_core.checkpoint.hf_folder import HfFolder, open_hf
from bridge_core.checkpoint.hf_layout import lay_out_files
from bridge_core.checkpoint.inspect import Kind, kind_of
from bridge_core.checkpoint.matching import megatron_entries
from bridge_core.checkpoint.megatron_folder import MegatronFolder, export_plan, open_megatron
from bridge_core.checkpoint.reading import Reader
from bridge_core.checkpoint.transfer import Job, Progress, gather, in_threads
from bridge_core.checkpoint.variant import PLAIN, Variant
from bridge_core.checkpoint.wiring import export_jobs
from bridge_core.codecs import OPTION
from bridge_core.errors import ConfigError, CoverageError, VerificationError, preview
from bridge_core.families import family_for
from bridge_core.geometry import Piece, Shape, View, row_major
from bridge_core.patterns import match

KINDS = ("only in a", "only in b", "shape", "dtype", "content")
"""Kinds of differences. A tensor that differs in shape or dtype is not compared by content."""


class Difference(NamedTuple):
    """One tensor that is not equal on both sides.

    Attributes:
        kind: one of `KINDS`.
        name: HF name of the tensor.
        a: what the first folder has: a shape, a dtype, or a content hash (blake2b, 128 bits, hexadecimal).
        b: the same for the second folder.
        element: index of the first element that differs, where contents do.
    """

    kind: str
    name: str
    a: str | None = None
    b: str | None = None
    element: Shape | None = None

    def __str__(self) -> str:
        if self.a is None and self.b is None:
            return self.name
        at = f" from element {list(self.element)} on" if self.element is not None else ""
        return f"{self.name}{at}: {self.a} and {self.b}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `verify` found.

    Attributes:
        a: the first folder.
        b: the second folder.
        kinds: whether each is `hf` or `megatron`.
        tensors: HF tensors compared by content.
        nbytes: bytes of those.
        counts: number of differences by kind, without kinds that have none.
        differences: the first of each kind, as many as were asked for.
        ignored: tensors that are on one side only and are no weights, with the family's reason.
    """

    a: Path
    b: Path
    kinds: tuple[Kind, Kind]
    tensors: int
    nbytes: int
    counts: dict[str, int]
    differences: tuple[Difference, ...]
    ignored: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether the two folders hold the same tensors."""
        return not self.counts

    def raise_if_different(self) -> None:
        """Raise unless `ok`.

        Raises:
            VerificationError: counts the differences of each kind and names the first.
        """
        if self.ok:
            return
        lines = []
        for kind, count in self.counts.items():
            first = [str(difference) for difference in self.differences if difference.kind == kind][:2]
            lines.append(f"{count} x {kind}: {', '.join(first)}{', ...' if count > len(first) else ''}")
        raise VerificationError(
            f"the checkpoints differ in {sum(self.counts.values())} tensor(s)",
            where=f"a = {self.a}, b = {self.b}",
            expected="the same names, shapes, dtypes and contents",
            got="\n            ".join(lines),
            fix="convert again from the side that you trust; a dtype differs if the conversion was asked to cast",
        )

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "ok": self.ok,
            "a": {"path": str(self.a), "kind": self.kinds[0]},
            "b": {"path": str(self.b), "kind": self.kinds[1]},
            "tensors": self.tensors,
            "nbytes": self.nbytes,
            "counts": self.counts,
            "differences": [difference._asdict() for difference in self.differences],
            "ignored": self.ignored,
        }


def verify(
    a: str | Path,
    b: str | Path,
    *,
    names: Sequence[str] = (),
    limit: int = 5,
    threads: int = 2,
    progress: Progress | None = None,
    on_total: Callable[[int], None] | None = None,
    variant: Variant = PLAIN,
) -> Comparison:
    """Compare the tensors of two checkpoint folders: names, shapes, dtypes, and every byte.

    Each folder may be an HF or a Megatron one. A Megatron folder is compared as the HF tensors that it
    would be exported to; its training state and the padding of its vocabulary are no part of that.
    Memory is bounded by two blocks (`transfer.STAGING`) per thread.

    Args:
        a: a folder; it gives the order in which differences are named.
        b: another one.
        names: patterns as in a shell (`model.layers.3.*`); HF tensors that match none are left out.
        limit: how many differences of each kind to name.
        threads: tensors compared at a time.
        progress: called with numbers of bytes compared (those of one side), from any thread.
        on_total: called once with the number of bytes to compare, before the first is.
        variant: how the tensors of Megatron folders are arranged.

    Raises:
        BridgeError: a folder cannot be read, or no tensor matches `names`. That the two differ raises
            nothing: see `Comparison`.
    """
    first, second = _open_both(Path(a), Path(b), variant)
    wanted_a, wanted_b = (_wanted(side.tensors, names) for side in (first, second))
    if not wanted_a and not wanted_b:
        raise _nothing_to_compare(f"{a}, {b}", names, first)
    found, ignored = _compare_headers(first, second, wanted_a, wanted_b)
    unlike = {difference.name for difference in found}
    pairs = _pairs(first, second, [name for name in wanted_a if name in wanted_b and name not in unlike])
    nbytes = sum(job.target.nbytes for job, _ in pairs.values())
    if on_total:
        on_total(nbytes)
    found += _compare_contents(pairs, threads, progress or (lambda nbytes: None), limit)
    counts = Counter(difference.kind for difference in found)
    return Comparison(
        a=Path(a),
        b=Path(b),
        kinds=(first.kind, second.kind),
        tensors=len(pairs),
        nbytes=nbytes,
        counts={kind: counts[kind] for kind in KINDS if counts[kind]},
        differences=tuple(d for kind in KINDS for d in [d for d in found if d.kind == kind][:limit]),
        ignored=ignored,
    )


# --- The two sides as HF tensors ------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """A checkpoint as HF tensors: dtype and shape of each, and on demand a job that would make it."""

    kind: Kind
    tensors: dict[str, tuple[str, Shape]]
    jobs: Callable[[], dict[str, Job]]
    ignored: Mapping[str, str] = field(default_factory=dict)


def _open_both(a: Path, b: Path, variant: Variant) -> tuple[_Side, _Side]:
    kinds = {path: kind_of(path) for path in (a, b)}
    opened = {path: open_hf(path) for path in (a, b) if kinds[path] == "hf"}
    folders = [opened[path] for path in (a, b) if path in opened]
    config, shapes = (folders[0].config, folders[0].shapes) if folders else (None, None)
    # Two folders quantised by one method are compared as they are stored, and one with any other as it is read.
    methods = [folder.config[OPTION].get("quant_method") for folder in folders if folder.codec is not None]
    as_stored = len(methods) == 2 and len(set(methods)) == 1
    first, second = (
        _hf_side(opened[path], as_stored) if path in opened else _megatron_side(path, config, shapes, variant)
        for path in (a, b)
    )
    return first, second


def _hf_side(folder: HfFolder, as_stored: bool) -> _Side:
    tensors = folder.stored if as_stored else folder.tensors
    try:
        ignored = family_for(folder.config).ignored
    except ConfigError:
        ignored = {}  # comparing two HF folders asks for no family

    def jobs() -> dict[str, Job]:
        found: dict[str, Job] = {}
        for name, tensor in tensors.items():
            view = View(name, 0, row_major(tensor.shape))
            target = tensor._replace(encoded=None)  # a block of it is compared as it is read
            found[name] = Job(target, ((tensor, Piece(tensor.shape, view, view)),))
        return found

    return _Side("hf", {name: (t.dtype, t.shape) for name, t in tensors.items()}, jobs, ignored)


def _megatron_side(
    path: Path, hf_config: Mapping[str, Any] | None, shapes: Mapping[str, Shape] | None, variant: Variant
) -> _Side:
    """A Megatron folder as HF tensors, in the forms that it recorded or else in those of the other side."""
    checkpoint = _open_megatron(path, hf_config, variant)
    plan = export_plan(checkpoint, inventory=shapes if checkpoint.forms is None else None)
    wired = megatron_entries(plan, checkpoint)
    dtypes = wired.hf_dtypes(None)

    def jobs() -> dict[str, Job]:
        # One imaginary file: the targets are never written, only their shapes and dtypes count.
        layout = lay_out_files(plan.hf_tensors, dtypes, max_shard_size=1 << 62)
        (file,) = layout.files
        return dict(zip(file.tensors, export_jobs(plan, wired, layout, path), strict=True))

    tensors = {name: (dtypes[name], shape) for name, shape in plan.hf_tensors.items()}
    repeated = {name: f"repeats {copy.of}" for name, copy in plan.copies.items() if not copy.written}
    return _Side("megatron", tensors, jobs, {**plan.family.ignored, **repeated})


def _open_megatron(path: Path, hf_config: Mapping[str, Any] | None, variant: Variant) -> MegatronFolder:
    """A checkpoint by its own configuration if that is an HF one or all there is, else by the other side's."""
    try:
        checkpoint = open_megatron(path, variant=variant)
    except ConfigError:
        if hf_config is None:
            raise
    else:
        if checkpoint.hf_config or hf_config is None:
            return checkpoint
    return open_megatron(path, hf_config=hf_config, variant=variant)


def _wanted(tensors: Mapping[str, object], names: Sequence[str]) -> dict[str, None]:
    return {name: None for name in tensors if not names or any(fnmatchcase(name, pattern) for pattern in names)}


def _nothing_to_compare(where: str, names: Sequence[str], side: _Side) -> CoverageError:
    return CoverageError(
        "no tensor of the checkpoints is to be compared",
        where=where,
        expected=f"a tensor whose name matches {preview(names)}" if names else "checkpoints that hold tensors",
        got=f"names such as {preview(side.tensors, limit=2)}" if side.tensors else "no tensors",
        fix="mend the patterns, or leave them out to compare everything" if names else "check the paths",
    )


def _pairs(a: _Side, b: _Side, names: Sequence[str]) -> dict[str, tuple[Job, Job]]:
    """The jobs that would make each tensor from either side."""
    jobs_a, jobs_b = a.jobs(), b.jobs()
    return {name: (jobs_a[name], jobs_b[name]) for name in names}


# --- Comparing ------------------------------------------------------------------------------------


def _compare_headers(
    a: _Side, b: _Side, wanted_a: Mapping[str, None], wanted_b: Mapping[str, None]
) -> tuple[list[Difference], dict[str, str]]:
    """Differences in names, shapes and dtypes, and the tensors that may be on one side only."""
    found: list[Difference] = []
    ignored: dict[str, str] = {}
    reasons = {**a.ignored, **b.ignored}
    for kind, names, others in (("only in a", wanted_a, wanted_b), ("only in b", wanted_b, wanted_a)):
        for name in names:
            if name in others:
                continue
            reason = next((text for pattern, text in reasons.items() if match(pattern, name) is not None), None)
            if reason is None:
                found.append(Difference(kind, name))
            else:
                ignored[name] = reason
    for name in wanted_a:
        if name not in wanted_b or a.tensors[name] == b.tensors[name]:
            continue
        (dtype_a, shape_a), (dtype_b, shape_b) = a.tensors[name], b.tensors[name]
        if shape_a != shape_b:
            found.append(Difference("shape", name, str(list(shape_a)), str(list(shape_b))))
        else:
            found.append(Difference("dtype", name, dtype_a, dtype_b))
    return found, ignored


def _compare_contents(
    pairs: Mapping[str, tuple[Job, Job]], threads: int, progress: Progress, limit: int
) -> list[Difference]:
    """Differences in content, in the order of `pairs`; only the first `limit` carry hashes."""
    differing: dict[str, Shape] = {}
    stop = Event()

    def compare(files: OpenFiles, names: Sequence[str]) -> None:
        readers = Reader(files), Reader(files)
        for name in names:
            if stop.is_set():
                return
            if (element := _first_difference(pairs[name], readers)) is not None:
                differing[name] = element
            progress(pairs[name][0].target.nbytes)

    with ExitStack() as stack:
        files = OpenFiles(stack)
        names, workers = list(pairs), max(1, threads)
        in_threads([partial(compare, files, names[number::workers]) for number in range(workers)], stop)
        found: list[Difference] = []
        for name in filter(differing.__contains__, names):
            a, b = (_content_hash(job, Reader(files)) if len(found) < limit else None for job in pairs[name])
            found.append(Difference("content", name, a, b, differing[name]))
    return found


def _first_difference(pair: tuple[Job, Job], readers: tuple[Reader, Reader]) -> Shape | None:
    """The index of the first element whose bytes differ, or None."""
    import numpy as np

    # Where a block ends depends on shape and dtype alone, which are equal here.
    for (first, left), (_, right) in zip(*map(gather, pair, readers), strict=True):
        # As bytes: two zeros of different sign are different, a NaN equals itself.
        if not np.array_equal(left.view(np.uint8), right.view(np.uint8)):
            unlike = (left.view(np.uint8) != right.view(np.uint8)).argmax()
            index = np.unravel_index(first + int(unlike) // left.itemsize, pair[0].target.shape)
            return tuple(int(number) for number in index)
    return None


def _content_hash(job: Job, reader: Reader) -> str:
    import numpy as np

    digest = blake2b(digest_size=16)
    for _, block in gather(job, reader):
        digest.update(block.view(np.uint8).data)
    return digest.hexdigest()
