"""Megatron checkpoints from and to live models, through megatron-core's own `dist_checkpointing`.

What is written is what Megatron-LM writes for weights: an `iter_XXXXXXX` folder with the chunks of virtual
pipelining as `model0`, `model1`; beside the weights lies run_config.yaml. It loads at any layout, here and there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from bridge_core.checkpoint.dcp import read_dcp
from bridge_core.checkpoint.keys import is_adapter
from bridge_core.checkpoint.megatron_folder import LATEST, MegatronFolder, export_plan, find_iteration
from bridge_core.checkpoint.output import check_free, write_folder
from bridge_core.checkpoint.run_config import RUN_CONFIG, write_run_config
from bridge_core.checkpoint.wiring import megatron_entries
from bridge_core.dtypes import dtype_of
from bridge_core.errors import CheckpointError, LayoutError
from bridge_core.families import Family, Fields
from bridge_core.runtime.live import LiveModel, open_live, unwrap
from bridge_core.runtime.load import default_group
from bridge_core.runtime.own_world import OwnWorld
from bridge_core.runtime.tensors import dtype_name
from bridge_core.runtime.workers import LostWorkerError, TorchWorkers

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
    workers = TorchWorkers(group or default_group())
    run = Path(path)
    output = run / f"iter_{iteration:07d}"

    def check() -> LiveModel:
        check_free(output, overwrite=overwrite)
        return open_live(model, family, fields, groups=groups, ignore=ignore)

    live = _checked(workers, check)
    dtype = _main_dtype(live)
    nbytes = sum(prod(shape) for shape in live.plan.megatron_tensors.values()) * dtype_of(dtype).itemsize

    def finish(folder: Path) -> None:
        text = write_run_config(fields, family, hf_config, dtype, ignore=ignore, forms=live.plan.forms)
        (folder / RUN_CONFIG).write_text(text, encoding="utf-8")

    def state() -> dict[str, Any]:
        return _base_state(model, groups) | {"iteration": iteration, "checkpoint_version": 3.0}

    with OwnWorld() as world:

        def fill(folder: Path, rank: int, size: int) -> None:
            world.step(lambda: save_state(state(), folder, where=output))

        write_folder(output, nbytes, workers, lambda folder: None, fill, finish, overwrite=overwrite)
    workers.together(lambda: _make_latest(run, iteration) if workers.rank == 0 else None)
    return MegatronReport(
        folder=output, iteration=iteration, parameters=len(live.shards), adapters=_count_adapters(model)
    )


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
    workers = TorchWorkers(group or default_group())

    def check() -> tuple[LiveModel, Path]:
        live = open_live(model, family, fields, groups=groups, ignore=ignore)
        folder = find_iteration(Path(path))
        checkpoint = MegatronFolder(folder, read_dcp(folder), fields, family, None)
        megatron_entries(export_plan(checkpoint, ignore=ignore), checkpoint)
        return live, folder

    live, folder = _checked(workers, check)
    iterations: list[int] = []
    with OwnWorld() as world:
        workers.together(lambda: iterations.append(world.step(lambda: _load(model, folder, groups))))
    return MegatronReport(
        folder=folder, iteration=iterations[0], parameters=len(live.shards), adapters=_count_adapters(model)
    )


def _checked(workers: TorchWorkers, check: Callable[[], T]) -> T:
    """What `check` returns here, once it returned on all ranks. Collective."""
    found: list[T] = []

    def step() -> None:
        _check_world(workers)
        found.append(check())

    workers.together(step)
    return found[0]


def save_state(state: dict[str, Any], folder: Path, *, where: Path) -> None:
    """megatron-core's own save of a sharded state. Collective over torch's default group; call it in an `OwnWorld`.

    Args:
        state: what mcore's `dist_checkpointing.save` takes.
        folder: an empty one.
        where: what to call it in errors.
    """
    from megatron.core import dist_checkpointing

    with _in_our_words(where), _own_results():
        dist_checkpointing.save(state, str(folder))


def load_state(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """megatron-core's own load of a sharded state, at its default strictness. Collective like `save_state`."""
    from megatron.core import dist_checkpointing

    with _in_our_words(folder):
        return dist_checkpointing.load(state, str(folder))  # type: ignore[return-value]


def _load(model: Any, folder: Path, groups: ProcessGroupCollection | None) -> int:
    """A checkpoint into the parameters of the base; the iteration. Collective."""
    loaded: Any = load_state(_base_state(model, groups), folder)
    for name, chunk in _named_chunks(model).items():
        kept = {key: value for key, value in chunk.state_dict().items() if is_adapter(key)}
        chunk.load_state_dict(kept | loaded[name], strict=True)
    return int(loaded.get("iteration") or 0)


