"""Offline conversion between an HF folder and a MIMO torch_dist folder: core's, with the names of `MimoModel`.

A checkpoint holds every component whole, so it loads in any set of layouts. Prediction layers, which no rank of a
`MimoModel` asks for, lie in it below the language model, and come back to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge_core.checkpoint import convert
from bridge_core.checkpoint.convert import Options, Report
from bridge_core.checkpoint.verify import Comparison
from bridge_core.checkpoint.verify import verify as core_verify
from bridge_mimo.checkpoint.stored import mimo_variant
from bridge_mimo.layout import Layouts, auto_fill_layout

_DEFAULTS = Options()


def import_ckpt(
    hf_path: str | Path,
    megatron_path: str | Path,
    *,
    parallelism: Layouts | None = None,
    world_size: int | None = None,
    colocated: bool = False,
    hf_towers: Sequence[str] = (),
    options: Options = _DEFAULTS,
    ignore: Sequence[str] = (),
    ignore_options: Sequence[str] = (),
    on_total: Callable[[int], None] | None = None,
) -> Report:
    """Convert an HF safetensors folder to a MIMO torch_dist folder, loadable in any layouts.

    Collective over `options.workers`. No model is built.

    Args:
        hf_path, megatron_path, options, ignore, ignore_options, on_total: as for core's `import_ckpt`.
        parallelism: layout by component, to be recorded beside the weights; they are the same for all layouts.
        world_size, colocated: as for `auto_fill_layout`.
        hf_towers: components whose towers are to be HF's own, whole on every rank (`towers.ReplicatedTower`).

    Raises:
        BridgeError: bad input (nothing was written) or a failed write (nothing looks finished); on all workers.
    """
    layouts = None
    if parallelism is not None:
        layouts = auto_fill_layout(parallelism, world_size, colocated=colocated)
    return convert.import_ckpt(
        hf_path,
        megatron_path,
        options=options,
        ignore=ignore,
        ignore_options=ignore_options,
        on_total=on_total,
        variant=mimo_variant(layouts, colocated=colocated, hf_towers=hf_towers),
    )


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
) -> Report:
    """Convert a MIMO torch_dist folder, saved in any layouts, to an HF safetensors folder.

    Collective over `options.workers`. Where the checkpoint has no prediction layers, as one that was saved from a
    live model, they are copied from `source`.

    Args:
        megatron_path, hf_path, source, hf_config, max_shard_size, fp8, options, ignore, ignore_options, on_total: as
            for core's `export_ckpt`.

    Raises:
        CoverageError: there are no prediction layers to write: neither in the checkpoint nor in `source`. Leave them
            out with `ignore=["mtp.*"]`.
        BridgeError: bad input (nothing was written) or a failed write (nothing looks finished); on all workers.
    """
    return convert.export_ckpt(
        megatron_path,
        hf_path,
        source=source,
        hf_config=hf_config,
        max_shard_size=max_shard_size,
        fp8=fp8,
        options=options,
        ignore=ignore,
        ignore_options=ignore_options,
        on_total=on_total,
        variant=mimo_variant(),
    )


def verify(a: str | Path, b: str | Path, **options: Any) -> Comparison:
    """Compare the tensors of two folders, each an HF or a MIMO one: names, shapes, dtypes, and every byte.

    `options` are those of core's `verify`.
    """
    return core_verify(a, b, variant=mimo_variant(), **options)
