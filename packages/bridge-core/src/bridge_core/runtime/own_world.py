"""A default process group of one's own, for code that knows no other: megatron-core's `dist_checkpointing`.

A rank that fails in the middle of such code leaves its peers waiting in a collective, and the group's collectives out
of step for good. On a group that is theirs alone, both can be mended: the rank gives the group up, its peers get an
error at once, and the caller's groups, which have seen none of this, serve to agree on what happened.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from bridge_core.runtime.workers import LostWorkerError, is_loss

T = TypeVar("T")


class OwnWorld:
    """All ranks of torch's default process group, in a second group, on gloo.

    gloo serves tensors on a CPU and on a GPU, and says at once that a peer has closed its connections; NCCL does not.

    Entering is collective over the default group. Leave only when all ranks are known to be done: a rank that
    leaves closes its connections. Nothing else of the process may use the default group during a step.
    """

    def __enter__(self) -> OwnWorld:
        import torch.distributed as dist

        self._group: Any = dist.new_group(list(range(dist.get_world_size())), backend="gloo")
        return self

    def step(self, step: Callable[[], T]) -> T:
        """Run `step` with this group in the place of the default one.

        An error in it ends the group, here and, by their broken connections, on the ranks that wait for this one.

        Raises:
            LostWorkerError: another rank gave up, or is gone; it knows why.
        """
        import torch.distributed as dist

        before = dist.group.WORLD
        dist.group.WORLD = self._group
        try:
            return step()
        except BaseException as error:
            dist.group.WORLD = before
            lost = is_loss(error)
            text = str(error)
            self._give_up(error)
            if lost:
                raise LostWorkerError(text) from None
            raise
        finally:
            dist.group.WORLD = before

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._group is not None:
            self._give_up(error)

    def _give_up(self, error: BaseException | None) -> None:
        """Close all connections. gloo does so when nobody refers to the group any more, frames of an error included."""
        import torch.distributed as dist

        for related in _chain(error):
            traceback.clear_frames(related.__traceback__)
        dist.destroy_process_group(self._group)
        self._group = None
        gc.collect()


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and those it came from."""
    found: list[BaseException] = []
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and one not in found:
            found.append(one)
            waiting += [one.__cause__, one.__context__]
    return found
