"""HF weights out of a live model, as a stream: the same names in the same order on every rank.

Tensors travel in buckets of bounded bytes. A rank copies what it owns into a bucket of zeros; a sum over
all ranks then gives every rank the whole, to the bit, because exactly one rank contributes to each byte.
So a bucket is one collective, whatever the layout, and nobody needs to know where anything came from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from inspect import GEN_CREATED, getgeneratorstate
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

from bridge_core.checkpoint.workers import jointly
from bridge_core.codecs import Fp8Blocks
from bridge_core.dtypes import dtype_of
from bridge_core.errors import BridgeError, ConfigError, CoverageError, check_count
from bridge_core.geometry import Piece
from bridge_core.plan import Shard, TensorMeta, subsets
from bridge_core.runtime.agreement import agreed_device, agreed_dtypes, check_same, check_whole
from bridge_core.runtime.fp8 import quantise
from bridge_core.runtime.live import LiveModel, replica_of
from bridge_core.runtime.tensors import cast, dtype_name, flat, torch_dtype, window
from bridge_core.runtime.words import default_group
from bridge_core.runtime.workers import TorchWorkers, noticing_loss

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from torch import Tensor

_ALIGN = 16  # bytes; every tensor in a bucket starts at a multiple, so that it can be viewed in its dtype


@dataclass
class Stream:
    """A model's export, planned once and run as often as weights change. Making one is collective over `group`.

    Args:
        live: the model, matched against its plan.
        group: all ranks of the model; by default torch's default group.
        dtype: dtype of the tensors in the stream; by default that of the parameters, which must then be one.
        bucket_bytes: bytes of a bucket. A group of tensors that must travel together is never split, and
            makes a larger bucket if it has to.
        names: patterns (as in a shell) of the HF names wanted, or of their groups (`TensorMeta.group`); whole groups
            travel. For parts of at most so many bytes, see `plan.subsets`.

    Attributes:
        collectives: how many collectives the stream has run so far.
    """

    live: LiveModel
    group: Any = None
    dtype: str | torch.dtype | None = None
    bucket_bytes: int = 512 * 1024 * 1024
    names: Collection[str] = ("*",)
    collectives: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.group = self.group or default_group()
        self._workers = TorchWorkers(self.group)
        self._told = False
        self._device: Any = None  # that of the pass
        check_whole(self.live, self.group)
        dtypes = agreed_dtypes(self.live, self.dtype, self.group)
        jointly(self._workers, lambda: self._lay_out(dtypes))
        check_same(
            repr(self._buckets).encode(),
            self.group,
            what="ranks are about to stream different tensors, or in different buckets",
            where="stream",
            fix="call it with the same names, dtype and bucket_bytes everywhere",
        )
        self._owned = self._owned_pieces()

    def metadata(self) -> list[TensorMeta]:
        """Name, dtype, shape, bytes and group of everything the stream will yield, in its order. No weights move."""
        return self.live.plan.as_stored(self._metadata)

    def __iter__(self) -> Pass:
        """Fresh pass over (name, tensor). Collective: all ranks of the group iterate, to the end.

        The tensors share a bucket's memory, which is not reused; they are on the parameters' device, and have the
        values that the parameters have when their bucket is filled.

        Raises:
            BridgeError: on every rank, if one of them failed or left the loop early. The error of a loop's body is
                told to the others where the pass is used in a `with` (see `Pass`).
        """
        return Pass(self._run())

    def _run(self) -> Generator[tuple[str, Tensor], None, None]:
        self._told = False
        try:
            self._device = agreed_device(self.live, self.group)
            self.collectives += 1
            self.live.renew()
            for bucket in self._buckets:
                for name, tensor in self._gathered(bucket):
                    yield from self._as_stored(name, tensor)
        except BaseException as error:
            if not self._told:  # once a failure is known to all, nobody waits for another word
                with suppress(Exception):  # this rank has an error of its own, or none that anybody would see
                    self._agree(error if isinstance(error, Exception) else _left_early())
            raise
        self._agree(None)

    def _as_stored(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A tensor, or the codes and scales of one that is to be quantised. Every rank has all of it."""
        codec = self.live.plan.codec
        if not isinstance(codec, Fp8Blocks) or name not in self.live.plan.quantised:
            yield name, tensor
            return
        codes, scales = quantise(tensor, codec, where=name)
        yield name, codes
        yield codec.scale_name(name), scales

    def _lay_out(self, dtypes: Mapping[str, str]) -> None:
        check_count("bucket_bytes", self.bucket_bytes)
        self._metadata = self._wanted(dtypes)
        self._buckets = self._fill_buckets()

    def _wanted(self, dtypes: Mapping[str, str]) -> list[TensorMeta]:
        plan = self.live.plan
        everything = [_in_dtype(meta, dtypes[meta.name]) for meta in plan.plain_metadata()]
        chosen = _groups_named(plan.as_stored(everything), self.names)
        return [meta for meta in everything if meta.group in chosen]

    def _fill_buckets(self) -> list[list[tuple[TensorMeta, int]]]:
        """Tensors with their byte offsets, bucket by bucket; groups whole."""
        buckets: list[list[tuple[TensorMeta, int]]] = []
        for members in subsets(self._metadata, self.bucket_bytes, align=_ALIGN):
            ends = accumulate(-(-meta.nbytes // _ALIGN) * _ALIGN for meta in members)
            buckets.append(list(zip(members, [0, *ends], strict=False)))
        return buckets

    def _owned_pieces(self) -> dict[str, list[tuple[Shard, Piece]]]:
        """HF name -> this rank's own pieces of it: those of the first of all replicas."""
        owned: dict[str, list[tuple[Shard, Piece]]] = {}
        for shard in self.live.shards:
            if replica_of(self.live, shard):
                continue
            for piece in shard.pieces:
                owned.setdefault(piece.source.tensor, []).append((shard, piece.inverse()))
        for name, copy in self.live.plan.written_copies.items():
            owned[name] = owned.get(copy.of, [])
        return owned

    def _gathered(self, bucket: list[tuple[TensorMeta, int]]) -> list[tuple[str, Tensor]]:
        """The tensors of a bucket, whole, on every rank. Collective; if one rank fails, all raise."""
        import torch
        import torch.distributed as dist

        data, failure = None, None
        try:
            data = self._filled(bucket)
        except Exception as error:
            failure = error
        self._agree(failure)
        assert data is not None
        with noticing_loss():
            dist.all_reduce(data.view(torch.int32), group=self.group)
        self.collectives += 1
        return [(meta.name, tensor.view(meta.shape)) for meta, tensor in _tensors(bucket, data)]

    def _filled(self, bucket: list[tuple[TensorMeta, int]]) -> Tensor:
        """The bytes of a bucket: this rank's own pieces, and zeros."""
        import torch

        last, end = bucket[-1]
        size = -(-(end + last.nbytes) // _ALIGN) * _ALIGN
        data = torch.zeros(size, dtype=torch.uint8, device=self._device)
        for meta, target in _tensors(bucket, data):
            for shard, piece in self._owned.get(meta.name, ()):
                source = window(flat(self._parameter(shard, meta)), piece.shape, piece.source)
                if shift := self.live.plan.entry(shard.entry).shift:
                    source = source.float() - shift
                window(target, piece.shape, piece.target).copy_(cast(source, dtype_name(target), where=meta.name))
        return data

    def _parameter(self, shard: Shard, meta: TensorMeta) -> Tensor:
        """The parameter of a shard, which has the dtype that was announced unless another one was asked for."""
        found = self.live.tensor(shard)
        if self.dtype is None and dtype_name(found) != meta.dtype:
            raise CoverageError(
                "a parameter has another dtype than when the stream was made",
                where=f"rank {self.live.rank}: {shard.param}",
                expected=meta.dtype,
                got=dtype_name(found),
                fix="make a new stream, or pass dtype=... to cast to one",
            )
        return found

    def _agree(self, failure: Exception | None) -> None:
        """All ranks learn whether one of them failed, and if so why. Collective.

        Raises:
            Exception: `failure` itself, here, if this rank's is the first.
            WorkerError: another rank failed; has its message.
        """

        def say() -> None:
            if failure is not None:
                raise failure

        self.collectives += 1
        try:
            self._workers.together(say)
        except Exception:
            self._told = True
            raise


class Pass(Iterator[tuple[str, "Tensor"]]):
    """One pass over a stream of (name, tensor). All ranks take all of it.

    A loop that is left early is heard of by all ranks, when the last reference to the pass is gone. In a `with`, that
    is at its end at the latest, and the others learn the error of the body, which an iterator alone cannot see:

        with bridge.export_hf_weights(model) as tensors:
            for name, tensor in tensors:
                send(name, tensor)  # an exception here is raised on all ranks, with this message

    Args:
        steps: what the pass yields; an error that is thrown in, it tells to the other ranks.
    """

    def __init__(self, steps: Generator[tuple[str, Tensor], None, None]) -> None:
        self._steps = steps

    def __next__(self) -> tuple[str, Tensor]:
        return next(self._steps)

    def close(self) -> None:
        """Leave the pass. The others are told, if there is more to come."""
        self._steps.close()

    def __enter__(self) -> Pass:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Beside an error of the body, what comes back is the same one, or what another rank has to say.
        with nullcontext() if error is None else suppress(Exception):
            if getgeneratorstate(self._steps) == GEN_CREATED:
                next(self._steps, None)  # the others have begun, and can be told of nothing before
            if isinstance(error, Exception):
                self._steps.throw(error)
        self._steps.close()


def exported(opened: Callable[[], Stream], *, cpu: bool) -> Pass:
    """A pass over the stream that `opened` gives when it begins; on the CPU if that is asked for."""

    def steps() -> Generator[tuple[str, Tensor], None, None]:
        with iter(opened()) as tensors:
            for name, tensor in tensors:
                yield name, tensor.cpu() if cpu else tensor

    return Pass(steps())


def _tensors(bucket: list[tuple[TensorMeta, int]], data: Tensor) -> Iterator[tuple[TensorMeta, Tensor]]:
    """The tensors of a bucket as flat views of its bytes."""
    for meta, at in bucket:
        yield meta, data[at : at + meta.nbytes].view(torch_dtype(meta.dtype))


def _groups_named(metadata: Sequence[TensorMeta], patterns: Collection[str]) -> set[str]:
    """The groups that a pattern names, by itself or by one of its tensors.

    Raises:
        ConfigError: the patterns are one string, whose letters would be taken for patterns.
        CoverageError: a pattern names nothing.
    """
    if isinstance(patterns, str):
        raise ConfigError(
            "names of a stream are several patterns",
            where="names",
            expected=f"a collection of patterns, such as [{patterns!r}]",
            got=repr(patterns),
            fix="put it into a list",
        )
    groups = {name: meta.group for meta in metadata for name in (meta.name, meta.group)}
    chosen: set[str] = set()
    unused: list[str] = []
    for pattern in patterns:
        if pattern in groups:  # a list of all names of a part is long
            chosen.add(groups[pattern])
            continue
        found = {group for name, group in groups.items() if fnmatchcase(name, pattern)}
        chosen |= found
        unused += [] if found else [pattern]
    if unused or not chosen:
        raise CoverageError(
            "a name that was asked for is no tensor of the model",
            where="names",
            expected="patterns of HF names, or of the groups in `metadata`",
            got=", ".join(unused) or "none",
            fix="look them up in stream.metadata() or plan.metadata()",
        )
    return chosen


def _left_early() -> BridgeError:
    return BridgeError(
        "it left the stream before its end",
        where="a loop over the stream",
        expected="all ranks to iterate to the end",
        got="a break, or an error in the loop's body",
        fix="look at that rank's own error; used in a `with`, a pass tells it to all",
    )


def _in_dtype(meta: TensorMeta, dtype: str) -> TensorMeta:
    return meta._replace(dtype=dtype, nbytes=prod(meta.shape) * dtype_of(dtype).itemsize)
