"""HF weights into a live `MimoModel`, and out of it into files: every rank moves what its components hold, no more.

These are core's executors, over a plan whose ranks are those of the world.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_core.checkpoint.convert import codec_options
from bridge_core.checkpoint.hf_folder import HfFolder
from bridge_core.runtime.live import LiveModel
from bridge_core.runtime.load import LoadReport, load_live
from bridge_core.runtime.save import SaveReport, save_live
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
    allowed_mismatched: Collection[str] = (),
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
        allowed_mismatched: patterns of parameter names, such as `"language_model.output_layer.weight"`, that may
            differ or be absent, as for core's `load_hf_weights`.
        options: `threads`, `one_reader_per_node`, `node_group`, `bucket_bytes`, as there.

    Raises:
        BridgeError: on every rank, with the message of the first one that failed.
    """

    def opened(folder: HfFolder) -> LiveModel:
        known = groups_of(model, groups)
        return open_mimo(model, components, known, inventory=folder.shapes, ignore=ignore, excepted=allowed_mismatched)

    return load_live(opened, path, group=group, allowed_mismatched=allowed_mismatched, **options)


def save_hf_pretrained(
    model: Any,
    path: str | Path,
    components: Components,
    *,
    config: dict[str, Any] | None = None,
    source: str | Path | None = None,
    ignore: Sequence[str] = (),
    fp8: bool = False,
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
        fp8, options: as for core's `save_hf_pretrained`.

    Raises:
        BridgeError: on every rank, with the message of the first one that failed.
    """
    family, fields = components.family, components.fields

    def opened(like: HfFolder | None) -> LiveModel:
        held, how = like.shapes if like else None, codec_options(fp8, like)
        return open_mimo(model, components, groups_of(model, groups), inventory=held, ignore=ignore, **how)

    return save_live(
        opened,
        lambda live: cut_over(live, groups_of(model, groups)),
        path,
        family.consistent(config, fields) if config else family.to_hf(fields),
        source=source,
        fp8=fp8,
        carried=lambda live: tuple(mimo_plan(live).carried),
        group=group,
        **options,
    )
