"""What ranks have to agree on before weights move: device, dtypes, ranges, and that they are about to do the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

from bridge_core.checkpoint.matching import check_wanted
from bridge_core.dtypes import dtype_of
from bridge_core.errors import ConfigError, CoverageError, LayoutError, preview
from bridge_core.runtime.homes import unwrap
from bridge_core.runtime.live import LiveModel
from bridge_core.runtime.tensors import default_device, dtype_name
from bridge_core.runtime.words import words_device
from bridge_core.runtime.workers import TorchWorkers, noticing_loss

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def agreed_device(live: LiveModel, group: Any) -> torch.device:
    """The device of this rank's parameters, after all ranks have said that theirs are on devices of one kind.

    A rank without parameters takes the kind of the others. Collective over `group`.

    Raises:
        ConfigError: on every rank, if some keep parameters on a CPU and others on a GPU, or if the group cannot
            exchange them where they are.
    """
    import torch
    import torch.distributed as dist

    held = {home.tensor.device.type for home in live.homes.values()}
    found = sorted({kind for kinds in TorchWorkers(group).share(sorted(held)) for kind in kinds})
    backends = dist.get_backend_config(group)
    if len(found) > 1:
        raise ConfigError(
            "parameters are on a CPU and on GPUs",
            where=f"rank {live.rank}: {', '.join(sorted(held)) or 'none'}",
            expected="one kind of device on all ranks",
            got=" and ".join(found),
            fix="move the whole model, on every rank, to one of them",
        )
    if not found:
        return words_device(group)
    if found[0] not in backends:
        raise ConfigError(
            f"the process group cannot exchange parameters that are on a {found[0].upper()}",
            where="the group of all ranks",
            expected=f"a backend for {found[0]}",
            got=backends,
            fix='make the default group with backend="cpu:gloo,cuda:nccl", or move the model',
        )
    elsewhere = default_device() if found == ["cuda"] else torch.device("cpu")
    return next((home.tensor.device for home in live.homes.values()), elsewhere)


def check_size(model: Any, groups: Any, group: Any) -> None:
    """Raise if a group cannot be the ranks of a model, by its size. Not collective.

    Whoever forgot to pass `group` would wait in the default group for ranks that never come; so nobody is asked. A
    model that is none passes, and is refused in a step of all ranks.

    Args:
        model: chunks of this rank.
        groups: its process groups; None for those that it was built with.
        group: said to be all ranks of the model.

    Raises:
        LayoutError: the model has another number of ranks.
    """
    chunk = next(iter(unwrap(model)), None)
    groups = groups if groups is not None else getattr(chunk, "pg_collection", None)
    sizes = [getattr(getattr(groups, axis, None), "size", lambda: 0)() for axis in ("tp", "cp", "dp", "pp")]
    if (ranks := prod(sizes)) and ranks != group.size():
        raise LayoutError(
            "the ranks of the group are not those of the model",
            where="group",
            expected=f"{ranks} ranks, as the model's process groups say (tp, cp, dp, pp: {sizes})",
            got=f"{group.size()} ranks",
            fix="pass group=..., the ranks of this model and no others",
        )


def check_whole(live: LiveModel, group: Any) -> None:
    """Raise on all ranks unless those of a group are the ranks of the model's layout, each once. Collective.

    Ranks of two copies of a model, say, would both give what one of them owns.

    Raises:
        LayoutError: on every rank.
    """
    size = live.plan.layout.world_size
    workers = TorchWorkers(group)
    said = workers.share([live.rank, size])
    if sorted(rank for rank, _ in said) != list(range(size)) or {size for _, size in said} != {size}:
        raise LayoutError(
            "the ranks of the group are not those of the model",
            where="group",
            expected=f"{size} ranks, as the model's process groups say, each once",
            got="; ".join(
                f"{workers.number_of(number)}: rank {rank} of {size}" for number, (rank, size) in enumerate(said)
            ),
            fix="pass group=..., the ranks of this model and no others",
        )


def agreed_dtypes(live: LiveModel, wanted: str | torch.dtype | None, group: Any) -> dict[str, str]:
    """The dtype of every HF tensor made from a live model, by name. Collective over `group`.

    Tensors whose dtype is not the model's (`Entry.dtype`) keep the one their parameter has; all others get
    `wanted`, or the dtype that all their parameters share.

    Raises:
        CoverageError: on every rank, if parameters differ in dtype and none is wanted. Nothing is cast unasked.
    """
    mine: dict[str, list[str]] = {}
    for shard in live.shards:
        found = mine.setdefault(shard.entry, [])
        if (name := dtype_name(live.tensor(shard))) not in found:
            found.append(name)
    workers = TorchWorkers(group)
    held = {workers.number_of(rank): said for rank, said in enumerate(workers.share(mine))}
    by_entry: dict[str, set[str]] = {}
    for said in held.values():
        for entry, names in said.items():
            by_entry.setdefault(entry, set()).update(names)
    check_wanted(wanted)
    main = dtype_of(wanted).name if wanted else None
    entries = live.plan.entries
    if main is None:
        main = _one(
            set().union(*(by_entry.get(e.name, set()) for e in entries if e.dtype is None)), "the parameters", held
        )
    dtypes: dict[str, str] = {}
    for entry in entries:
        dtype = main if entry.dtype is None else _one(by_entry[entry.name], entry.name, held)
        dtypes |= {name: dtype for name, _ in entry.hf_names()}
    return dtypes | {name: dtypes[copy.of] for name, copy in live.plan.copies.items()}


def _one(found: set[str], what: str, held: dict[int, dict[str, list[str]]]) -> str:
    if len(found) == 1:
        return next(iter(found))
    said = {rank: sorted({name for names in by_entry.values() for name in names}) for rank, by_entry in held.items()}
    raise CoverageError(
        f"{what} differ in dtype",
        expected="one dtype on all ranks, or `dtype` to say which to write",
        got="; ".join(f"rank {rank}: {', '.join(names) or 'none'}" for rank, names in said.items()),
        fix="pass dtype=..., or give the parameters one dtype where that has no effect",
    )


def check_same(mine: bytes, group: Any, *, what: str, where: str, fix: str) -> None:
    """Raise on all ranks unless all of them have the same bytes to show. Collective over `group`.

    Args:
        mine: what this rank is about to do, as bytes; a digest of it is exchanged.
        what, where, fix: facts of the error.

    Raises:
        ConfigError: on every rank; names those that differ from the first.
    """
    workers = TorchWorkers(group)
    said = workers.share(hashlib.sha256(mine).hexdigest())
    if others := [workers.number_of(rank) for rank, digest in enumerate(said) if digest != said[0]]:
        raise ConfigError(
            what,
            where=where,
            expected="the same arguments, and the same HF folder to see, on every rank",
            got=f"rank {workers.number_of(0)} and ranks {preview(others)} differ",
            fix=fix,
        )


def combine(data: Tensor, group: Any, reduction: Callable[[Tensor], Tensor]) -> None:
    """Reduce a flat tensor over the ranks of a group, element by element, in place. Collective over `group`.

    Every rank reduces a part that all others send it, and sends it to all: a lost rank is noticed by all of them, which
    it is not by gloo's all-reduce. That goes round a ring, in half the time: it is for weights, this for what is said
    of them.

    Args:
        data: as many elements on every rank, on a device that the group serves.
        group: the ranks.
        reduction: of some elements of all ranks [ranks, n], to [n] of the same dtype.

    Raises:
        LostWorkerError: a rank is gone.
    """
    import torch
    import torch.distributed as dist

    size, rank = group.size(), group.rank()
    counts = [part.numel() for part in data.tensor_split(size)]
    mine = counts[rank]
    received = torch.empty(mine * size, dtype=data.dtype, device=data.device)
    with noticing_loss():
        dist.all_to_all_single(received, data, [mine] * size, counts, group=group)
        reduced = reduction(received.view(size, -1)) if mine else received
        dist.all_to_all_single(data, reduced.repeat(size), counts, [mine] * size, group=group)
