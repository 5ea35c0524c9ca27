"""A saved quantised checkpoint to a folder for serving engines: one HF tensor at a time, packed as it is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bridge_core.checkpoint.convert import ASSETS
from bridge_core.checkpoint.files import OpenFiles, write_all
from bridge_core.checkpoint.hf_folder import HfFolder, open_hf, read_config
from bridge_core.checkpoint.hf_layout import HfLayout, lay_out_files
from bridge_core.checkpoint.hf_output import (
    carried_files,
    create_weight_files,
    stored_assets,
)
from bridge_core.checkpoint.matching import megatron_entries
from bridge_core.checkpoint.megatron_folder import MegatronFolder, export_plan, open_megatron
from bridge_core.checkpoint.output import check_apart, check_free, real_path, write_folder
from bridge_core.checkpoint.reading import Reader
from bridge_core.checkpoint.transfer import Job
from bridge_core.checkpoint.wiring import Wired, export_jobs
from bridge_core.checkpoint.workers import Alone, Workers, jointly
from bridge_core.dtypes import dtype_of
from bridge_core.errors import ConfigError
from bridge_core.geometry import whole
from bridge_core.plan import Plan
from bridge_core.runtime.shares import dealt
from bridge_core.runtime.tensors import cast, read_into, torch_dtype
from bridge_quant_export.beside import Beside
from bridge_quant_export.formats.format import WRITERS, Writer
from bridge_quant_export.formats.kv_cache import pack_kv
from bridge_quant_export.formats.packing import pack
from bridge_quant_export.live.agree import agreed_formats, agreed_ranges
from bridge_quant_export.live.fused import share_fused
from bridge_quant_export.live.held import Held, Weight
from bridge_quant_export.live.packed import Region, calibration_of, regions
from bridge_quant_export.live.policy import Uncalibrated, check_policy, check_settled, settle
from bridge_quant_export.manifest import Instance, Manifest, kv_name, kv_projection, make_manifest, module_of
from bridge_quant_export.saved.quantisers import read_saved, without_quantisers


@dataclass(frozen=True, kw_only=True)
class SavedReport:
    """What an export of a saved checkpoint did.

    Attributes:
        output: the folder.
        tensors: tensors in it.
        nbytes: bytes of them, all workers together.
        formats: how many layers of Hugging Face's are in which format, by name.
    """

    output: Path
    tensors: int
    nbytes: int
    formats: Mapping[str, int]


def export_saved(
    megatron_path: str | Path,
    hf_path: str | Path,
    *,
    source: str | Path | None = None,
    hf_config: str | Path | None = None,
    format: Writer = "modelopt",
    dtype: str | None = None,
    uncalibrated: Uncalibrated = "error",
    kv_at_least_one: bool = True,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    durable: bool = False,
    workers: Workers | None = None,
) -> SavedReport:
    """Write a saved ModelOpt-quantised checkpoint as one that serving engines load. Collective over `workers`.

    No model is built, and neither megatron-core nor ModelOpt is needed: the quantisers' settings and ranges are read
    from the checkpoint, which may have been saved in any layout. What is written is to the byte what
    `export_quantized` writes of the live model. Memory: one HF tensor for each worker.

    Args:
        megatron_path: a run's folder, or that of one iteration, with torch_dist tensors.
        hf_path: output folder.
        source: the HF folder of the unquantised model: its configuration is used, other files are carried along.
        hf_config: config.json, for a checkpoint that does not say how its model is configured, where no `source` is.
        format: the checkpoint format.
        dtype: of what is not quantised; by default that of the checkpoint.
        uncalibrated, kv_at_least_one, max_shard_size, overwrite, durable: as for `export_quantized`.
        workers: processes that share the work, each the packing of whole tensors; by default this one alone.

    Raises:
        FormatError: a layer is quantised in a way that no reader takes in this format, or none is.
        CalibrationError: a range is missing, zero or not finite.
        CheckpointError: the checkpoint is incomplete or corrupt.
        BridgeError: on all workers, if one fails; nothing that looks finished is left.
    """
    team = workers or Alone()

    def plan() -> _Ready:
        if format not in WRITERS:
            raise ConfigError("no such checkpoint format", where="format", expected=", ".join(WRITERS), got=format)
        check_policy(uncalibrated)
        check_free(Path(hf_path), overwrite=overwrite)
        output = real_path(Path(hf_path))
        for folder in (megatron_path, source):
            if folder is not None:
                check_apart(output, Path(folder))
        like = open_hf(source) if source is not None else None
        given = like.config if like else read_config(Path(hf_config)) if hf_config is not None else None
        return _plan(megatron_path, like, given, format, dtype, uncalibrated, max_shard_size, output)

    ready = jointly(team, plan)

    def prepare(folder: Path) -> None:
        create_weight_files(folder, ready.layout)
        ready.beside.copy(folder)

    write_folder(
        ready.output,
        ready.layout.nbytes,
        team,
        prepare,
        lambda folder, rank, size: _fill(ready, folder, rank, size, format, kv_at_least_one),
        lambda folder: ready.beside.finish(folder, ready.layout),
        overwrite=overwrite,
        durable=durable,
    )
    return SavedReport(
        output=Path(hf_path),
        tensors=len(ready.manifest.shapes),
        nbytes=ready.layout.tensor_nbytes,
        formats={found.name: len(names) for found, names in ready.manifest.layers.formats.items()},
    )


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """An export that was planned; nothing is written yet."""

    output: Path
    plan: Plan
    wired: Wired
    held: Held
    manifest: Manifest
    layout: HfLayout
    stored: Mapping[str, str]
    beside: Beside


class _One:
    """A process group of one."""

    def size(self) -> int:
        return 1


class _Team(Alone):
    """One worker that knows all that is to be agreed on: every worker has read the same checkpoint."""

    def share(self, value: Any) -> list[Any]:
        return [json.loads(json.dumps(value))]


def _plan(
    megatron_path: str | Path,
    like: HfFolder | None,
    given: Mapping[str, Any] | None,
    writer: Writer,
    dtype: str | None,
    uncalibrated: Uncalibrated,
    max_shard_size: int,
    output: Path,
) -> _Ready:
    saved = open_megatron(megatron_path, hf_config=given)
    checkpoint = replace(saved, dcp=without_quantisers(saved.dcp))
    plan = export_plan(checkpoint, inventory=like.shapes if like else None)
    plan.audit()
    wired = megatron_entries(plan, checkpoint)
    held, team = read_saved(plan, wired, saved.dcp), _Team()
    one: Any = _One()
    settled = settle(held.weights, uncalibrated, [(entry.name, entry.layers) for entry in plan.entries], one)
    check_settled(settled, uncalibrated)
    groups = SimpleNamespace(tp=one, dp_cp=one, expt_tp=one, expt_dp=one, ep=one)
    live: Any = SimpleNamespace(plan=plan)
    known: Any = team
    held = agreed_ranges(live, Held(tuple(settled), held.kv), groups, known, "equal")
    held = share_fused(held, plan, writer)
    formats, kv_layers = agreed_formats(held, known)
    stored = wired.hf_dtypes(None)
    dtypes = wired.hf_dtypes(dtype_of(dtype).name if dtype else None)
    manifest = make_manifest(plan, formats, writer=writer, dtypes=dtypes, kv_layers=kv_layers)
    layout = lay_out_files(manifest.shapes, manifest.dtypes, max_shard_size)
    return _Ready(
        output=output,
        plan=plan,
        wired=wired,
        held=held,
        manifest=manifest,
        layout=layout,
        stored=stored,
        beside=_beside(manifest, writer, checkpoint, like),
    )


def _beside(manifest: Manifest, writer: Writer, checkpoint: MegatronFolder, like: HfFolder | None) -> Beside:
    """With the files of the unquantised model's folder, or else with those that an import left in the checkpoint."""
    family, fields, given = checkpoint.family, checkpoint.fields, checkpoint.hf_config
    config = family.consistent(given, fields) if given else family.to_hf(fields)
    if like is not None:
        return Beside.of(manifest, writer, config, (like.path, carried_files(like)))
    assets = checkpoint.path / ASSETS
    return Beside.of(manifest, writer, config, (assets, stored_assets(assets)) if assets.is_dir() else None)


