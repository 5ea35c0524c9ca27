"""HF weights into a live `MimoModel` and out of it. Every rank reads and writes what its components hold, no more.

These are core's executors, over a plan whose ranks are those of the world.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_core.checkpoint.workers import jointly
from bridge_core.runtime.load import LoadReport, default_group, load_live
from bridge_core.runtime.save import SaveReport, save_live
from bridge_core.runtime.stream import Stream
from bridge_core.runtime.workers import TorchWorkers
from bridge_mimo.components import Components
from bridge_mimo.runtime.live import cut_over, groups_of, mimo_plan, open_mimo

if TYPE_CHECKING:
    from bridge_mimo.runtime.groups import MimoGroups


def load_hf_weights(
    model: Any,
    path: str | Path,
    components: Components,
    *,
    ignore: Sequence[str] = (),
    groups: MimoGroups | None = None,
    group: Any = None,
    **options: Any,
) -> LoadReport:
    """Fill a live `MimoModel` from an HF folder. Collective over `group`.

    Everything is checked on all ranks before the first byte is copied. The tensors of prediction layers, which the
    model has no place for, are among the report's `ignored`.

    Args:
        model: the `MimoModel`, its components wrapped or not, on CPU or GPU.
        path: HF folder; all ranks must see it.
        components: of the HF model.
        ignore: patterns (as in a shell) of HF names to leave out, which the report names.
        groups: of the model; by default those it was built with.
        group: all ranks of the world; by default torch's default group.
        options: `threads`, `one_reader_per_node`, `node_group`, `bucket_bytes`, as for core's `load_hf_weights`.

    Raises:
        BridgeError: on every rank, with the message of the first one that failed.
    """
    return load_live(
        lambda folder: open_mimo(model, components, groups_of(model, groups), inventory=folder.shapes, ignore=ignore),
        path,
        group=group,
        **options,
    )


def make_stream(
    model: Any,
    components: Components,
    *,
    inventory: Any = None,
    ignore: Sequence[str] = (),
    groups: MimoGroups | None = None,
    group: Any = None,
    **options: Any,
) -> Stream:
    """The export of a live `MimoModel`, planned once for many passes. Collective over `group`.

    Every rank of the world yields every tensor that some component holds, in one order; a bucket is one collective
    over all of them, and no rank ever has more than a bucket. Prediction layers, which no component holds, are not
    among them.

    Args:
        model, components, ignore, groups, group: as for `load_hf_weights`.
        inventory: shapes of the HF tensors of a checkpoint, which choose between the forms that a family has.
        options: `dtype`, `bucket_bytes`, `names`, as for core's `Stream`.
    """
    group = group or default_group()

    def opened() -> Any:
        return open_mimo(model, components, groups_of(model, groups), inventory=inventory, ignore=ignore)

    return Stream(jointly(TorchWorkers(group), opened), group=group, **options)


def save_hf_pretrained(
    model: Any,
    path: str | Path,
    components: Components,
    *,
    config: dict[str, Any] | None = None,
    source: str | Path | None = None,
    ignore: Sequence[str] = (),
    groups: MimoGroups | None = None,
    group: Any = None,
    **options: Any,
) -> SaveReport:
    """Write a live `MimoModel` as one HF folder. Collective over `group`; all ranks must see `path`.

    Every owner writes its own bytes at their offsets, whichever component they are of. Prediction layers are copied
    from `source`; without one there are none to copy, and they have to be left out by `ignore`.

    Args:
        model, components, groups, group: as for `load_hf_weights`.
        path: output folder.
        config: config.json; by default rebuilt from the model's fields.
        source: an HF folder whose split into files is used, and whose other files are carried along.
        ignore: patterns (as in a shell) of HF names to leave out.
        options: those of core's `save_hf_pretrained`, but for `fp8`.

    Raises:
        BridgeError: on every rank, with the message of the first one that failed.
    """
    known = groups_of(model, groups)
    family, fields = components.family, components.fields
    return save_live(
        lambda like: open_mimo(model, components, known, inventory=like.shapes if like else None, ignore=ignore),
        lambda live: cut_over(live, known),
        path,
        family.consistent(config, fields) if config else family.to_hf(fields),
        source=source,
        carried=lambda live: tuple(mimo_plan(live).carried),
        group=group,
        **options,
    )
