"""Export of a live quantised model: agree, plan, pack where the weights are, check, and only then give it its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from bridge_core import AutoBridge
from bridge_core.checkpoint.hf_folder import HfFolder, open_hf
from bridge_core.checkpoint.hf_layout import lay_out_files
from bridge_core.checkpoint.hf_output import carried_files
from bridge_core.checkpoint.output import check_apart, check_free, real_path, write_folder
from bridge_core.checkpoint.workers import jointly
from bridge_core.dtypes import dtype_of
from bridge_core.errors import ConfigError, OutputError, preview
from bridge_core.runtime.agreement import agreed_dtypes, check_size, check_whole
from bridge_core.runtime.file_owners import Sent
from bridge_core.runtime.homes import unwrap
from bridge_core.runtime.live import LiveModel, open_live
from bridge_core.runtime.words import default_group
from bridge_core.runtime.workers import TorchWorkers
from bridge_quant_export.beside import Beside
from bridge_quant_export.formats.format import WRITERS, Writer
from bridge_quant_export.live.agree import Ranges, agreed_formats, agreed_ranges, check_ranges
from bridge_quant_export.live.files import PackedFiles
from bridge_quant_export.live.fused import share_fused
from bridge_quant_export.live.held import Held, read_held
from bridge_quant_export.live.one_writer import OwnedFiles
from bridge_quant_export.live.policy import Uncalibrated, check_policy, check_settled, settle
from bridge_quant_export.live.vectors import summed
from bridge_quant_export.manifest import Manifest, make_manifest


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export did; the bytes are this rank's.

    Attributes:
        output: the folder.
        tensors: tensors in it.
        formats: how many layers of Hugging Face's are in which format, by name.
        bytes_written: bytes of tensors that this rank wrote.
        bytes_sent: bytes, packed or not, that it sent to other ranks.
        files: weight files that it opened for writing.
    """

    output: Path
    tensors: int
    formats: Mapping[str, int]
    bytes_written: int
    bytes_sent: int
    files: tuple[str, ...]


def export_quantized(
    model: Any,
    path: str | Path,
    *,
    bridge: AutoBridge,
    groups: Any = None,
    group: Any = None,
    format: Writer = "modelopt",
    dtype: str | torch.dtype | None = None,
    uncalibrated: Uncalibrated = "error",
    ranges: Ranges = "equal",
    kv_at_least_one: bool = True,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    durable: bool = False,
    one_writer_per_file: bool = False,
    bucket_bytes: int = 256 * 1024 * 1024,
) -> ExportReport:
    """Write a live ModelOpt-quantised model as a checkpoint that serving engines load. Collective over `group`.

    All ranks call it with the same arguments and see `path`. Every weight is packed on the rank that holds it, in the
    dtype that it has there; all of the folder is the same to the byte in every layout. The folder gets its name last.

    Args:
        model: chunks of this rank, wrapped or not, on CPU or GPU; real (compressed) quantisation is not read.
        path: output folder.
        bridge: of the HF model. If it has a folder, tokenizer and other files are carried along.
        groups: process groups of the model; by default those it was built with.
        group: all ranks of the model; by default torch's default group.
        format: `modelopt`, for vLLM, SGLang and TensorRT-LLM; or `compressed-tensors`, for vLLM, SGLang and
            transformers.
        dtype: of what is not quantised; by default that of the parameters.
        uncalibrated: what to do with layers whose inputs were never seen: `error`, `peers` or `weight_only`.
        ranges: `equal`: refuse ranges that differ between ranks that share a tensor; `maximum`: take the largest.
        kv_at_least_one: never scale keys and values up, as ModelOpt does by default.
        max_shard_size: bytes per file.
        overwrite: replace a folder that holds something.
        durable: wait for the disk before the folder gets its name.
        one_writer_per_file: every weight file is made and written by one rank, for file systems that cannot take
            writes from several nodes to one file. The others keep what they packed in a temporary file, and send it.
        bucket_bytes: bytes that a rank sends at a time with `one_writer_per_file`.

    Raises:
        FormatError: a layer is quantised in a way that no reader takes in this format.
        CalibrationError: a range is missing, zero, not finite, or not the same on the ranks that share it.
        CoverageError: the model does not match the bridge; or what was written is not what was planned.
        BridgeError: on every rank, with the message of the first one that failed.
    """
    group = group or default_group()
    workers = TorchWorkers(group)
    output = real_path(Path(path))
    chunks = unwrap(model)
    groups = groups or getattr(next(iter(chunks), None), "pg_collection", None)
    check_size(model, groups, group)

    def look() -> tuple[LiveModel, Held, HfFolder | None]:
        if format not in WRITERS:
            raise ConfigError("no such checkpoint format", where="format", expected=", ".join(WRITERS), got=format)
        check_policy(uncalibrated)
        check_ranges(ranges)
        check_free(output, overwrite=overwrite)
        if bridge.path is not None:
            check_apart(output, bridge.path)
        like = open_hf(bridge.path) if bridge.path and any(bridge.path.glob("*.safetensors")) else None
        inventory = None if like is None else like.shapes
        live = open_live(model, bridge.family, bridge.fields, groups=groups, inventory=inventory, ignore=bridge.ignore)
        return live, read_held(live, chunks), like

    live, held, like = jointly(workers, look)
    check_whole(live, group)
    live.renew()
    held = _calibrated(live, held, groups, group, workers, uncalibrated, ranges)
    held = jointly(workers, lambda: share_fused(held, live.plan, format))
    formats, kv_layers = agreed_formats(held, workers)
    dtypes = agreed_dtypes(live, dtype, group)

    def plan() -> tuple[Manifest, Beside, PackedFiles]:
        manifest = make_manifest(live.plan, formats, writer=format, dtypes=dtypes, kv_layers=kv_layers)
        layout = lay_out_files(manifest.shapes, manifest.dtypes, max_shard_size)
        how: dict[str, Any] = {"writer": format, "kv_at_least_one": kv_at_least_one}
        if one_writer_per_file:
            files = OwnedFiles(live, layout, groups, held, **how, group=group, bucket_bytes=bucket_bytes)
        else:
            files = PackedFiles(live, layout, groups, held, **how)
        files.check_cuts()
        config = bridge.family.consistent(bridge.config, bridge.fields)
        carried = None if like is None else (like.path, carried_files(like))
        return manifest, Beside.of(manifest, format, config, carried), files

    manifest, beside, files = jointly(workers, plan)
    sent = _write(output, files, manifest, beside, workers, group, overwrite=overwrite, durable=durable)
    return ExportReport(
        output=output,
        tensors=len(manifest.shapes),
        formats={found.name: len(names) for found, names in manifest.layers.formats.items()},
        bytes_written=sent.written,
        bytes_sent=sent.sent,
        files=sent.files,
    )


