"""Offline conversion between an HF folder and a Megatron torch_dist folder. No model, no GPU, no torch.

Both directions are the same four steps: read the headers of the source, plan and audit, lay the output
out by arithmetic, let the executor copy. Nothing is written before the third step has succeeded, and
the output gets its name last. Several workers may share the copying; each computes the same layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from bridge_core.checkpoint.copies import check_copies
from bridge_core.checkpoint.dcp_layout import DcpLayout, write_metadata
from bridge_core.checkpoint.hf_folder import HfFolder, open_hf, read_config
from bridge_core.checkpoint.hf_layout import HfLayout, as_written, lay_out_files, lay_out_like
from bridge_core.checkpoint.hf_output import (
    carried_files,
    copy_files,
    create_weight_files,
    finish_hf_folder,
    stored_assets,
)
from bridge_core.checkpoint.keys import is_adapter
from bridge_core.checkpoint.matching import cast_to, elsewhere, megatron_entries
from bridge_core.checkpoint.megatron_files import megatron_side_files
from bridge_core.checkpoint.megatron_folder import LATEST, MegatronFolder, export_plan, open_megatron
from bridge_core.checkpoint.options import Options, Report
from bridge_core.checkpoint.output import check_apart, check_free, partial_path, real_path, write_folder
from bridge_core.checkpoint.run_config import RUN_CONFIG, write_run_config
from bridge_core.checkpoint.transfer import Moved, share, transfer
from bridge_core.checkpoint.variant import PLAIN, Variant
from bridge_core.checkpoint.wiring import create_files, export_jobs, import_jobs, lay_out_megatron, shifted_dtypes
from bridge_core.checkpoint.workers import jointly
from bridge_core.codecs import Fp8Blocks
from bridge_core.families import family_for
from bridge_core.patterns import match
from bridge_core.plan import Plan, check_ignored
from bridge_core.topology import ParallelLayout

ITERATION = "iter_0000000"
ASSETS = "tokenizer"
_DEFAULTS = Options()


def import_ckpt(
    hf_path: str | Path,
    megatron_path: str | Path,
    *,
    options: Options = _DEFAULTS,
    ignore: Sequence[str] = (),
    ignore_options: Sequence[str] = (),
    on_total: Callable[[int], None] | None = None,
    variant: Variant = PLAIN,
) -> Report:
    """Convert an HF safetensors folder to a Megatron torch_dist folder, loadable at any layout.

    Collective over `options.workers`.

    Args:
        hf_path: folder with config.json and safetensors files.
        megatron_path: output; gets `iter_0000000/` and `latest_checkpointed_iteration.txt`.
        options: dtype, overwriting, workers.
        ignore: patterns (as in a shell) of HF names to leave out, which the report names.
        ignore_options: options of config.json to leave out of account although the family does not know them.
        on_total: called once with the number of bytes to be written, before the first is.
        variant: how the Megatron side is arranged.

    Raises:
        BridgeError: bad input (nothing was written) or a failed write (nothing looks finished); on all workers.
    """
    plan = partial(_plan_import, Path(hf_path), Path(megatron_path), options, ignore, ignore_options, variant)
    return _write(jointly(options.workers, plan), Path(megatron_path), options, on_total)


def export_ckpt(
    megatron_path: str | Path,
    hf_path: str | Path,
    *,
    source: str | Path | None = None,
    hf_config: str | Path | Mapping[str, Any] | None = None,
    max_shard_size: int = 2_000_000_000,
    fp8: bool = False,
    options: Options = _DEFAULTS,
    ignore: Sequence[str] = (),
    ignore_options: Sequence[str] = (),
    on_total: Callable[[int], None] | None = None,
    variant: Variant = PLAIN,
) -> Report:
    """Convert a Megatron torch_dist folder, saved at any layout by anyone, to an HF safetensors folder.

    Collective over `options.workers`.

    Args:
        megatron_path: a run's folder or one iteration's.
        hf_path: output folder.
        source: an HF folder whose file layout, config.json and other files are to be used; the weights in
            it are not read.
        hf_config: config.json (path or content) for a checkpoint that does not say how its model is configured;
            not looked at if there is a `source`.
        max_shard_size: bytes per weight file, where no `source` says how to split.
        fp8: quantise what the family's fp8 checkpoints quantise (or what `source` has quantised) to fp8 with a
            scale per block. Without it weights are written plain, whatever the model was imported from.
        options: dtype, overwriting, workers.
        ignore: patterns (as in a shell) of HF names to leave out, which the report names.
        ignore_options: options of config.json that the family does not know and that do not matter.
        on_total: called once with the number of bytes to be written, before the first is.
        variant: how the Megatron side is arranged.

    Raises:
        BridgeError: bad input (nothing was written) or a failed write (nothing looks finished); on all workers.
    """

    def plan() -> _Conversion:
        output = _free_place(Path(hf_path), [Path(folder) for folder in (megatron_path, source) if folder], options)
        like = open_hf(source) if source is not None else None
        given = like.config if like else _as_config(hf_config)
        checkpoint = open_megatron(megatron_path, hf_config=given, ignore_options=ignore_options, variant=variant)
        asked = [pattern for pattern in ignore if pattern not in checkpoint.ignore]
        beside = [key for key in checkpoint.dcp.tensors if is_adapter(key)]
        check_ignored(checkpoint.family, checkpoint.fields, asked, (*(like.tensors if like else ()), *beside))
        planned = partial(export_plan, checkpoint, inventory=like.shapes if like else None, **codec_options(fp8, like))
        ready = planned(ignore=ignore)
        absent = elsewhere(ready, checkpoint, variant.from_source, like)
        rows = [tensor.name for entry in ready.entries if entry.name in absent for tensor in entry.hf]
        held = planned(ignore=(*ignore, *rows)) if absent else ready
        return _plan_export(checkpoint, ready, held, output, like, max_shard_size, options)

    return _write(jointly(options.workers, plan), Path(hf_path), options, on_total)


@dataclass(frozen=True, kw_only=True)
class _Conversion:
    """A conversion that was planned, audited and laid out; what is left is to write it.

    `tensors` counts HF's; `room` is bytes of the files, `nbytes` bytes of the tensors in them. `prepare`, `fill` and
    `finish` are the steps of `write_folder`; `check` looks at the source's data before anything is written.
    """

    output: Path
    plan: Plan
    tensors: int
    nbytes: int
    room: int
    ignored: dict[str, str]
    base: Path
    carried: list[Path]
    prepare: Callable[[Path], None]
    fill: Callable[[Path, int, int], Moved]
    finish: Callable[[Path], None]
    from_source: tuple[str, ...] = ()
    check: Callable[[], None] = lambda: None


def _write(ready: _Conversion, shown: Path, options: Options, on_total: Callable[[int], None] | None) -> Report:
    options.workers.together(ready.check)
    if on_total:
        on_total(ready.nbytes)
    moved = write_folder(
        ready.output,
        ready.room,
        options.workers,
        ready.prepare,
        ready.fill,
        ready.finish,
        overwrite=options.overwrite,
        durable=options.durable,
    )
    return Report(
        output=shown,
        family=ready.plan.family.name,
        tensors=ready.tensors,
        nbytes=ready.nbytes,
        moved=moved,
        ignored=ready.ignored,
        carried=tuple(str(file.relative_to(ready.base)) for file in ready.carried),
        from_source=ready.from_source,
    )


def _free_place(path: Path, sources: Sequence[Path], options: Options) -> Path:
    """Where an output really goes; raises if something is there, or if writing it would remove a source."""
    check_free(path, overwrite=options.overwrite)
    output = real_path(path)
    for source in sources:
        check_apart(output, source)
    return output


# --- HF to Megatron -------------------------------------------------------------------------------


def _plan_import(
    hf_path: Path,
    megatron_path: Path,
    options: Options,
    ignore: Sequence[str],
    ignore_options: Sequence[str],
    variant: Variant,
) -> _Conversion:
    source = open_hf(hf_path)
    output = _free_place(megatron_path, [source.path], options)
    family = family_for(source.config)
    whole = family.to_megatron(source.config, ignore=ignore_options)
    check_ignored(family, whole, ignore, source.tensors)
    fields = family.without(whole, ignore, source.tensors)
    stored = {name: tensor.dtype for name, tensor in source.tensors.items()}
    plan = Plan(
        variant.family(family, fields, None),
        fields,
        ParallelLayout(),
        dtypes=stored,
        inventory=source.shapes,
        ignore=ignore,
        codec=source.codec,
        quantised=source.quantised,
    )
    audit = plan.audit({name: tensor.shape for name, tensor in source.stored.items() if name not in source.beside})
    files = options.workers.size * options.threads
    layout, dtypes = lay_out_megatron(plan, source, dtype=options.dtype, files=files)
    main = _main_dtype(layout, dtypes)
    shifted = shifted_dtypes(plan, source, options.dtype)
    run_config = write_run_config(
        fields,
        family,
        source.config,
        main,
        ignore=ignore,
        forms=plan.forms,
        shifted=shifted,
        sections=variant.sections(family, fields),
    )
    carried = carried_files(source)
    return _Conversion(
        output=output,
        plan=plan,
        tensors=audit.hf_tensors,
        nbytes=sum(layout.tensors[key].nbytes for key in dtypes),  # an alias in the layout is no second tensor
        room=sum(layout.files.values()),
        ignored={name: _reason(family.ignored, name) for name in audit.ignored} | source.beside,
        base=source.path,
        carried=carried,
        prepare=partial(_prepare_import, run_config, source.path, carried),
        fill=partial(_fill_import, plan, source, layout, options),
        finish=lambda folder: write_metadata(folder / ITERATION, layout),
        check=partial(check_copies, plan, source, rank=options.workers.rank, size=options.workers.size),
    )


def _main_dtype(layout: DcpLayout, dtypes: Mapping[str, str]) -> str:
    """The dtype that most elements have."""
    count: Counter[str] = Counter()
    for key, dtype in dtypes.items():
        count[dtype] += prod(layout.tensors[key].shape)
    return count.most_common(1)[0][0]


def _reason(ignored: Mapping[str, str], name: str) -> str:
    reasons = (reason for pattern, reason in ignored.items() if match(pattern, name) is not None)
    return next(reasons, "left out as asked")


def _prepare_import(run_config: str, base: Path, carried: Sequence[Path], folder: Path) -> None:
    iteration = folder / ITERATION
    iteration.mkdir()
    for name, data in megatron_side_files({"iteration": 0, "checkpoint_version": 3.0}).items():
        (iteration / name).write_bytes(data)
    (iteration / RUN_CONFIG).write_text(run_config, encoding="utf-8")
    (folder / LATEST).write_text("0", encoding="utf-8")
    copy_files(base, carried, iteration / ASSETS)


def _fill_import(
    plan: Plan, source: HfFolder, layout: DcpLayout, options: Options, folder: Path, rank: int, size: int
) -> Moved:
    """Every worker makes and fills whole files."""
    names = [name for number, name in enumerate(layout.files) if number % size == rank]
    create_files(folder / ITERATION, layout, names)
    mine = {str(folder / ITERATION / name) for name in names}
    jobs = [job for job in import_jobs(plan, source, layout, folder / ITERATION) if job.target.path in mine]
    return transfer(jobs, threads=options.threads, progress=options.progress)


# --- Megatron to HF -------------------------------------------------------------------------------


def _plan_export(
    checkpoint: MegatronFolder,
    plan: Plan,
    held: Plan,
    output: Path,
    like: HfFolder | None,
    max_shard_size: int,
    options: Options,
) -> _Conversion:
    """`held` is the plan of what the checkpoint holds; the rest of `plan` comes from the folder to be `like`."""
    wired = megatron_entries(held, checkpoint)
    names = plan.hf_tensors.keys() - held.hf_tensors.keys()
    others = {name: like.tensors[name] for name in names} if like else {}
    dtypes = wired.hf_dtypes(options.dtype) | {n: cast_to(t.dtype, options.dtype) for n, t in others.items()}
    if like:
        layout = lay_out_like(like, plan, dtypes)
        base, carried = like.path, carried_files(like)
    else:
        layout = lay_out_files(*as_written(plan, dtypes), max_shard_size)
        base = checkpoint.path / ASSETS
        carried = stored_assets(base)
    given = like.config if like else checkpoint.hf_config
    config = plan.family.consistent(given, plan.fields) if given else plan.family.to_hf(plan.fields)
    # Looks at the head of every item: a corrupt one is found before anything is written.
    jobs = export_jobs(plan, wired, layout, partial_path(output), dtype=options.dtype, others=others)
    mine = share(jobs, options.workers.rank, options.workers.size)
    return _Conversion(
        output=output,
        plan=plan,
        tensors=sum(len(file.tensors) for file in layout.files),
        nbytes=layout.tensor_nbytes,
        room=layout.nbytes,
        ignored=_left_out(checkpoint, plan),
        base=base,
        carried=carried,
        prepare=partial(_prepare_export, layout, base, carried),
        fill=lambda folder, rank, size: transfer(mine, threads=options.threads, progress=options.progress),
        finish=lambda folder: finish_hf_folder(folder, layout, config, codec=plan.codec, like=like),
        from_source=tuple(sorted(others)),
    )


def codec_options(fp8: bool, like: HfFolder | None) -> dict[str, Any]:
    """What a `Plan` is told of an export to fp8: the blocks and the weights of `like`, where it is quantised."""
    if not fp8:
        return {}
    if like is None or not isinstance(like.codec, Fp8Blocks):
        return {"codec": Fp8Blocks()}
    return {"codec": like.codec, "quantised": like.quantised}


def _as_config(value: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return read_config(Path(value)) if isinstance(value, str | Path) else value


def _left_out(checkpoint: MegatronFolder, plan: Plan) -> dict[str, str]:
    """What the checkpoint holds and the export does not, each with the reason."""
    others = sorted(checkpoint.dcp.tensors.keys() - checkpoint.weights().keys())
    found = dict.fromkeys(others, "no weight: training state")
    found |= dict.fromkeys(filter(is_adapter, sorted(checkpoint.weights())), "adapter, left out as asked")
    for entry in plan.entries:
        if entry.padding is not None:
            rows = entry.padding.shape[0]
            found[f"{entry.name}, last {rows} rows"] = f"padding beyond vocab_size={plan.fields['vocab_size']}"
    return found


def _prepare_export(layout: HfLayout, base: Path, carried: Sequence[Path], folder: Path) -> None:
    create_weight_files(folder, layout)
    copy_files(base, carried, folder)