def sharded_state(model: Any, groups: ProcessGroupCollection | None = None) -> dict[str, Any]:
    """mcore's sharded state of a model's chunks, under Megatron-LM's names. Reads no global `parallel_state`.

    Args:
        model: chunks of this rank, wrapped or not.
        groups: process groups of the model; by default those it was built with.

    Returns:
        `{"model": state}` of a single chunk, `{"model0": ..., "model1": ...}` of several.
    """
    chunks = _named_chunks(model)
    used = groups or next(iter(chunks.values())).pg_collection
    state = {}
    for name, chunk in chunks.items():
        with _tied_by(chunk, used):
            state[name] = chunk.sharded_state_dict(metadata={"dp_cp_group": used.dp_cp})
    return state


def _base_state(model: Any, groups: ProcessGroupCollection | None) -> dict[str, Any]:
    """`sharded_state` without adapters."""
    return {
        name: {key: entry for key, entry in state.items() if not is_adapter(key)}
        for name, state in sharded_state(model, groups).items()
    }


def _count_adapters(model: Any) -> int:
    return sum(is_adapter(name) for chunk in unwrap(model) for name, _ in chunk.named_parameters())


def _main_dtype(live: LiveModel) -> str:
    """The dtype of most of this rank's parameters, by its safetensors name; router biases may be wider."""
    held = Counter(dtype_name(tensor) for tensor in live.tensors.values())
    return held.most_common(1)[0][0] if held else live.plan.dtype


def _named_chunks(model: Any) -> dict[str, Any]:
    chunks = unwrap(model)
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{n}": chunk for n, chunk in enumerate(chunks)}


@contextmanager
def _tied_by(chunk: Any, groups: ProcessGroupCollection) -> Iterator[None]:
    """Let the last stage's copy of a tied embedding be described by `groups` instead of global state.

    mcore asks `parallel_state.get_data_parallel_rank` for it, in every version so far (0.16.1 and 0.19.2,
    models/common/language_module/language_module.py, `tie_embeddings_and_output_weights_state_dict`). Beside
    prediction layers, which have a copy of their own, it asserts that there is none, although it made one. The
    method is shadowed on this one instance, for the time of the call.
    """
    own_copy = chunk.share_embeddings_and_output_weights and chunk.post_process and not chunk.pre_process
    if not own_copy:
        yield
        return
    from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

    def tie(state: dict[str, Any], output_key: str, embedding_key: str, *rest: Any, **options: Any) -> None:
        # Stage 1 of the replica number: a copy of what the first stage saves, and never the one that is written.
        state[output_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=chunk.output_layer.weight,
            key=embedding_key,
            replica_id=(1, 0, groups.dp_cp.rank()),
            allow_shape_mismatch=True,
            tp_group=groups.tp,
            dp_cp_group=groups.dp_cp,
        )

    with ExitStack() as stack:
        chunk.tie_embeddings_and_output_weights_state_dict = tie
        stack.callback(delattr, chunk, "tie_embeddings_and_output_weights_state_dict")
        yield


@contextmanager
def _own_results() -> Iterator[None]:
    """Let megatron-core's writer report what it wrote into a queue of this save alone.

    Its own queue belongs to the process: what a save that failed on another rank has left there would become the
    table of contents of the next one, and that checkpoint would point at the wrong bytes (0.16.1 and 0.19.2,
    strategies/filesystem_async.py, `_results_queue` and `retrieve_write_results`). A save that waits for its writer
    needs no more than a queue between threads, and saves the time of starting the process that serves the other.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before = filesystem_async._results_queue
    filesystem_async._results_queue = SimpleQueue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


@contextmanager
def _in_our_words(where: Path) -> Iterator[None]:
    """Errors of megatron-core and of torch's checkpoints that pass through become a CheckpointError.

    Raises:
        LostWorkerError: another rank failed, and torch says no more than that here.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointingException as error:
        raise CheckpointError(
            "megatron-core refuses the checkpoint",
            where=where,
            got=str(error).strip(),
            fix="check that the checkpoint and the model belong together",
        ) from error
    except CheckpointException as error:  # no Exception: it would pass by everybody who waits for one
        failures = [
            f"rank {rank}: {type(wrapped[0]).__name__}: {wrapped[0]}" for rank, wrapped in error.failures.items()
        ]
        if not failures:
            raise LostWorkerError("torch reports a failure on another rank") from error
        raise CheckpointError(
            "ranks failed inside of megatron-core's checkpoint",
            where=where,
            got="; ".join(failures),
            fix="look at those ranks: their disk, their memory, the files they see",
        ) from error


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


def _make_latest(run: Path, iteration: int) -> None:
    """Say which iteration is the latest, by a file that is either the old or the new one."""
    aside = run / f".{LATEST}.partial"
    aside.write_text(str(iteration), encoding="utf-8")
    os.replace(aside, run / LATEST)