def _fill(ready: _Ready, folder: Path, rank: int, size: int, writer: Writer, kv_at_least_one: bool) -> int:
    """Pack and write this worker's share of the HF tensors; bytes written."""
    places = {name: (file.name, *at) for file in ready.layout.files for name, at in file.tensors.items()}
    weights = _by_hf_name(ready)
    written = 0
    with ExitStack() as stack:
        files = OpenFiles(stack)
        reader = Reader(files)

        def put(name: str, tensor: Tensor) -> None:
            nonlocal written
            file, offset, dtype, _ = places[name]
            data = cast(tensor, dtype, where=name).contiguous().reshape(-1).view(torch.uint8).numpy().data
            written += write_all(files.descriptor(str(folder / file), write=True), data, offset)

        for name, job in _share(list(_jobs(ready)), rank, size):
            tensor = _whole(job, reader)
            found = weights.get(ready.plan.copies[name].of if name in ready.plan.copies else name)
            if found is None or found[0].state is None:
                put(name, tensor)
                continue
            weight, region, shape = found
            state = weight.state
            assert state is not None
            known = calibration_of(state.calibration, state.format, region, shape)
            for suffix, made in pack(tensor, known, format=state.format, writer=writer, where=name).items():
                put(f"{module_of(name)}.{suffix}", made)
        for name, ranges in _kv(ready) if rank == 0 else ():
            which = kv_projection(name) or ""
            scale = kv_name(name, which, writer)
            put(scale, pack_kv(ranges[which], at_least_one=kv_at_least_one, where=scale))
    return written


