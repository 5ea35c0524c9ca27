"""Where a Megatron tensor lies in a torch_dist checkpoint: its key, and its place in a stacked tensor.

megatron-core saves one logical tensor in one of three forms (0.16.1 and 0.19.2: transformer/
transformer_block.py and transformer/moe/experts.py, `sharded_state_dict`):

* `STACKED`: layers that are all alike share a key, the layer is the first dim;
* `PER_LAYER`: the layer's number is in the key (unequal layers, or asked for);
* `SINGLETON`: the expert's number is in the key too, and a gated `linear_fc1` is two tensors, `_w`, `_v`.

In the first two, experts share a key and are the next dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from bridge_core.geometry import Box, Shape
from bridge_core.patterns import fill
from bridge_core.plan import Entry


class Form(Enum):
    """How a checkpoint names and stacks the tensors of layers and experts."""

    STACKED = "stacked"
    PER_LAYER = "per layer"
    SINGLETON = "singleton"


class Place(NamedTuple):
    """Where one Megatron tensor, or a segment of it, lies in a checkpoint.

    Attributes:
        key: name in the checkpoint.
        stack: numbers of the leading stacked dims, outermost first.
        extents: sizes of those dims.
        box: the region of the Megatron tensor that lies there; all of it unless the form splits it.
    """

    key: str
    stack: Shape
    extents: Shape
    box: Box


def _pattern(entry: Entry, form: Form) -> str:
    name = entry.name
    if entry.is_expert:
        block, _, rest = name.partition(".experts.")
        rest = rest.replace("{expert}", "")
        expert = "{expert}." if form is Form.SINGLETON else ""
        name = f"{block}.experts.experts.{expert}{rest}"
    return name.replace("{layer}.", "") if form is Form.STACKED else name


def places(entry: Entry, form: Form, layer: int, expert: int, *, num_layers: int) -> Iterator[Place]:
    """Where an instance of `entry` lies in a checkpoint of the given form."""
    key = fill(_pattern(entry, form), layer, expert)
    index: list[int] = []
    extents: list[int] = []
    if entry.has_layer and form is Form.STACKED:
        index.append(layer)
        extents.append(num_layers)
    if entry.is_expert and form is not Form.SINGLETON:
        index.append(expert)
        extents.append(entry.experts)
    segments = entry.split.segments if entry.split else ()
    if form is Form.SINGLETON and len(segments) == 2:
        rows, start = segments, (0, segments[0])
        for suffix, count, first in zip(("_w", "_v"), rows, start, strict=True):
            box = Box((first, *(0 for _ in entry.shape[1:])), (count, *entry.shape[1:]))
            yield Place(key + suffix, tuple(index), tuple(extents), box)
        return
    yield Place(key, tuple(index), tuple(extents), Box((0,) * len(entry.shape), entry.shape))


def alias_keys(entries: tuple[Entry, ...], form: Form) -> Iterator[tuple[str, str]]:
    """Keys under which megatron-core's local spec looks for tensors that have another key elsewhere.

    Its layer specs send `pre_mlp_layernorm` to `mlp.linear_fc1.layer_norm_`, also in layers with experts
    (0.16.1 and 0.19.2, models/gpt/gpt_layer_specs.py, `sharded_state_dict_keys_map`), where Transformer
    Engine's specs keep its name. Yields (key, alias).
    """
    for entry in entries:
        if entry.name.endswith(_NORM_OF_EXPERTS):
            pattern = _pattern(entry, form)
            for layer in entry.layers if "{layer}" in pattern else (0,):
                key = fill(pattern, layer)
                yield key, key.removesuffix(_NORM_OF_EXPERTS) + ".mlp.linear_fc1.layer_norm_weight"


_NORM_OF_EXPERTS = ".pre_mlp_layernorm.weight"


def extra_state_keys(entries: tuple[Entry, ...], form: Form, *, num_layers: int) -> Iterator[str]:
    """Keys of the `_extra_state` objects that megatron-core asks for in its strict loading.

    Both the local and the Transformer Engine spec load such a checkpoint: this is the union of what
    they ask for, and objects that a model does not ask for do no harm. An object's key ends in its
    place among the stacked dims: `.../shard_3_28` (dist_checkpointing/mapping.py, `ShardedObject.unique_key`).
    """
    modules: dict[str, Entry] = {}
    for entry in entries:
        stem = _pattern(entry, form).rpartition(".")[0]
        modules.setdefault(stem, entry)
        if stem.endswith("linear_qkv"):
            modules.setdefault(stem.removesuffix("linear_qkv") + "core_attention", entry)
    for stem, entry in modules.items():
        for layer, expert in entry.instances():
            place = next(places(entry, form, layer, expert, num_layers=num_layers))
            index = ".".join(map(str, place.stack)) or "0"
            extents = ".".join(map(str, place.extents)) or "1"
            yield f"{fill(stem, layer, expert)}._extra_state/shard_{index}_{extents}"


def stacked_shape(place: Place) -> Shape:
    """Shape of the checkpoint's tensor at a place."""
    return (*place.extents, *place.box.shape)
