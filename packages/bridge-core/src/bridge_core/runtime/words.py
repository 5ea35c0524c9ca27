"""Where ranks speak to one another: the group of all of them, the group for words, and its device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bridge_core.errors import ConfigError

if TYPE_CHECKING:
    import torch

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


def default_group() -> Any:
    """torch's default process group; it is no state of Megatron's.

    Raises:
        ConfigError: there is none.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        raise ConfigError(
            "there is no process group",
            where="torch.distributed",
            expected="a default group of all ranks of the model, also if that is one rank",
            got="not initialised",
            fix='call torch.distributed.init_process_group("cpu:gloo,cuda:nccl") first ("gloo" without GPUs)',
        )
    return dist.group.WORLD