def _calibrated(
    live: LiveModel,
    held: Held,
    groups: Any,
    group: Any,
    workers: TorchWorkers,
    uncalibrated: Uncalibrated,
    ranges: Ranges,
) -> Held:
    """The same, with ranges for everything, which all ranks agree on. Collective."""
    agreed_formats(held, workers)  # ranks that disagree would not take part in the same reductions
    places = [(entry.name, entry.layers) for entry in live.plan.entries]
    settled = Held(tuple(jointly(workers, lambda: settle(held.weights, uncalibrated, places, group))), held.kv)
    workers.together(lambda: check_settled(settled.weights, uncalibrated))
    return agreed_ranges(live, settled, groups, workers, ranges)


def _write(
    output: Path,
    files: PackedFiles,
    manifest: Manifest,
    beside: Beside,
    workers: TorchWorkers,
    group: Any,
    *,
    overwrite: bool,
    durable: bool,
) -> Sent:
    """Write the folder: weights by all ranks, everything else by rank 0. Collective."""

    def prepare(folder: Path) -> None:
        files.create(folder)
        beside.copy(folder)

    return write_folder(
        output,
        files.layout.nbytes,
        workers,
        prepare,
        lambda folder, rank, size: files.write(folder),
        lambda folder: beside.finish(folder, files.layout),
        overwrite=overwrite,
        durable=durable,
        check=lambda: check_written(files, manifest, group),
    )


def check_written(files: PackedFiles, manifest: Manifest, group: Any) -> None:
    """Raise unless every tensor of the manifest was written: as many bytes of each as it has, by all ranks together.

    Collective; all ranks raise alike.

    Raises:
        OutputError: names the first tensors of which too little or too much was written.
    """
    mine = torch.tensor([files.written[name] for name in manifest.shapes], dtype=torch.int64)
    wanted = torch.tensor(
        [
            prod(shape) * dtype_of(dtype).itemsize
            for shape, dtype in zip(manifest.shapes.values(), manifest.dtypes.values(), strict=True)
        ],
        dtype=torch.int64,
    )
    found = summed(mine, group)
    wrong = torch.nonzero(found != wanted).flatten().tolist()
    if wrong:
        names = list(manifest.shapes)
        raise OutputError(
            f"{len(wrong)} tensor(s) were not written as planned",
            where=preview([names[at] for at in wrong]),
            expected=f"{wanted[wrong[0]].item()} bytes of {names[wrong[0]]}",
            got=f"{found[wrong[0]].item()} bytes",
            fix="nothing was left behind; this is a fault of the library, please report it",
        )
