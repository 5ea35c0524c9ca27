"""On which device ranks speak to one another, and on which they exchange parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bridge_core.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from bridge_core.runtime.live import LiveModel


_beside: tuple[Any, Any] | None = None  # the default group, and a gloo group of the same ranks


def words_group(group: Any) -> Any:
    """Where the ranks of a group say a few words to one another: that group, or one on gloo of the same ranks.

    NCCL does not say that a peer is gone: who waits for it is ended by a watchdog after minutes. gloo says so at once.
    Beside a default group of NCCL alone one on gloo is made, once; its first use is collective over the default group.
    Other groups are left as they are, for nobody else would be here to make one: give them "cpu:gloo,cuda:nccl".
    """
    import torch.distributed as dist

    global _beside
    if "cpu" in dist.get_backend_config(group) or group is not dist.group.WORLD:
        return group
    if _beside is None or _beside[0] is not group:
        _beside = group, dist.new_group(backend="gloo")
    return _beside[1]


def words_device(group: Any) -> torch.device:
    """The device of words in a group from `words_group`: the CPU if the group serves it, else this process's GPU.

    A group's backends are such as "cpu:gloo,cuda:gloo", "cuda:nccl", or "cpu:gloo,cuda:nccl".
    """
    import torch
    import torch.distributed as dist

    if "cpu" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def agreed_device(live: LiveModel, group: Any) -> torch.device:
    """The device of this rank's parameters, after all ranks have said that theirs are on devices of one kind.

    A rank without parameters takes the kind of the others. Collective over `group`: one small reduction.

    Raises:
        ConfigError: on every rank, if some keep parameters on a CPU and others on a GPU, or if the group cannot
            exchange them where they are.
    """
    import torch
    import torch.distributed as dist

    held = {home.tensor.device.type for home in live.homes.values()}
    kinds, words = ("cpu", "cuda"), words_group(group)
    said = torch.tensor([int(kind in held) for kind in kinds], device=words_device(words))
    dist.all_reduce(said, op=dist.ReduceOp.MAX, group=words)
    found = [kind for kind, there in zip(kinds, said.tolist(), strict=True) if there]
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
            where=f"backends {backends}",
            expected=f"a backend for {found[0]}",
            fix='make the default group with backend="cpu:gloo,cuda:nccl", or move the model',
        )
    return torch.device("cuda", torch.cuda.current_device()) if found[0] == "cuda" else torch.device("cpu")
