"""Megatron checkpoints from and to live models, through megatron-core's own `dist_checkpointing`.

What is written is what Megatron-LM writes for weights: an `iter_XXXXXXX` folder with the chunks of virtual
pipelining as `model0`, `model1`; beside the weights lies run_config.yaml. It loads at any layout, here and there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bridge_core.checkpoint.dcp import read_dcp
from bridge_core.checkpoint.matching import megatron_entries
from bridge_core.checkpoint.megatron_folder import LATEST, MegatronFolder, export_plan, find_iteration
from bridge_core.checkpoint.model_config import check_said
from bridge_core.checkpoint.output import check_free, write_folder
from bridge_core.checkpoint.run_config import RUN_CONFIG, write_run_config
from bridge_core.dtypes import dtype_of
from bridge_core.errors import ConfigError, LayoutError
from bridge_core.families import Family, Fields
from bridge_core.runtime.agreement import check_same, check_size
from bridge_core.runtime.homes import unwrap
from bridge_core.runtime.live import LiveModel, open_live
from bridge_core.runtime.megatron_state import (
    count_adapters,
    fill_module,
    load_state,
    named_chunks,
    save_state,
    sharded_state,
    without_adapters,
)
from bridge_core.runtime.own_world import OwnWorld
from bridge_core.runtime.tensors import dtype_name
from bridge_core.runtime.words import default_group
from bridge_core.runtime.workers import TorchWorkers

T = TypeVar("T")

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True, kw_only=True)
class MegatronReport:
    """What a save or a load did.

    Attributes:
        folder: of the iteration.
        iteration: its number.
        parameters: of this rank, that were written or filled.
        adapters: parameters of adapters on this rank, which were left alone.
    """

    folder: Path
    iteration: int
    parameters: int
    adapters: int = 0


def save_megatron_model(
    model: Any,
    path: str | Path,
    family: Family,
    fields: Fields,
    *,
    ignore: Sequence[str] = (),
    hf_config: Mapping[str, Any] | None = None,
    iteration: int = 0,
    overwrite: bool = False,
    groups: ProcessGroupCollection | None = None,
    group: Any = None,
) -> MegatronReport:
    """Write the weights of a live model as a Megatron torch_dist checkpoint. Collective over `group`.

    Adapters on its layers (`<layer>.adapter.<...>`) are not written: what is saved is the base model, as in
    `save_hf_pretrained`. The report counts them; bridge-peft saves them (`save_adapter_ckpt`).

    The iteration's folder gets its name when everything in it is written, and only then becomes the latest
    one of the run; a save that fails or is killed leaves nothing that looks finished.

    Args:
        model: chunks of this rank, wrapped or not, on CPU or GPU.
        path: folder of the run, which all ranks must see; other iterations in it are left alone.
        family, fields: of the HF model.
        ignore: patterns (as in a shell) of HF names whose tensors the model does not have.
        hf_config: config.json of the model, kept in run_config.yaml for later exports.
        iteration: number of the iteration.
        overwrite: replace an iteration that is there already.
        groups: process groups of the model; by default those it was built with.
        group: all ranks of the model; by default torch's default group, and never fewer ranks than that:
            megatron-core saves over the default group.

    Raises:
        BridgeError: on every rank, with the message of the first one that failed.
    """

    def text(live: LiveModel, dtype: str) -> str:
        return write_run_config(fields, family, hf_config, dtype, ignore=ignore, forms=live.plan.forms)

    group = group or default_group()
    check_size(model, groups, group)
    report = save_live(
        lambda: open_live(model, family, fields, groups=groups, ignore=ignore),
        lambda: sharded_state(model, groups),
        text,
        path,
        iteration=iteration,
        overwrite=overwrite,
        group=group,
    )
    return replace(report, adapters=count_adapters(unwrap(model)))


def save_live(
    opened: Callable[[], LiveModel],
    state: Callable[[], dict[str, Any]],
    text: Callable[[LiveModel, str], str],
    path: str | Path,
    *,
    iteration: int = 0,
    overwrite: bool = False,
    group: Any = None,
) -> MegatronReport:
    """Write whatever `opened` gives as a Megatron checkpoint; what `save_megatron_model` does of a single model.

    Collective over `group`. What is not said here is as there.

    Args:
        opened: the model matched against its plan.
        state: its sharded state, under the names that the checkpoint is to have.
        text: of the model and the dtype of most of its parameters, the content of run_config.yaml.
    """
    group = group or default_group()
    workers = TorchWorkers(group)
    run = Path(path)

    def check() -> tuple[LiveModel, Path]:
        _check_iteration(iteration)
        output = run / f"iter_{iteration:07d}"
        check_free(output, overwrite=overwrite)
        return opened(), output

    live, output = _checked(workers, check)
    check_same(
        str(iteration).encode(),
        group,
        what="ranks are about to save different iterations",
        where="save_megatron_model: iteration",
        fix="pass the same iteration on every rank",
    )
    live.renew()
    dtype = _main_dtype(live)
    nbytes = sum(prod(shape) for shape in live.plan.megatron_tensors.values()) * dtype_of(dtype).itemsize

    def finish(folder: Path) -> None:
        (folder / RUN_CONFIG).write_text(text(live, dtype), encoding="utf-8")

    def written() -> dict[str, Any]:
        return without_adapters(state()) | {"iteration": iteration, "checkpoint_version": 3.0}

    with OwnWorld() as world:

        def fill(folder: Path, rank: int, size: int) -> None:
            world.step(lambda: save_state(written(), folder, where=output))

        write_folder(output, nbytes, workers, lambda folder: None, fill, finish, overwrite=overwrite)
    workers.together(lambda: _make_latest(run, iteration) if workers.rank == 0 else None)
    return MegatronReport(folder=output, iteration=iteration, parameters=len(live.shards))


def load_megatron_model(
    model: Any,
    path: str | Path,
    family: Family,
    fields: Fields,
    *,
    ignore: Sequence[str] = (),
    groups: ProcessGroupCollection | None = None,
    group: Any = None,
) -> MegatronReport:
    """Fill a live model from a Megatron torch_dist checkpoint, saved at any layout. Collective over `group`.

    The checkpoint's tensors are compared with the model's before a byte is copied; then megatron-core loads,
    at its default strictness. Optimizer and random state in the checkpoint are left where they are. Adapters on
    the model's layers keep their values; those in the checkpoint are refused unless `ignore` names them.

    Args:
        model: chunks of this rank, wrapped or not, on CPU or GPU.
        path: folder of a run, whose latest iteration is taken, or of one iteration; all ranks must see it.
        family, fields: of the HF model.
        ignore: patterns (as in a shell) of HF names whose tensors the model does not have; `"*.adapter.*"` for
            adapters in the checkpoint.
        groups, group: as for `save_megatron_model`.

    Raises:
        BridgeError: on every rank, with the message of the first one that failed.
    """

    def compare(live: LiveModel, folder: Path) -> None:
        checkpoint = MegatronFolder(folder, read_dcp(folder), fields, family, None)
        megatron_entries(export_plan(checkpoint, ignore=ignore), checkpoint)
        check_said(checkpoint.dcp, fields)

    def take(loaded: dict[str, Any]) -> None:
        for name, chunk in named_chunks(model).items():
            fill_module(chunk, loaded[name])

    group = group or default_group()
    check_size(model, groups, group)
    report = load_live(
        lambda: open_live(model, family, fields, groups=groups, ignore=ignore),
        compare,
        lambda: sharded_state(model, groups),
        take,
        path,
        group=group,
    )
    return replace(report, adapters=count_adapters(unwrap(model)))


def load_live(
    opened: Callable[[], LiveModel],
    compare: Callable[[LiveModel, Path], None],
    state: Callable[[], dict[str, Any]],
    take: Callable[[dict[str, Any]], None],
    path: str | Path,
    *,
    group: Any = None,
) -> MegatronReport:
    """Fill whatever `opened` gives from a Megatron checkpoint; what `load_megatron_model` does of a single model.

    Collective over `group`. What is not said here is as there.

    Args:
        opened: the model matched against its plan.
        compare: raises unless the checkpoint in a folder is one of that model.
        state: its sharded state, under the names that the checkpoint has.
        take: puts what was loaded of that state into the model.
    """
    workers = TorchWorkers(group or default_group())

    def check() -> tuple[LiveModel, Path]:
        live = opened()
        folder = find_iteration(Path(path))
        compare(live, folder)
        return live, folder

    live, folder = _checked(workers, check)
    iterations: list[int] = []
    with OwnWorld() as world:
        workers.together(lambda: iterations.append(world.step(lambda: _load(state, take, folder))))
    return MegatronReport(folder=folder, iteration=iterations[0], parameters=len(live.shards))


def _checked(workers: TorchWorkers, check: Callable[[], T]) -> T:
    """What `check` returns here, once it returned on all ranks. Collective."""
    found: list[T] = []

    def step() -> None:
        _check_world(workers)
        found.append(check())

    workers.together(step)
    return found[0]


def _load(state: Callable[[], dict[str, Any]], take: Callable[[dict[str, Any]], None], folder: Path) -> int:
    """A checkpoint into the parameters of the base; the iteration. Collective."""
    loaded: Any = load_state(without_adapters(state()), folder)
    take(loaded)
    return int(loaded.get("iteration") or 0)


def _main_dtype(live: LiveModel) -> str:
    """The dtype of most of this rank's parameters, by its safetensors name; router biases may be wider."""
    held = Counter(dtype_name(tensor) for tensor in live.tensors.values())
    return held.most_common(1)[0][0] if held else live.plan.dtype


def _check_world(workers: TorchWorkers) -> None:
    """mcore's `dist_checkpointing.save` knows the default group only; a smaller one would wait for ever."""
    import torch.distributed as dist

    if workers.size != dist.get_world_size():
        raise LayoutError(
            "megatron-core saves and loads checkpoints over all ranks of the default group",
            where="group",
            expected=f"all {dist.get_world_size()} ranks",
            got=f"{workers.size} ranks",
            fix="use save_hf_pretrained for a model on some of the ranks",
        )


def _check_iteration(iteration: int) -> None:
    """Raise unless it can be a part of the name of Megatron's folder."""
    if not isinstance(iteration, Integral) or isinstance(iteration, bool) or iteration < 0:
        raise ConfigError(
            "this is not the number of an iteration",
            where="iteration",
            expected="a whole number of at least 0",
            got=repr(iteration),
            fix="pass the number of training steps",
        )


def _make_latest(run: Path, iteration: int) -> None:
    """Say which iteration is the latest, by a file that is either the old or the new one."""
    aside = run / f".{LATEST}.partial"
    aside.write_text(str(iteration), encoding="utf-8")
    os.replace(aside, run / LATEST)