def _jobs(ready: _Ready) -> Iterator[tuple[str, Job]]:
    """Every HF tensor that is written, with how it is put together, in the dtype that the checkpoint has."""
    (file,) = lay_out_files(ready.plan.hf_tensors, ready.stored, max_shard_size=1 << 62).files
    imagined = HfLayout((file,))
    yield from zip(file.tensors, export_jobs(ready.plan, ready.wired, imagined, ready.output), strict=True)


def _share(jobs: list[tuple[str, Job]], rank: int, size: int) -> list[tuple[str, Job]]:
    """Every worker's tensors, equal in bytes as far as whole tensors allow."""
    owners = dealt([job.target.nbytes for _, job in jobs], size)
    return [job for job, owner in zip(jobs, owners, strict=True) if owner == rank]


def _whole(job: Job, reader: Reader) -> Tensor:
    """The tensor of a job, in memory."""
    found = torch.empty(job.target.shape, dtype=torch_dtype(job.target.dtype)).view(-1)
    read_into(found, job, reader)
    return found.view(job.target.shape)


def _by_hf_name(ready: _Ready) -> dict[str, tuple[Weight, Region, tuple[int, ...]]]:
    """For every HF tensor of a linear layer its weight, the rows of it in the Megatron tensor, and that one's shape."""
    shapes = ready.plan.hf_tensors
    found: dict[str, tuple[Weight, Region, tuple[int, ...]]] = {}
    for weight in ready.held.weights:
        if weight.state is not None:
            for region in regions(weight.shard.pieces, shapes):
                assert region.box == whole(shapes[region.name])
                found[region.name] = weight, region, weight.shard.shape
    return found


def _kv(ready: _Ready) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The projections that fill a quantised KV cache, with its ranges."""
    for weight in ready.held.weights:
        instance: Instance = weight.instance
        if instance in ready.held.kv:
            for piece in weight.shard.pieces:
                if kv_projection(piece.source.tensor) is not None:
                    yield piece.source.tensor, ready.held.kv[instance]
