"""`bridge-peft`'s conversions shared by several processes, with a fault in one of them.

As a job for the pool of ranks, or as a program under torchrun: `fault_jobs.py RANK FAULT ARGUMENTS...`.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


def disk_is_full(*arguments: Any, **options: Any):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cannot_see_the_source(path: Any, *arguments: Any, **options: Any):
    from bridge_core.errors import CheckpointError

    raise CheckpointError("no such folder", where=path, expected="the folder", got="nothing", fix="mount it")


def has_no_memory(*arguments: Any, **options: Any):
    raise MemoryError("no memory left")


def is_killed(*arguments: Any, **options: Any):
    os.kill(os.getpid(), signal.SIGKILL)


# Verb -> what of the library is replaced where a folder is looked at, where values are written, and gathered before.
PLACES = {
    "export": ("offline.find_checkpoint", "adapter_file.AdapterFile.write"),
    "import": ("offline.open_adapter", "offline._write_values"),
    "save": ("ranks.AdapterFile.create", "ranks.AdapterFile.write", "gather.owns"),
    "checkpoint": ("rank_checkpoints.check_free", "rank_checkpoints.adapter_entries"),
}
FAULTS = {
    "mount": (0, cannot_see_the_source),
    "disk": (1, disk_is_full),
    "kill": (1, is_killed),
    "memory": (2, has_no_memory),
}


@contextmanager
def faulty(verb: str, fault: str, *, here: bool) -> Iterator[None]:
    """One of the functions that `verb` calls does not do its work, if `here`."""
    if not here:
        yield
        return
    place, substitute = FAULTS[fault]
    with patch(f"bridge_peft.converting.{PLACES[verb][place]}", substitute):
        yield


def convert(verb: str, fault: str, rank: int, source: str, out: str, hf: str) -> str:
    """An offline conversion shared by the job's ranks; the error's text, which every rank must have."""
    import torch.distributed as dist

    from bridge_core.errors import BridgeError
    from bridge_core.runtime.words import default_group
    from bridge_core.runtime.workers import TorchWorkers
    from bridge_peft import export_adapter_ckpt, import_adapter_ckpt

    call = {"export": export_adapter_ckpt, "import": import_adapter_ckpt}[verb]
    with faulty(verb, fault, here=dist.get_rank() == rank):
        try:
            call(source, out, hf, workers=TorchWorkers(default_group()))
        except (BridgeError, OSError) as error:
            return str(error)
    return ""


def save(verb: str, fault: str, rank: int, hf: str, out: str, layout: dict[str, Any]) -> str:
    """A live model's adapter to an HF folder or to a checkpoint; the error's text, which every rank must have."""
    import torch.distributed as dist
    from convert_jobs import adapted
    from hf_cases import LORA

    from bridge_core.errors import BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_peft import save_adapter_ckpt, save_hf_adapter

    with host_backend():
        bridge, _, chunks = adapted(hf, layout, LORA)
        call = {"save": save_hf_adapter, "checkpoint": save_adapter_ckpt}[verb]
        with faulty(verb, fault, here=dist.get_rank() == rank):
            try:
                call(chunks, out, bridge)
            except (BridgeError, OSError, MemoryError) as error:
                return str(error)
        return ""


if __name__ == "__main__":
    from bridge_peft.cli import main

    rank, fault, *arguments = sys.argv[1:]
    with faulty(arguments[0], fault, here=os.environ["RANK"] == rank):
        sys.exit(main(arguments))
