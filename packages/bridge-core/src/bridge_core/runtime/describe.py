"""What a rank owns, in HF coordinates: for refit from shard to shard, where no rank ever gathers a whole tensor.

Nothing here communicates but the iteration of a `WeightSource`. Everything else is arithmetic on the plan and
views of the live parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from bridge_core.geometry import Box, Piece, Shape, box_of, in_source_order, restrict
from bridge_core.patterns import fill
from bridge_core.plan import Shard
from bridge_core.runtime.live import LiveModel, replica_of
from bridge_core.runtime.stream import Pass, Stream, exported
from bridge_core.runtime.tensors import dtype_name, flat, torch_dtype, window

if TYPE_CHECKING:
    from torch import Tensor


class LocalShard(NamedTuple):
    """A piece of an HF tensor, where it lies on this rank.

    Attributes:
        name: HF name.
        shape: shape of the whole HF tensor.
        dtype: safetensors name of the parameter's dtype.
        box: region of the HF tensor that the piece covers; None for a piece with gaps, which `piece` describes.
        piece: from the HF tensor (source) to the flat parameter (target), axes in the row-major order of the source.
        tensor: strided view on the parameter's memory, outside of autograd. In row-major order its elements are
            those of the piece in the HF tensor; it has the shape of the box where strides can say that, and the
            shape of the piece otherwise (`tensor.reshape(box.shape)` is then a copy).
        param, chunk: the parameter that the view is on: its name in the plan, and the number of its model chunk.
        replica: how many ranks or stages that hold the same elements come before; 0 for exactly one of them.
        shift: HF's values are those of the view plus this: 0 but for a norm that one side centres at zero.
    """

    name: str
    shape: Shape
    dtype: str
    box: Box | None
    piece: Piece
    tensor: Tensor
    param: str
    chunk: int
    replica: int
    shift: float = 0.0


def iter_local_shards(live: LiveModel) -> Iterator[LocalShard]:
    """Every piece of an HF tensor that this rank holds, with a view on it. Nothing is communicated or copied.

    Views stay valid as long as the parameters keep their memory; they show what an optimizer step writes. What DDP
    gathers late (`overlap_param_gather`) is for the caller to gather first: `start_param_sync(force_sync=True)`.
    Rows that pad the vocabulary belong to no HF tensor and are in no view.
    """
    copies = _copies(live)
    for shard in live.shards:
        replica, memory = replica_of(live, shard), live.tensor(shard)
        shift = 0.0 - live.plan.entry(shard.entry).shift
        for unordered in shard.pieces:
            piece = in_source_order(unordered)
            name = piece.source.tensor
            shape = live.plan.hf_tensors[name]
            box = box_of(piece.shape, piece.source, shape)
            view = window(flat(memory), piece.shape, piece.target)
            if box is not None:
                view = _shaped(view, box.shape)
            held = LocalShard(
                name, shape, dtype_name(memory), box, piece, view, shard.param, shard.chunk, replica, shift
            )
            yield held
            for other in copies.get(name, ()):
                yield held._replace(name=other, piece=piece._replace(source=piece.source._replace(tensor=other)))


def _copies(live: LiveModel) -> dict[str, list[str]]:
    """Names of the HF tensors that repeat one, and that exports write, by the name of that one."""
    found: dict[str, list[str]] = {}
    for name, copy in live.plan.written_copies.items():
        found.setdefault(copy.of, []).append(name)
    return found


def _shaped(view: Tensor, shape: Shape) -> Tensor:
    """`view` in a shape of as many elements, without a copy; as it is where that cannot be."""
    try:
        return view.view(shape)
    except RuntimeError:  # an HF dim whose rows lie in several places of the parameter
        return view


# --- vLLM: whole tensors, streamed -------------------------------------------------------------


class ParamMeta(NamedTuple):
    """What vLLM asks of a tensor before it arrives: HF name, torch dtype on the wire, whole shape."""

    name: str
    dtype: Any
    shape: Shape


@dataclass(frozen=True)
class WeightSource:
    """A live model as vLLM's `WeightSource` protocol describes one (its docs on weight transfer, 0.29 to 0.32).

    The protocol is met by shape; vLLM is not imported. `metadata` and iteration agree element for element.

    Args:
        stream: the export that is iterated, once per sync.
        cpu: give tensors in host memory.
    """

    stream: Stream
    cpu: bool = False

    def metadata(self) -> list[ParamMeta]:
        """Every tensor in the order of iteration. Known from the plan: no communication, no weights."""
        return [ParamMeta(meta.name, torch_dtype(meta.dtype), meta.shape) for meta in self.stream.metadata()]

    def __iter__(self) -> Pass:
        """Fresh pass over (name, tensor). Collective: all ranks of the stream's group iterate, to the end.

        Raises:
            BridgeError: on every rank, if one of them failed or left the loop early.
        """
        return exported(lambda: self.stream, cpu=self.cpu)


# --- M2N: shards, and who holds them -----------------------------------------------------------


class M2NEntry(NamedTuple):
    """One HF tensor of which this rank holds a part: what an M2N planner needs of the sending side.

    Attributes:
        key: HF name.
        dtype: safetensors name of the dtype.
        global_shape: shape of the whole HF tensor.
        mesh: ranks of the layout, on this pipeline stage, that hold the tensor: a row per replica, a column per
            part. Empty where parts are not held equally often, or are no boxes.
        placements: per mesh axis the tensor dim that is cut over it, or None for copies. None instead of a pair
            where the parts are no even cut along one dim: such a tensor has to be sent whole.
        box: the part that this rank holds; None if it is no box.
        replica: how many ranks that hold the same part come before; this rank's row of the mesh.
        live, pieces: what `local_tensor` reads.
    """

    key: str
    dtype: str
    global_shape: Shape
    mesh: tuple[tuple[int, ...], ...]
    placements: tuple[None, int | None] | None
    box: Box | None
    replica: int
    live: LiveModel
    pieces: tuple[tuple[Shard, Piece], ...]

    @property
    def allow_full_fallback(self) -> bool:
        """Whether the tensor can only be sent whole, for example through a `WeightSource`."""
        return self.placements is None

    def local_tensor(self) -> Tensor | None:
        """This rank's part, contiguous, with the shape of `box`; None without a box.

        It shares the parameter's memory where the part lies there as it is, and is a copy otherwise.
        """
        if self.box is None:
            return None
        shard, piece = self.pieces[0]
        if len(self.pieces) == 1:
            ordered = in_source_order(piece)
            part = window(flat(self.live.tensor(shard)), ordered.shape, ordered.target).reshape(self.box.shape)
        else:
            part = _assembled(self.live, self.pieces, self.global_shape, self.box)
        shift = self.live.plan.entry(shard.entry).shift
        return (part.float() - shift).to(part.dtype) if shift else part


def m2n_entries(live: LiveModel) -> list[M2NEntry]:
    """An entry for every HF tensor of which this rank holds a part. Nothing is communicated or copied.

    The last stage's copy of a tied embedding has no entry: the first stage sends it.
    """
    held: dict[str, list[tuple[Shard, Piece]]] = {}
    for shard in live.shards:
        if not live.plan.is_second_copy(live.rank, shard):
            for piece in shard.pieces:
                held.setdefault(piece.source.tensor, []).append((shard, piece))
    holders, copies = _Holders(live), _copies(live)
    entries = [holders.entry(name, tuple(parts)) for name, parts in held.items()]
    return entries + [entry._replace(key=other) for entry in entries for other in copies.get(entry.key, ())]


def _assembled(live: LiveModel, pieces: tuple[tuple[Shard, Piece], ...], shape: Shape, box: Box) -> Tensor:
    import torch

    memory = live.tensor(pieces[0][0])
    whole = torch.empty(box.shape, dtype=memory.dtype, device=memory.device)
    for shard, piece in pieces:
        for part in restrict(piece, "source", shape, box, box.shape, (0,) * len(shape)):
            source = window(flat(live.tensor(shard)), part.shape, part.target)
            window(flat(whole), part.shape, part.source).copy_(source)
    return whole


class _Holders:
    """Which ranks of this pipeline stage hold which box of a tensor; worked out once per kind of tensor."""

    def __init__(self, live: LiveModel) -> None:
        self._live = live
        layout = live.plan.layout
        mine = layout.coords(live.rank)
        self._mine = mine
        ranks = ((rank, layout.coords(rank)) for rank in range(layout.world_size))
        self._stage = [(rank, coords) for rank, coords in ranks if coords.pp == mine.pp]
        self._known: dict[tuple[str, str], dict[Box | None, list[int]]] = {}

    def entry(self, name: str, parts: tuple[tuple[Shard, Piece], ...]) -> M2NEntry:
        shard = parts[0][0]
        shape = self._live.plan.hf_tensors[name]
        columns = self._columns(name, shard)
        box = next(box for box, ranks in columns.items() if self._live.rank in ranks)
        mesh: tuple[tuple[int, ...], ...] = ()
        if None not in columns and len({len(ranks) for ranks in columns.values()}) == 1:
            mesh = tuple(zip(*columns.values(), strict=True))
        dtype = dtype_name(self._live.tensor(shard))
        replica = columns[box].index(self._live.rank)
        placements = _placements(columns, shape) if mesh else None
        return M2NEntry(name, dtype, shape, mesh, placements, box, replica, self._live, parts)

    def _columns(self, name: str, shard: Shard) -> dict[Box | None, list[int]]:
        """Ranks by the box that they hold, boxes in the order of their starts."""
        plan = self._live.plan
        entry = plan.entry(shard.entry)
        pattern = next(t for t in entry.hf if fill(t.name, shard.layer, shard.expert) == name)
        stacked = bool(entry.stack_stride(pattern))
        key = (entry.name, pattern.name)
        if key not in self._known:
            found: dict[Box | None, list[int]] = {}
            boxes: dict[tuple[int, int], list[Box | None]] = {}
            for rank, coords in self._stage:
                if entry.is_expert and not stacked and coords.ep != self._mine.ep:
                    continue
                at = (coords.etp if entry.is_expert else coords.tp, coords.ep if stacked else 0)
                if at not in boxes:
                    experts = plan.experts_of(entry, coords.ep) if stacked else (shard.expert,)
                    boxes[at] = self._boxes(shard, name, at[0], experts)
                if boxes[at]:
                    found.setdefault(_union(boxes[at]), []).append(rank)
            self._known[key] = dict(sorted(found.items(), key=lambda item: item[0] or ()))
        return self._known[key]

    def _boxes(self, shard: Shard, name: str, coordinate: int, experts: Iterable[int]) -> list[Box | None]:
        """Regions of an HF tensor that the pieces at one coordinate cover."""
        plan = self._live.plan
        entry = plan.entry(shard.entry)
        form = plan.local_form(shard.entry, coordinate)
        pieces = [p for e in experts for p in entry.instance(form.pieces, shard.layer, e) if p.source.tensor == name]
        return [box_of(p.shape, p.source, plan.hf_tensors[name]) for p in pieces]


def _union(boxes: list[Box | None]) -> Box | None:
    """The box that disjoint boxes make up together, or None."""
    known = [box for box in boxes if box is not None]
    if len(known) != len(boxes):
        return None
    start = tuple(map(min, *(box.start for box in known))) if len(known) > 1 else known[0].start
    stops = [tuple(s + n for s, n in zip(*box, strict=True)) for box in known]
    stop = tuple(map(max, *stops)) if len(known) > 1 else stops[0]
    hull = Box(start, tuple(e - s for s, e in zip(start, stop, strict=True)))
    return hull if hull.numel == sum(box.numel for box in known) else None


def _placements(columns: dict[Box | None, list[int]], shape: Shape) -> tuple[None, int | None] | None:
    """(None, dim) for an even cut along one dim, (None, None) for one part that is all, None for anything else."""
    boxes = [box for box in columns if box is not None]
    if len(boxes) != len(columns) or sum(box.numel for box in boxes) != _numel(shape):
        return None
    if len(boxes) == 1:
        return None, None
    if len({box.shape for box in boxes}) > 1:
        return None
    cut = [dim for dim, (part, whole) in enumerate(zip(boxes[0].shape, shape, strict=True)) if part != whole]
    return (None, cut[0]) if len(cut) == 1 else None


def _numel(shape: Shape) -> int:
    return Box((0,) * len(shape), shape).numel
