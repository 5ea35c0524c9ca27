"""The sharded state of live modules, as megatron-core has it, and its own way to disk and back.

No global `parallel_state` is read. Adapters are told from the base that they are on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from bridge_core.checkpoint.keys import is_adapter
from bridge_core.errors import CheckpointError
from bridge_core.runtime.homes import config_of, unwrap
from bridge_core.runtime.layer_specs import placed_by
from bridge_core.runtime.workers import LostWorkerError

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


def sharded_state(model: Any, groups: ProcessGroupCollection | None = None) -> dict[str, Any]:
    """mcore's sharded state of a model's chunks, under Megatron-LM's names. Reads no global `parallel_state`.

    Args:
        model: chunks of this rank, wrapped or not.
        groups: process groups of the model; by default those it was built with.

    Returns:
        `{"model": state}` of a single chunk, `{"model0": ..., "model1": ...}` of several.
    """
    chunks = named_chunks(model)
    used = groups or next(iter(chunks.values())).pg_collection
    return {name: sharded_chunk(chunk, used, vpp=len(chunks)) for name, chunk in chunks.items()}


def sharded_chunk(chunk: Any, groups: ProcessGroupCollection, prefix: str = "", *, vpp: int = 1) -> dict[str, Any]:
    """mcore's sharded state of one chunk, of `vpp` on this rank, names and keys below `prefix`.

    Reads no global `parallel_state`: of layers that a layout string places, mcore asks it for their numbers.
    """
    with placed_by(config_of(chunk), groups, vpp), _tied_by(chunk, groups), _duplicated_in(chunk, groups):
        return chunk.sharded_state_dict(prefix=prefix, metadata={"dp_cp_group": groups.dp_cp})


@contextmanager
def _duplicated_in(chunk: Any, groups: ProcessGroupCollection) -> Iterator[None]:
    """Tell linears that every tensor-parallel rank holds whole which of these they are on.

    Transformer Engine's have no group of their own, and ask the global state for one: without it each rank would claim
    to be the one that saves (megatron-core 0.19.2, extensions/transformer_engine.py, `TELinear`, "duplicated").
    """
    alone = [
        m for m in chunk.modules() if getattr(m, "_tp_group", m) is None and getattr(m, "parallel_mode", m) is None
    ]
    for module in alone:
        module._tp_group = groups.tp
    try:
        yield
    finally:
        for module in alone:
            module._tp_group = None


def without_adapters(state: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The state of some chunks, by name, without what adapters keep in it."""
    return {name: {key: e for key, e in entries.items() if not is_adapter(key)} for name, entries in state.items()}


def fill_module(module: Any, values: Mapping[str, Any]) -> None:
    """Put what was loaded of a module's base into it, strictly; adapters in it keep their values."""
    kept = {key: value for key, value in module.state_dict().items() if is_adapter(key)}
    module.load_state_dict(kept | dict(values), strict=True)


def count_adapters(modules: Iterable[Any]) -> int:
    """Parameters of adapters on some modules."""
    return sum(is_adapter(name) for module in modules for name, _ in module.named_parameters())


def named_chunks(model: Any) -> dict[str, Any]:
    """A model's chunks under Megatron-LM's names: `model` of a single one, else `model0`, `model1`, ..."""
    chunks = unwrap(model)
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{n}": chunk for n, chunk in enumerate(chunks)}


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


@contextmanager
def _tied_by(chunk: Any, groups: ProcessGroupCollection) -> Iterator[None]:
    """Let the last stage's copy of a tied embedding be described by `groups` instead of global state.

    mcore asks `parallel_state.get_data_parallel_rank` for it, in every version so far (0.16.1 and 0.19.2,
    models/common/language_module/language_module.py, `tie_embeddings_and_output_weights_state_dict`). Beside
    prediction layers, which have a copy of their own, it asserts that there is none, although it made one. The
    method is shadowed on this one instance, for the time of the call.
    """
    tied = getattr(chunk, "share_embeddings_and_output_weights", False)
    own_copy = tied and chunk.post_process and not chunk.pre_process
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
