"""Jobs for the pool: what a stream brings, in which collectives, and who hears of it when a rank leaves it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from runtime.helpers import errors_of

_COLLECTIVES = ("all_", "reduce", "broadcast", "gather", "scatter", "barrier", "monitored_barrier")


class Called(NamedTuple):
    """A collective: its function, and the tensor that it was given, if that was one."""

    name: str
    tensor: Any


def _load(path: str, layout: dict[str, Any], ignore: Collection[str] = (), **fields: Any):
    from bridge_core import AutoBridge
    from bridge_core.testing.mcore_jobs import build

    bridge = AutoBridge.from_hf_pretrained(path, ignore=tuple(ignore))
    _, _, chunks = build(bridge.fields | fields, layout, spec="host", vocab_divisible_by=16)
    bridge.load_hf_weights(chunks)
    return bridge, chunks


@contextmanager
def _spying() -> Iterator[list[Called]]:
    """Yields the collectives of torch.distributed as they are called; not those that these call themselves."""
    import torch
    import torch.distributed as dist

    calls: list[Called] = []
    inside = threading.local()

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if getattr(inside, "yes", False):
                return function(*args, **kwargs)
            calls.append(Called(name, args[0] if args and isinstance(args[0], torch.Tensor) else None))
            inside.yes = True
            try:
                return function(*args, **kwargs)
            finally:
                inside.yes = False

        return call

    originals = {name: value for name, value in vars(dist).items() if callable(value) and name.startswith(_COLLECTIVES)}
    for name, function in originals.items():
        setattr(dist, name, noting(name, function))
    try:
        yield calls
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def export(path: str, layout: dict[str, Any], names: Collection[str], bucket_bytes: int):
    """Both ways to the same tensors; of the stream, the collectives and the bucket that each tensor came in."""
    import torch

    from bridge_core.runtime.host import host_backend

    with host_backend():
        bridge, chunks = _load(path, layout)
        with _spying() as making:
            stream = bridge.stream(chunks, names=names, bucket_bytes=bucket_bytes)
        with _spying() as calls:
            tensors = dict(stream)
        exported = dict(bridge.export_hf_weights(chunks, names=names, bucket_bytes=bucket_bytes, cpu=True))
    # A bucket is the memory that one collective over int32 is given; its tensors are views of it.
    given = [call.tensor for call in calls if call.tensor is not None]
    sent = [tensor.untyped_storage() for tensor in given if tensor.dtype == torch.int32]
    bucket_at = {storage.data_ptr(): number for number, storage in enumerate(sent)}
    return {
        "stream": {name: tensor.clone() for name, tensor in tensors.items()},
        "exported": exported,
        "metadata": stream.metadata(),
        "planned": bridge.plan().metadata(),
        "bucket": {name: bucket_at.get(t.untyped_storage().data_ptr()) for name, t in tensors.items()},
        "sizes": [storage.nbytes() for storage in sent],
        "making": [call.name for call in making],
        "running": [call.name for call in calls],
    }


def refused(path: str, layout: dict[str, Any], options: dict[str, Any]) -> str:
    """A stream that cannot be; what this rank is told."""
    from bridge_core.runtime.host import host_backend

    with host_backend():
        bridge, chunks = _load(path, layout)
        (told,) = errors_of(lambda: bridge.stream(chunks, **options))
    return told


def arrivals(path: str, layout: dict[str, Any], bucket_bytes: int, *, fp8: bool = False, ignore: Collection[str] = ()):
    """The bytes of each tensor of a stream, as they arrive, and how many buckets had arrived until then.

    With `fp8` the model is in bfloat16.
    """
    import torch

    from bridge_core.runtime.host import host_backend

    with host_backend():
        fields = {"params_dtype": torch.bfloat16} if fp8 else {}
        bridge, chunks = _load(path, layout, ignore, **fields)
        stream, found = bridge.stream(chunks, fp8=fp8, bucket_bytes=bucket_bytes), []
        with _spying() as calls:
            for name, tensor in stream:
                buckets = sum(call.tensor is not None and call.tensor.dtype == torch.int32 for call in calls)
                found.append((name, tensor.contiguous().view(torch.uint8).clone(), buckets))
    return stream.metadata(), found


@contextmanager
def planning() -> Iterator[list[str]]:
    """Yields what is planned, as it is: plans, entries, cuts for a coordinate, shards of a rank, tensors to send."""
    from bridge_core.plan import plan

    steps: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            steps.append(name)
            return function(*args, **kwargs)

        return call

    places = [(plan.Plan, name) for name in ("__init__", "_cut", "iter_local_shards")]
    places += [(plan, name) for name in ("compile_entries", "shards_of", "TensorMeta")]
    originals = [(where, name, getattr(where, name)) for where, name in places]
    for where, name, function in originals:
        setattr(where, name, noting(name, function))
    try:
        yield steps
    finally:
        for where, name, function in originals:
            setattr(where, name, function)


def train_and_stream_again(path: str, layout: dict[str, Any]):
    """A kept stream before and after an optimizer's step that halves every weight; what was planned for each."""
    import torch

    from bridge_core.runtime.host import host_backend

    with host_backend():
        bridge, chunks = _load(path, layout)
        with planning() as made:
            stream = bridge.stream(chunks, bucket_bytes=60_000)
        with planning() as first:
            before = {name: tensor.clone() for name, tensor in stream}
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        torch.optim.SGD(parameters, lr=0.5).step()
        with planning() as second:
            after = {name: tensor.clone() for name, tensor in stream}
    return {"before": before, "after": after, "made": made, "passes": [*first, *second]}


