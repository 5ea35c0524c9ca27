"""What a process runs that a test kills: a conversion, after it has said that it is about to begin."""

from __future__ import annotations

from multiprocessing.connection import Connection

from bridge_core.checkpoint.convert import Options, Report, export_ckpt, import_ckpt


def convert(direction: str, source: str, output: str) -> Report:
    run = {"import": import_ckpt, "export": export_ckpt}[direction]
    return run(source, output, options=Options(overwrite=True))


def begin(ready: Connection, direction: str, source: str, output: str) -> None:
    ready.send("ready")
    convert(direction, source, output)
    ready.send("done")
