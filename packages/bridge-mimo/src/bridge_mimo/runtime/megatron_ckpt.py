"""MIMO checkpoints from and to a live `MimoModel`, through megatron-core's own `dist_checkpointing`.

The names are those of the bare `MimoModel`, whatever its components are wrapped in. What is written is what an
offline import writes (`bridge_mimo.checkpoint`): the same keys, shapes and bytes, prediction layers among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_core.checkpoint.dcp import read_dcp
from bridge_core.checkpoint.files import OpenFiles
from bridge_core.checkpoint.hf_folder import HfFolder, open_hf
from bridge_core.checkpoint.keys import Place, places, written_forms
from bridge_core.checkpoint.matching import megatron_entries
from bridge_core.checkpoint.megatron_folder import MegatronFolder, export_plan
from bridge_core.checkpoint.model_config import check_said
from bridge_core.checkpoint.reading import Reader
from bridge_core.checkpoint.run_config import write_run_config
from bridge_core.checkpoint.safetensors import Stored
from bridge_core.checkpoint.transfer import Job
from bridge_core.dtypes import dtype_of
from bridge_core.geometry import restrict
from bridge_core.plan import Plan
from bridge_core.runtime.live import LiveModel
from bridge_core.runtime.megatron_ckpt import MegatronReport, load_live, save_live
from bridge_core.runtime.megatron_state import count_adapters, fill_module, sharded_chunk
from bridge_core.runtime.tensors import read_into, torch_dtype
from bridge_core.topology import ParallelLayout
from bridge_mimo.checkpoint.stored import components_section
from bridge_mimo.components import PREDICTION, Components
from bridge_mimo.runtime.live import LANGUAGE_MODULE, groups_of, mimo_plan, modules_of, open_mimo

if TYPE_CHECKING:
    from torch import Tensor

    from bridge_mimo.runtime.groups import MimoGroups

_PREDICTION = f"{LANGUAGE_MODULE}.{PREDICTION}"


def save_megatron_model(
    model: Any,
    path: str | Path,
    components: Components,
    *,
    source: str | Path | None = None,
    hf_config: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    iteration: int = 0,
    overwrite: bool = False,
    groups: MimoGroups | None = None,
) -> MegatronReport:
    """Write the weights of a live `MimoModel` as a MIMO torch_dist checkpoint. Collective over the default group.

    Args:
        model: the `MimoModel`, its components wrapped or not, on CPU or GPU.
        path: folder of the run, which all ranks must see; other iterations in it are left alone.
        components: of the HF model.
        source: HF folder whose prediction layers go into the checkpoint; without one it has none, and an export
            has to be given the folder.
        hf_config: config.json of the model, kept in run_config.yaml for later exports.
        ignore: patterns (as in a shell) of HF names whose tensors the model does not have.
        iteration: number of the iteration.
        overwrite: replace an iteration that is there already.
        groups: of the model; by default those it was built with.

    Raises:
        BridgeError: on every rank, with the message of the first one that failed.
    """
    folders: list[HfFolder] = []

    def opened() -> LiveModel:
        if source is not None:
            folders.append(open_hf(source))
        shapes = folders[0].shapes if folders else None
        live = open_mimo(model, components, groups_of(model, groups), inventory=shapes, ignore=ignore)
        live.plan.audit(shapes)
        return live

    def state() -> dict[str, Any]:
        found = sharded_state(model, groups_of(model, groups))
        return {"model": found | (_carried(components, folders[0], ignore) if folders else {})}

    def text(live: LiveModel, dtype: str) -> str:
        return write_run_config(
            components.fields,
            components.family,
            hf_config,
            dtype,
            ignore=ignore,
            forms=live.plan.forms,
            sections=components_section(
                components, groups_of(model, groups).layouts, colocated=mimo_plan(live).colocated
            ),
        )

    report = save_live(opened, state, text, path, iteration=iteration, overwrite=overwrite)
    return replace(report, adapters=_count(model, groups_of(model, groups)))


def load_megatron_model(
    model: Any,
    path: str | Path,
    components: Components,
    *,
    ignore: Sequence[str] = (),
    groups: MimoGroups | None = None,
) -> MegatronReport:
    """Fill a live `MimoModel` from a MIMO torch_dist checkpoint, saved in any layouts.

    Collective over the default group.

    The checkpoint's tensors are compared with the model's before a byte is copied; then megatron-core loads, at its
    default strictness. Prediction layers in the checkpoint are left where they are.

    Args:
        model, components, ignore, groups: as for `save_megatron_model`.
        path: folder of a run, whose latest iteration is taken, or of one iteration; all ranks must see it.

    Raises:
        BridgeError: on every rank, with the message of the first one that failed.
    """

    def compare(live: LiveModel, folder: Path) -> None:
        dcp = read_dcp(folder)
        kept = {key: tensor for key, tensor in dcp.tensors.items() if not key.startswith(_PREDICTION)}
        checkpoint = MegatronFolder(folder, replace(dcp, tensors=kept), components.fields, components.mapped, None)
        megatron_entries(export_plan(checkpoint, ignore=ignore), checkpoint)
        check_said(dcp, components.fields)

    def take(loaded: dict[str, Any]) -> None:
        state = loaded["model"]
        for prefix, module in modules_of(model, groups_of(model, groups)).values():
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            fill_module(module, own)

    report = load_live(
        lambda: open_mimo(model, components, groups_of(model, groups), ignore=ignore),
        compare,
        lambda: {"model": sharded_state(model, groups_of(model, groups))},
        take,
        path,
    )
    return replace(report, adapters=_count(model, groups_of(model, groups)))


def _count(model: Any, groups: MimoGroups) -> int:
    return count_adapters(module for _, module in modules_of(model, groups).values())


def sharded_state(model: Any, groups: MimoGroups) -> dict[str, Any]:
    """mcore's sharded state of this rank's components, under the names of a bare `MimoModel`.

    Reads no global `parallel_state`.
    """
    found: dict[str, Any] = {}
    for name, (prefix, module) in modules_of(model, groups).items():
        found |= sharded_chunk(module, groups.mine[name], prefix)
    return found


# --- Prediction layers, which no rank has ----------------------------------------------------------


def _carried(components: Components, source: HfFolder, ignore: Sequence[str]) -> dict[str, Any]:
    """This rank's share of the tensors that go from an HF folder into the checkpoint: whole ones, in turns."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing import ShardedTensor

    rank, size = dist.get_rank(), dist.get_world_size()
    state: dict[str, Any] = {}
    with ExitStack() as stack:
        reader = Reader(OpenFiles(stack))
        for number, (place, job) in enumerate(_carried_jobs(components, source, ignore)):
            if number % size == rank:
                stacked = [(axis, at, n) for axis, (at, n) in enumerate(zip(place.stack, place.extents, strict=True))]
                state[f"{place.key}/{place.stack}"] = ShardedTensor.from_rank_offsets(
                    place.key, _read(job, reader), *stacked, prepend_axis_num=len(stacked)
                )
    return state


def _carried_jobs(components: Components, source: HfFolder, ignore: Sequence[str]) -> Iterator[tuple[Place, Job]]:
    """Where each carried tensor lies in the checkpoint, and how it is made."""
    plan = Plan(components.whole, components.fields, ParallelLayout(), inventory=source.shapes, ignore=ignore)
    forms = written_forms(plan.entries)
    for entry in (entry for entry in plan.entries if entry.name.startswith(_PREDICTION)):
        for layer, expert in entry.instances():
            for place in places(entry, forms[entry.block], layer, expert):
                shape, at = place.box.shape, (0,) * len(place.box.shape)
                pieces = [
                    part
                    for piece in entry.instance(entry.pieces, layer, expert)
                    for part in restrict(piece, "target", entry.shape, place.box, shape, at)
                ]
                parts = tuple((source.tensors[piece.source.tensor], piece) for piece in pieces)
                yield place, Job(Stored("", 0, parts[0][0].dtype, shape), parts, shift=entry.shift)


def _read(job: Job, reader: Reader) -> Tensor:
    import torch

    made = torch.empty(job.target.nbytes // dtype_of(job.target.dtype).itemsize, dtype=torch_dtype(job.target.dtype))
    read_into(made, job, reader)
    return made.view(job.target.shape)
