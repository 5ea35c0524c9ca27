"""`bridge-core` with a fault in one of its workers: `broken_worker.py RANK FAULT ARGUMENTS...`."""

from __future__ import annotations

import errno
import os
import signal
import sys

from bridge_core.checkpoint import convert
from bridge_core.cli import main
from bridge_core.errors import CheckpointError


def disk_is_full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cannot_see_the_source(path):
    raise CheckpointError("no such folder", where=path, expected="the folder", got="nothing", fix="mount it")


def is_killed(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS = {
    "disk": ("transfer", disk_is_full),
    "mount": ("open_hf", cannot_see_the_source),
    "kill": ("transfer", is_killed),
}

if __name__ == "__main__":
    rank, fault, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank and fault in FAULTS:
        setattr(convert, *FAULTS[fault])
    sys.exit(main(arguments))
