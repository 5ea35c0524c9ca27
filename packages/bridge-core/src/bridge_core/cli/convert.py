"""`bridge-core import` and `bridge-core export`: one checkpoint to the other, alone or under torchrun."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from bridge_core.cli.options import UsageError
from bridge_core.cli.progress import bar
from bridge_core.cli.tables import facts, in_bytes
from bridge_core.errors import preview

if TYPE_CHECKING:
    from bridge_core.checkpoint.convert import Options, Report
    from bridge_core.checkpoint.variant import Variant
    from bridge_core.checkpoint.workers import Workers

DType = Annotated[
    Literal["bf16", "fp16", "fp32"] | None,
    "Convert floating-point tensors to this type; each keeps its own if not given.",
]
Overwrite = Annotated[
    bool, "Replace an output folder that holds something; it stays as it is until the new one is finished."
]
Durable = Annotated[
    bool, "Wait for the disk before the output gets its name, so that it also outlives a crash of the machine."
]
Threads = Annotated[int, "Copies in flight at a time, in each process."]
IgnoreOption = Annotated[
    tuple[str, ...], "Options of config.json to leave out of account although the family does not know them."
]
Rendezvous = Annotated[float, "Minutes to wait under torchrun until all processes are there."]
Json = Annotated[bool, "Print the report as JSON."]
Ignore = Annotated[
    tuple[str, ...], "HF names to leave out, as patterns of a shell (mtp.*, model.visual.*); the report names them."
]


@dataclass(frozen=True, kw_only=True)
class Import:
    """Convert an HF folder to a Megatron torch_dist folder, which loads at any parallel layout."""

    hf: Annotated[Path, "HF folder: config.json and safetensors files."]
    megatron: Annotated[Path, "Output folder; gets iter_0000000/ and latest_checkpointed_iteration.txt."]
    dtype: DType = None
    overwrite: Overwrite = False
    durable: Durable = False
    threads: Threads = 2
    rendezvous_minutes: Rendezvous = 10.0
    ignore: Ignore = ()
    ignore_option: IgnoreOption = ()
    json: Json = False

    def run(self) -> int:
        """Import, report."""
        from bridge_core.checkpoint.convert import import_ckpt

        def convert(options: Options, on_total: Callable[[int], None]) -> Report:
            return import_ckpt(
                self.hf,
                self.megatron,
                options=options,
                ignore=self.ignore,
                ignore_options=self.ignore_option,
                on_total=on_total,
                variant=self.variant(),
            )

        return _convert("imported", self, convert)

    def variant(self) -> Variant:
        """How the Megatron side is arranged; for commands that build on this one."""
        from bridge_core.checkpoint.variant import PLAIN

        return PLAIN


@dataclass(frozen=True, kw_only=True)
class Export:
    """Convert a Megatron torch_dist folder, saved at any parallel layout, to an HF folder."""

    megatron: Annotated[Path, "Folder of a run (its latest iteration is taken) or of one iteration."]
    hf: Annotated[Path, "Output folder."]
    source: Annotated[
        Path | None,
        "HF folder whose file layout, config.json, tokenizer and other files to use; its weights are not read.",
    ] = None
    hf_config: Annotated[
        Path | None, "config.json, for a checkpoint that does not say how its model is configured."
    ] = None
    max_shard_size: Annotated[
        str,
        "Bytes per weight file where no --source says how to split: a number, kB, MB, GB, TB (or KiB, MiB, GiB, TiB).",
    ] = "2GB"
    fp8: Annotated[
        bool, "Quantise the weights that the family's fp8 checkpoints quantise, with a scale per 128 x 128 block."
    ] = False
    ignore: Ignore = ()
    dtype: DType = None
    overwrite: Overwrite = False
    durable: Durable = False
    threads: Threads = 2
    ignore_option: IgnoreOption = ()
    rendezvous_minutes: Rendezvous = 10.0
    json: Json = False

    def run(self) -> int:
        """Export, report."""
        from bridge_core.checkpoint.convert import export_ckpt

        max_shard_size = size_in_bytes(self.max_shard_size)

        def convert(options: Options, on_total: Callable[[int], None]) -> Report:
            return export_ckpt(
                self.megatron,
                self.hf,
                source=self.source,
                hf_config=self.hf_config,
                max_shard_size=max_shard_size,
                fp8=self.fp8,
                options=options,
                ignore=self.ignore,
                ignore_options=self.ignore_option,
                on_total=on_total,
                variant=self.variant(),
            )

        return _convert("exported", self, convert)

    def variant(self) -> Variant:
        """How the Megatron side is arranged; for commands that build on this one."""
        from bridge_core.checkpoint.variant import PLAIN

        return PLAIN


Run = Callable[["Options", Callable[[int], None]], "Report"]


def _convert(done: str, verb: Import | Export, convert: Run) -> int:
    from bridge_core.checkpoint.convert import Options

    with _workers(verb.rendezvous_minutes) as workers:
        started = time.perf_counter()
        with bar(done.removesuffix("ed"), workers=workers.size, quiet=workers.rank > 0) as shown:
            options = Options(
                dtype=verb.dtype,
                overwrite=verb.overwrite,
                durable=verb.durable,
                workers=workers,
                threads=verb.threads,
                progress=shown.progress,
            )
            report = convert(options, shown.on_total)
        seconds = time.perf_counter() - started
        if workers.rank == 0:
            print(json.dumps(to_dict(report, seconds)) if verb.json else _text(done, report, seconds))
    return 0


@contextmanager
def _workers(rendezvous_minutes: float) -> Iterator[Workers]:
    """This process alone, or under torchrun all that it started."""
    from bridge_core.checkpoint.workers import Alone
    from bridge_core.runtime.workers import torchrun_workers, world_size

    with (
        torchrun_workers(rendezvous_minutes=rendezvous_minutes) if world_size() > 1 else nullcontext(Alone()) as workers
    ):
        yield workers


def to_dict(report: Report, seconds: float) -> dict[str, Any]:
    """A report as JSON values; `moved` is what this process moved, by path taken."""
    return {
        "output": str(report.output),
        "family": report.family,
        "tensors": report.tensors,
        "nbytes": report.nbytes,
        "seconds": round(seconds, 3),
        "bytes_per_s": round(report.nbytes / seconds),
        "moved": report.moved._asdict(),
        "ignored": report.ignored,
        "carried": list(report.carried),
        "from_source": list(report.from_source),
    }


def _text(done: str, report: Report, seconds: float) -> str:
    reasons = Counter(report.ignored.values())
    left_out = [
        f"{count} x {reason}: {preview((name for name, why in report.ignored.items() if why == reason), limit=2)}"
        for reason, count in reasons.items()
    ]
    return facts([
        (done, f"{report.family}, {report.tensors} tensors, {in_bytes(report.nbytes)}"),
        ("to", report.output),
        ("in", f"{seconds:.2f} s, {in_bytes(report.nbytes / seconds)}/s"),
        ("carried", preview(report.carried)),
        ("from source", preview(report.from_source)),
        ("left out", "; ".join(left_out)),
    ])  # fmt: skip


_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def size_in_bytes(text: str) -> int:
    """A size such as `5GB` or `512MiB` in bytes.

    Raises:
        UsageError: the text is no positive size.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    size = float(found[1]) * _UNITS.get(found[2].upper(), 0) if found else 0
    if size < 1:
        raise UsageError(
            "a size is not understood",
            where="--max-shard-size",
            expected="a positive number and a unit: B, kB, MB, GB, TB, KiB, MiB, GiB or TiB",
            got=repr(text),
            fix="write it like 5GB",
        )
    return int(size)
