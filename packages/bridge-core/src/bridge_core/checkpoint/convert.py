"""Offline conversion between an HF folder and a Megatron torch_dist folder. No model, no GPU, no torch.

Both directions are the same four steps: read the headers of the source, plan and audit, lay the output
out by arithmetic, let the executor copy. Nothing is written before the third step has succeeded, and
the output gets its name last. Several workers may share the copying; each computes the same layout.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge_core.checkpoint.copies import check_copies
from bridge_core.checkpoint.dcp_layout import write_metadata
from bridge_core.checkpoint.hf_folder import CONFIG, INDEX, SINGLE, HfFolder, open_hf, read_config
from bridge_core.checkpoint.hf_layout import HfLayout, lay_out_files, lay_out_like
from bridge_core.checkpoint.megatron_files import megatron_side_files
from bridge_core.checkpoint.megatron_folder import LATEST, MegatronFolder, open_megatron
from bridge_core.checkpoint.output import check_apart, check_free, partial_path, real_path
from bridge_core.checkpoint.run_config import RUN_CONFIG, write_run_config
from bridge_core.checkpoint.together import Alone, Workers, write_folder
from bridge_core.checkpoint.transfer import Moved, Progress, create_file, share, transfer
from bridge_core.checkpoint.wiring import create_files, export_jobs, import_jobs, lay_out_megatron, megatron_entries
from bridge_core.dtypes import dtype_of
from bridge_core.errors import ConfigError, UnsafeCheckpointError
from bridge_core.families import family_for
from bridge_core.plan import Plan
from bridge_core.topology import ParallelLayout

ITERATION = "iter_0000000"
ASSETS = "tokenizer"

# Weights in other formats are not carried along; everything else beside the weights is.
_OTHER_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".nemo"),
    *(".distcp", ".index.json"),
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion did.

    Attributes:
        output: the finished folder.
        family: name of the model family.
        tensors: HF tensors converted.
        nbytes: bytes of the tensors written, all workers together.
        moved: bytes by the path they took, this worker's share.
        ignored: tensors of the source that were left out, each with the reason.
        carried: files beside the weights that were copied.
    """

    output: Path
    family: str
    tensors: int
    nbytes: int
    moved: Moved
    ignored: dict[str, str]
    carried: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a conversion runs; the same in both directions.

    Attributes:
        dtype: convert floating-point tensors to this type; None keeps each as it is.
        overwrite: replace an output folder that holds something.
        workers: the processes that share the work.
        threads: copies in flight per worker.
        progress: called with numbers of bytes written, from any thread.
    """

    dtype: str | None = None
    overwrite: bool = False
    workers: Workers = field(default_factory=Alone)
    threads: int = 2
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError("threads must be at least 1", where="threads", expected=">= 1", got=self.threads)


def import_ckpt(
    hf_path: str | Path,
    megatron_path: str | Path,
    *,
    options: Options = Options(),
    ignore: Sequence[str] = (),
    ignore_options: Sequence[str] = (),
    on_total: Callable[[int], None] | None = None,
) -> Report:
    """Convert an HF safetensors folder to a Megatron torch_dist folder, loadable at any layout.

    Args:
        hf_path: folder with config.json and safetensors files.
        megatron_path: output; gets `iter_0000000/` and `latest_checkpointed_iteration.txt`.
        options: dtype, overwriting, workers.
        ignore: patterns (as in a shell) of HF names to leave out, which the report names.
        ignore_options: options of config.json to leave out of account although the family does not know them.
        on_total: called once with the number of bytes to be written, before the first is.

    Raises:
        BridgeError: bad input (nothing was written) or a failed write (nothing looks finished).
    """
    source = open_hf(hf_path)
    check_free(Path(megatron_path), overwrite=options.overwrite)
    output = real_path(Path(megatron_path))
    check_apart(output, source.path)
    family = family_for(source.config)
    fields = family.without(family.to_megatron(source.config, ignore=ignore_options), ignore, source.tensors)
    dtypes = {n: t.dtype for n, t in source.tensors.items()}
    plan = Plan(family, fields, ParallelLayout(), dtypes=dtypes, names=source.tensors, ignore=ignore)
    audit = plan.audit(source.shapes)
    files = options.workers.size * options.threads
    layout, dtypes = lay_out_megatron(plan, source, dtype=options.dtype, files=files)
    nbytes = sum(layout.files.values())
    main_dtype = max(set(dtypes.values()), key=list(dtypes.values()).count)
    run_config = write_run_config(fields, family, source.config, main_dtype, ignore=ignore, forms=plan.forms)
    carried = carried_files(source)

    def prepare(folder: Path) -> None:
        iteration = folder / ITERATION
        iteration.mkdir()
        for name, data in megatron_side_files({"iteration": 0, "checkpoint_version": 3.0}).items():
            (iteration / name).write_bytes(data)
        (iteration / RUN_CONFIG).write_text(run_config, encoding="utf-8")
        (folder / LATEST).write_text("0", encoding="utf-8")
        copy_files(source.path, carried, iteration / ASSETS)

    def fill(folder: Path, rank: int, size: int) -> Moved:
        check_copies(plan, source, rank=rank, size=size)
        names = [name for number, name in enumerate(layout.files) if number % size == rank]
        create_files(folder / ITERATION, layout, names)
        mine = {str(folder / ITERATION / name) for name in names}
        jobs = [job for job in import_jobs(plan, source, layout, folder / ITERATION) if job.target.path in mine]
        return transfer(jobs, threads=options.threads, progress=options.progress)

    if on_total:
        on_total(sum(job.nbytes for job in layout.placed()))
    moved = _run(output, nbytes, options, prepare, fill, lambda folder: write_metadata(folder / ITERATION, layout))
    reasons = {name: _reason(family.ignored, name) for name in audit.ignored}
    return Report(
        output=Path(megatron_path),
        family=family.name,
        tensors=audit.hf_tensors,
        nbytes=nbytes,
        moved=moved,
        ignored=reasons,
        carried=tuple(str(file.relative_to(source.path)) for file in carried),
    )


def export_ckpt(
    megatron_path: str | Path,
    hf_path: str | Path,
    *,
    source: str | Path | None = None,
    hf_config: str | Path | Mapping[str, Any] | None = None,
    max_shard_size: int = 2_000_000_000,
    options: Options = Options(),
    ignore: Sequence[str] = (),
    ignore_options: Sequence[str] = (),
    on_total: Callable[[int], None] | None = None,
) -> Report:
    """Convert a Megatron torch_dist folder, saved at any layout by anyone, to an HF safetensors folder.

    Args:
        megatron_path: a run's folder or one iteration's.
        hf_path: output folder.
        source: an HF folder whose file layout, config.json and other files are to be used; the weights in
            it are not read.
        hf_config: config.json (path or content) for a checkpoint that does not say how its model is configured.
        max_shard_size: bytes per weight file, where no `source` says how to split.
        options: dtype, overwriting, workers.
        ignore: patterns (as in a shell) of HF names to leave out, which the report names.
        ignore_options: options of config.json that the family does not know and that do not matter.
        on_total: called once with the number of bytes to be written, before the first is.

    Raises:
        BridgeError: bad input (nothing was written) or a failed write (nothing looks finished).
    """
    check_free(Path(hf_path), overwrite=options.overwrite)
    output = real_path(Path(hf_path))
    check_apart(output, Path(megatron_path))
    like = None
    if source is not None:
        check_apart(output, Path(source))
        like = open_hf(source)
    given = like.config if like else _as_config(hf_config)
    checkpoint = open_megatron(megatron_path, hf_config=given, ignore_options=ignore_options)
    plan = export_plan(checkpoint, names=like.tensors if like else None, ignore=ignore)
    wired = megatron_entries(plan, checkpoint)
    shapes = plan.hf_tensors
    dtypes = wired.hf_dtypes(options.dtype)
    layout = lay_out_like(like, plan, dtypes) if like else lay_out_files(shapes, dtypes, max_shard_size)
    given = like.config if like else checkpoint.hf_config
    config = plan.family.consistent(given, plan.fields) if given else plan.family.to_hf(plan.fields)
    carried = carried_files(like) if like else _stored_assets(checkpoint)
    base = like.path if like else checkpoint.path / ASSETS
    # Looks at the head of every item: a corrupt one is found before anything is written.
    jobs = share(export_jobs(plan, wired, layout, partial_path(output)), options.workers.rank, options.workers.size)

    def prepare(folder: Path) -> None:
        for file in layout.files:
            create_file(folder / file.name, file.nbytes, file.header)
        copy_files(base, carried, folder)

    def fill(folder: Path, rank: int, size: int) -> Moved:
        return transfer(jobs, threads=options.threads, progress=options.progress)

    def finish(folder: Path) -> None:
        if [file.name for file in layout.files] != [SINGLE]:
            (folder / INDEX).write_text(layout.index(), encoding="utf-8")
        (folder / CONFIG).write_text(
            json.dumps(written_config(config, layout), indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )

    if on_total:
        on_total(layout.nbytes)
    moved = _run(output, layout.nbytes, options, prepare, fill, finish)
    return Report(
        output=Path(hf_path),
        family=plan.family.name,
        tensors=len(shapes),
        nbytes=layout.nbytes,
        moved=moved,
        ignored=_left_out(checkpoint, plan),
        carried=tuple(str(file.relative_to(base)) for file in carried),
    )


def _run(
    output: Path,
    nbytes: int,
    options: Options,
    prepare: Callable[[Path], None],
    fill: Callable[[Path, int, int], Moved],
    finish: Callable[[Path], None],
) -> Moved:
    moved: list[Moved] = []
    write_folder(
        output,
        nbytes,
        options.workers,
        prepare,
        lambda folder, rank, size: moved.append(fill(folder, rank, size)),
        finish,
        overwrite=options.overwrite,
    )
    return moved[0]


def export_plan(
    checkpoint: MegatronFolder, *, names: Collection[str] | None = None, ignore: Sequence[str] = ()
) -> Plan:
    """The plan of a checkpoint's model; the vocabulary's padding is what the checkpoint has."""
    stored = checkpoint.dcp.tensors.get("embedding.word_embeddings.weight")
    ignore = tuple(dict.fromkeys((*checkpoint.ignore, *ignore)))
    return Plan(
        checkpoint.family,
        checkpoint.family.without(checkpoint.fields, ignore),
        ParallelLayout(),
        padded_vocab=max(stored.shape[0], checkpoint.fields["vocab_size"]) if stored else None,
        names=names,
        forms=checkpoint.forms,
        ignore=ignore,
    )


def _as_config(value: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return read_config(Path(value)) if isinstance(value, str | Path) else value


def written_config(config: Mapping[str, Any], layout: HfLayout) -> dict[str, Any]:
    """config.json as it goes with the files written: the same, but for the dtype."""
    config = dict(config)
    written = dtype_of(layout.main_dtype()).torch
    if "torch_dtype" in config:
        config["torch_dtype"] = written
    if "dtype" in config or "torch_dtype" not in config:
        config["dtype"] = written
    return config


def _left_out(checkpoint: MegatronFolder, plan: Plan) -> dict[str, str]:
    """What the checkpoint holds and the export does not, each with the reason."""
    found = dict.fromkeys(checkpoint.dcp.tensors.keys() - checkpoint.weights().keys(), "no weight: training state")
    for entry in plan.entries:
        if entry.padding is not None:
            rows = entry.padding.shape[0]
            found[f"{entry.name}, last {rows} rows"] = f"padding beyond vocab_size={plan.fields['vocab_size']}"
    return found


def carried_files(folder: HfFolder) -> list[Path]:
    """The files of an HF folder that go along with its weights: tokenizer, generation settings, notes."""
    return [_inside(file, folder.path) for file in folder.other_files() if _goes_along(file)]


def _stored_assets(checkpoint: MegatronFolder) -> list[Path]:
    base = checkpoint.path / ASSETS
    found = sorted(file for file in base.rglob("*") if file.is_file() and _goes_along(file))
    return [_inside(file, base) for file in found if file.name != CONFIG]


def _goes_along(file: Path) -> bool:
    return not file.name.endswith(_OTHER_WEIGHTS)


def _inside(file: Path, base: Path) -> Path:
    """`file`, unless it is a link out of its folder (but for the hub cache's, whose files all are links)."""
    real, root = file.resolve(), base.resolve()
    cache = root.parent.parent / "blobs"
    if root not in real.parents and cache not in real.parents:
        raise UnsafeCheckpointError(
            "a file beside the weights is a link that leaves the folder",
            where=file,
            expected=f"files inside {base}",
            got=real,
            fix="replace the link by the file itself, or remove it",
        )
    return file


def copy_files(base: Path, files: Sequence[Path], target: Path) -> None:
    """Copy files to the same places below another folder."""
    for file in files:
        to = target / file.relative_to(base)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to)


def _reason(ignored: Mapping[str, str], name: str) -> str:
    from bridge_core.patterns import match

    return next(
        (reason for pattern, reason in ignored.items() if match(pattern, name) is not None), "left out as asked"
    )
