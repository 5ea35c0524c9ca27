"""Where a Megatron tensor lies in a torch_dist checkpoint: its key, and its place in a stacked tensor.

megatron-core saves one logical tensor in one of three forms (0.16.1 and 0.19.2: transformer/
transformer_block.py and transformer/moe/experts.py, `sharded_state_dict`):

* `STACKED`: layers that are all alike share a key, the layer is the first dim;
* `PER_LAYER`: the layer's number is in the key (unequal layers, or asked for);
* `SINGLETON`: the expert's number is in the key too, and a gated `linear_fc1` is two tensors, `_w`, `_v`.

In the first two, experts share a key and are the next dim. Each block of layers (the decoder, a vision tower)
has a form of its own. Segments that have names (`Split.names`) are tensors of their own in every form:
`in_proj.weight.z`, `in_proj.weight.x`, ... (ssm/mamba_mixer.py, ssm/gated_delta_net/common.py, `sharded_state_dict`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import Enum
from typing import NamedTuple

from bridge_core.geometry import Box, Shape
from bridge_core.patterns import fill
from bridge_core.plan import Entry
from bridge_core.plan.placement import DECODER_LAYERS


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


# Where LoRA and its like keep what they add to a layer, as a child module of it (bridge-peft; Megatron-Bridge 0.7,
# peft/adapter_wrapper.py). It is no part of the model that a configuration describes.
_ADAPTER = re.compile(r"(^|\.)adapter\.")


def is_adapter(name: str) -> bool:
    """Whether a parameter, or a key of a checkpoint, belongs to an adapter on a layer and not to the model."""
    return _ADAPTER.search(name) is not None


def _pattern(entry: Entry, form: Form) -> str:
    name = entry.name
    if entry.is_expert:
        block, _, rest = name.partition(".experts.")
        rest = rest.replace("{expert}", "")
        expert = "{expert}." if form is Form.SINGLETON else ""
        name = f"{block}.experts.experts.{expert}{rest}"
    return name.replace("{layer}.", "") if form is Form.STACKED else name


Forms = Mapping[str, Form]
"""The form of each block of layers, by `Entry.block`."""


def by_block(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries by the block of layers they belong to."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.block, []).append(entry)
    return found


def written_forms(entries: Collection[Entry]) -> Forms:
    """The forms that megatron-core will ask for: stacked if all layers of a block are alike.

    A `HybridModel`, which its final norm tells from a `GPTModel`, never stacks its layers
    (0.19.2, models/hybrid/hybrid_block.py, `HybridStack.sharded_state_dict`).
    """
    hybrid = any(entry.name == "decoder.final_norm.weight" for entry in entries)
    return {
        block: Form.PER_LAYER
        if (hybrid and block == DECODER_LAYERS) or any(len(entry.layers) < entry.depth for entry in members)
        else Form.STACKED
        for block, members in by_block(entries).items()
    }


def places(entry: Entry, form: Form, layer: int, expert: int) -> Iterator[Place]:
    """Where an instance of `entry` lies in a checkpoint of the given form."""
    key = fill(_pattern(entry, form), layer, expert)
    index: list[int] = []
    extents: list[int] = []
    if entry.has_layer and form is Form.STACKED:
        index.append(layer)
        extents.append(entry.depth)
    if entry.is_expert and form is not Form.SINGLETON:
        index.append(expert)
        extents.append(entry.experts)
    for suffix, box in _segments(entry, form):
        yield Place(key + suffix, tuple(index), tuple(extents), box)


def _segments(entry: Entry, form: Form) -> Iterator[tuple[str, Box]]:
    """The parts of a tensor that a checkpoint stores apart: the ends of their keys, and their rows."""
    names: tuple[str, ...] = ()
    split = entry.split
    if split is not None and split.names:
        names = tuple(f".{name}" for name in split.names)
    elif split is not None and entry.is_expert and form is Form.SINGLETON and len(split.segments) == 2:
        names = ("_w", "_v")
    if split is None or not names:
        yield "", Box((0,) * len(entry.shape), entry.shape)
        return
    first = 0
    for name, count in zip(names, split.segments, strict=True):
        yield name, Box((first, *(0 for _ in entry.shape[1:])), (count, *entry.shape[1:]))
        first += count


def alias_keys(entries: tuple[Entry, ...], forms: Forms) -> Iterator[tuple[str, str]]:
    """Keys under which megatron-core's local spec looks for tensors that have another key elsewhere.

    Its layer specs send `pre_mlp_layernorm` to `mlp.linear_fc1.layer_norm_`, also in layers with experts
    (0.16.1 and 0.19.2, models/gpt/gpt_layer_specs.py, `sharded_state_dict_keys_map`), where Transformer
    Engine's specs keep its name. Yields (key, alias).
    """
    for entry in entries:
        if entry.name.endswith(_NORM_OF_EXPERTS):
            pattern = _pattern(entry, forms[entry.block])
            for layer in entry.layers if "{layer}" in pattern else (0,):
                key = fill(pattern, layer)
                yield key, key.removesuffix(_NORM_OF_EXPERTS) + ".mlp.linear_fc1.layer_norm_weight"


_NORM_OF_EXPERTS = ".pre_mlp_layernorm.weight"


def extra_state_keys(entries: tuple[Entry, ...], forms: Forms) -> Iterator[str]:
    """Keys of the `_extra_state` objects that megatron-core asks for in its strict loading.

    Both the local and the Transformer Engine spec load such a checkpoint: this is the union of what
    they ask for, and objects that a model does not ask for do no harm. An object's key ends in its
    place among the stacked dims: `.../shard_3_28` (dist_checkpointing/mapping.py, `ShardedObject.unique_key`).
    """
    modules: dict[str, Entry] = {}
    for entry in entries:
        stem = _pattern(entry, forms[entry.block]).rpartition(".")[0]
        modules.setdefault(stem, entry)
        if stem.endswith("linear_proj"):
            modules.setdefault(stem.removesuffix("linear_proj") + "core_attention", entry)
    for stem, entry in modules.items():
        for layer, expert in entry.instances():
            place = next(places(entry, forms[entry.block], layer, expert))
            index = ".".join(map(str, place.stack)) or "0"
            extents = ".".join(map(str, place.extents)) or "1"
            yield f"{fill(stem, layer, expert)}._extra_state/shard_{index}_{extents}"


def stacked_shape(place: Place) -> Shape:
    """Shape of the checkpoint's tensor at a place."""
    return (*place.extents, *place.box.shape)
