"""Adapter checkpoints of live models: written and read by megatron-core, without the base. Collective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bridge_core.bridge import AutoBridge
from bridge_core.checkpoint.megatron_folder import LATEST
from bridge_core.checkpoint.output import check_free, write_folder
from bridge_core.checkpoint.run_config import RUN_CONFIG
from bridge_core.checkpoint.workers import jointly
from bridge_core.errors import ConfigError, CoverageError, preview
from bridge_core.runtime.agreement import check_size
from bridge_core.runtime.homes import unwrap
from bridge_core.runtime.megatron_state import load_state, save_state, sharded_state
from bridge_core.runtime.own_world import OwnWorld
from bridge_core.runtime.words import default_group
from bridge_core.runtime.workers import TorchWorkers
from bridge_peft.apply import adapters_named
from bridge_peft.converting.checkpoint import find_checkpoint
from bridge_peft.converting.gather import settings_of
from bridge_peft.converting.run_config import write_settings
from bridge_peft.settings import AdapterSettings
from bridge_peft.sharded import adapter_entries


def save_adapter_ckpt(
    model: Any,
    path: str | Path,
    bridge: AutoBridge,
    *,
    iteration: int = 0,
    overwrite: bool = False,
    groups: Any = None,
    group: Any = None,
) -> Path:
    """Save the adapters of a live model, of all names, as a Megatron checkpoint without the base. Collective.

    megatron-core saves them; settings and the base's config.json lie beside them in run_config.yaml, so that
    `export_adapter_ckpt` needs nothing else. `load_adapter_ckpt` loads them at any layout.

    Args:
        model: an adapted model or its chunks.
        path: folder of the run; gets `iter_<iteration>/`.
        bridge: of the HF model that the base came from.
        iteration: number of the training step.
        overwrite: replace an iteration that is there.
        groups: the model's process groups; by default those it was built with.
        group: all ranks of the model; must be torch's default group, which is all that mcore knows.

    Returns:
        The folder of the iteration.

    Raises:
        BridgeError: on every rank.
    """
    group = group or default_group()
    check_size(model, groups, group)
    workers = TorchWorkers(group)
    output = Path(path) / f"iter_{iteration:07d}"
    workers.together(lambda: check_free(output, overwrite=overwrite))
    mine = {
        (name, adapters.site.name): settings_of(adapter).to_dict()
        for adapters in adapters_named(model, ())
        for name, adapter in adapters.items()
    }
    words = workers.share([[*key, settings] for key, settings in mine.items()])
    said = {(name, layer): settings for theirs in words for name, layer, settings in theirs}
    adapters: dict[str, dict[str, AdapterSettings]] = {}
    for (name, layer), settings in sorted(said.items()):
        adapters.setdefault(name, {})[layer] = AdapterSettings.from_dict(settings, where=layer)
    if not adapters:
        raise ConfigError("the model has no adapter", where=output, expected="apply_lora", got="none on any rank")

    def state() -> dict[str, Any]:
        chunks = sharded_state(model, groups).items()
        found: dict[str, Any] = {"iteration": iteration, "checkpoint_version": 3.0}
        return found | {chunk: adapter_entries(entries) for chunk, entries in chunks}

    with OwnWorld() as world:

        def fill(folder: Path, rank: int, size: int) -> None:
            world.step(lambda: save_state(state(), folder, where=output))

        def finish(folder: Path) -> None:
            text = write_settings(adapters, bridge.config)
            (folder / RUN_CONFIG).write_text(text, encoding="utf-8")

        write_folder(output, 0, workers, lambda folder: None, fill, finish, overwrite=overwrite)
    workers.together(lambda: _make_latest(Path(path), iteration) if workers.rank == 0 else None)
    return output


def _make_latest(run: Path, iteration: int) -> None:
    partial = run / f".{LATEST}.tmp"
    partial.write_text(str(iteration), encoding="utf-8")
    partial.replace(run / LATEST)


def load_adapter_ckpt(model: Any, path: str | Path, *, groups: Any = None, group: Any = None) -> None:
    """Fill the adapters of a live model from a checkpoint of any layout; the base stays. Collective.

    Args:
        model: adapted as when it was saved (`apply_lora` with the same settings).
        path: folder of a run or of one iteration.
        groups, group: as for `save_adapter_ckpt`.

    Raises:
        BridgeError: on every rank.
    """
    group = group or default_group()
    check_size(model, groups, group)
    workers = TorchWorkers(group)
    folder = jointly(workers, lambda: find_checkpoint(path))

    def wanted() -> dict[str, Any]:
        return {name: adapter_entries(state) for name, state in sharded_state(model, groups).items()}

    def load() -> None:
        loaded: Any = world.step(lambda: load_state(wanted(), folder))
        chunks = unwrap(model)
        for number, chunk in enumerate(chunks):
            values = loaded["model" if len(chunks) == 1 else f"model{number}"]
            unknown = chunk.load_state_dict(values, strict=False).unexpected_keys
            if unknown:
                raise CoverageError("a chunk has no such adapters", where=folder, got=preview(unknown))

    with OwnWorld() as world:
        workers.together(load)