def leave(path: str, layout: dict[str, Any], way: str, at: int):
    """A caller's hook fails at a tensor on rank 1; what this rank is told, and what it streams afterwards."""
    import torch.distributed as dist

    from bridge_core import BridgeError
    from bridge_core.runtime.host import host_backend

    with host_backend():
        bridge, chunks = _load(path, layout)
        count = len(bridge.stream(chunks).metadata())
        seen: list[str] = []

        def hook(name: str) -> None:
            seen.append(name)
            if dist.get_rank() == 1 and len(seen) == at % count + 1:
                raise HookError(f"no place for {name}")

        kept = None
        try:
            _WAYS[way](bridge, chunks, hook)
            told = "no error"
        except (BridgeError, HookError) as error:
            kept, told = error, f"{type(error).__name__}: {error}"  # with its frames, as a trainer's log would
        again = [name for name, _ in bridge.export_hf_weights(chunks)]
        del kept
    return told, len(seen), count, again


def fail(path: str, layout: dict[str, Any], way: str):
    """Rank 1 cannot fill its part of the third bucket; what this rank is told, and what it streams afterwards."""
    import torch
    import torch.distributed as dist

    from bridge_core import BridgeError
    from bridge_core.runtime.host import host_backend

    zeros, made = torch.zeros, []

    def scarce(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        if len(made) == 3:
            raise MemoryError("no memory left on this rank")
        return zeros(*args, **kwargs)

    with host_backend():
        bridge, chunks = _load(path, layout)
        stream = bridge.stream(chunks, dtype="float16", bucket_bytes=20_000)
        largest = [parameter.detach().view(-1)[:1] for chunk in chunks for parameter in chunk.parameters()]
        kept = [value.clone() for value in largest]
        seen: list[str] = []
        try:
            if dist.get_rank() == 1 and way == "memory":
                torch.zeros = scarce
            elif dist.get_rank() == 1:
                for value in largest:
                    value.fill_(1e30)
            seen += (name for name, _ in stream)
            told = "no error"
        except (BridgeError, MemoryError) as error:
            told = f"{type(error).__name__}: {error}"
        finally:
            torch.zeros = zeros
            for value, before in zip(largest, kept, strict=True):
                value.copy_(before)
        again = {name: tensor.clone() for name, tensor in bridge.export_hf_weights(chunks)}
    return told, seen, again


class HookError(Exception):
    """What a caller's hook raises."""


def _directly(bridge, chunks, hook) -> None:
    for name, _ in bridge.export_hf_weights(chunks, bucket_bytes=20_000):
        hook(name)


def _inside(bridge, chunks, hook) -> None:
    with bridge.export_hf_weights(chunks, bucket_bytes=20_000) as tensors:
        for name, _ in tensors:
            hook(name)


def _source(bridge, chunks, hook) -> None:
    with iter(bridge.weight_source(chunks, bucket_bytes=20_000)) as tensors:
        for name, _ in tensors:
            hook(name)


def _before(bridge, chunks, hook) -> None:
    with bridge.export_hf_weights(chunks, bucket_bytes=20_000) as tensors:
        hook("a connection")  # fails on one rank when the others have begun
        for name, _ in tensors:
            hook(name)


_WAYS = {"for": _directly, "with": _inside, "source": _source, "before": _before}
