"""Where the modules of a model keep their tensors, and when these are current."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bridge_core.checkpoint.keys import is_adapter
from bridge_core.plan.placement import OUTPUT

if TYPE_CHECKING:
    from torch import Tensor


class Home(NamedTuple):
    """A module, and the name under which it keeps a tensor.

    The tensor is looked up at every access: a module that moves to another device keeps its parameters and gets
    other buffers, and whoever assigns a parameter replaces it.
    """

    module: Any
    attribute: str

    @property
    def tensor(self) -> Tensor:
        """What the module keeps there now; not what a subclass may compute from it when asked by name."""
        found = self.module._parameters.get(self.attribute)
        return self.module._buffers[self.attribute] if found is None else found


# Persistent buffers that are weights (megatron-core 0.19, transformer/moe/router.py, `TopKRouter.__init__`).
_WEIGHT_BUFFERS = (".router.expert_bias",)


def stored(chunk: Any) -> Iterator[tuple[str, Home]]:
    """Parameters of a chunk, without those of adapters on it, and the buffers that are weights as well."""
    # A tied output layer beside prediction layers: megatron-core 0.19 makes a weight for it that it never uses, as the
    # embedding is there too (models/common/language_module/language_module.py, `shared_embedding_or_output_weight`).
    unused = getattr(chunk, "mtp_process", False) and chunk.share_embeddings_and_output_weights
    for name, _ in chunk.named_parameters():
        if not (is_adapter(name) or (unused and name == OUTPUT)):
            yield name, _home(chunk, name)
    for name, _ in chunk.named_buffers():
        if name.endswith(_WEIGHT_BUFFERS):
            yield name, _home(chunk, name)


def _home(chunk: Any, name: str) -> Home:
    path, _, attribute = name.rpartition(".")
    return Home(chunk.get_submodule(path), attribute)


def chunks_of(model: Any) -> list[Any]:
    """The chunks of a model or of a list of them, wrapped as they are."""
    import torch

    return list(model) if isinstance(model, Sequence | torch.nn.ModuleList) else [model]


def unwrap(model: Any) -> list[Any]:
    """The bare model chunks of a model or list of them, without `DDP`, `Float16Module` and other wrappers."""
    return [list(_layers(chunk))[-1] for chunk in chunks_of(model)]


def _layers(chunk: Any) -> Iterator[Any]:
    """A chunk, what it wraps, and so on down to the bare one."""
    yield chunk
    while not hasattr(chunk, "decoder") and hasattr(chunk, "module"):
        chunk = chunk.module
        yield chunk


def config_of(module: Any) -> Any:
    """megatron-core's configuration that a module, or the first one in it that has any, was built with; or None."""
    from megatron.core.transformer import TransformerConfig

    configs = (getattr(inner, "config", None) for inner in module.modules())
    return next((config for config in configs if isinstance(config, TransformerConfig)), None)


def gather_late(model: Any) -> None:
    """Make parameters current that mcore's DDP would gather in the next forward pass. Collective over its DP groups.

    With `overlap_param_gather`, a rank has only its own part of what the last optimizer step wrote until then
    (megatron-core 0.16.1 and 0.19.2, distributed/distributed_data_parallel.py, `start_param_sync`). Does nothing
    without it.
    """
    for chunk in chunks_of(model):
        for layer in _layers(chunk):
            if getattr(getattr(layer, "ddp_config", None), "overlap_param_gather", False):
                layer.start_param_sync(force_sync=True)
