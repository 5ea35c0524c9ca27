"""CPU host backend: real megatron-core models, built, trained and checkpointed without a GPU.

    from bridge_core.runtime.host import cpu_friendly, host_backend, host_block_spec

    with host_backend():                                   # mcore's CUDA-only spots, redirected until exit
        config = TransformerConfig(**kwargs | cpu_friendly(kwargs))
        model = GPTModel(config, host_block_spec(config), ..., pg_collection=groups)
        logits = model(tokens, positions, None)

The parameters have Transformer Engine's names and shapes (`linear_qkv.layer_norm_weight`,
`experts.linear_fc1.weight0`), and `sharded_state_dict` has its keys, so that a checkpoint written on a
laptop is one that a production model loads. Speed is no aim.

Not here: context parallelism (mcore has it with Transformer Engine only), FP8, Mamba.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge_core.runtime.host.cuda_free import cpu_friendly as cpu_friendly
    from bridge_core.runtime.host.cuda_free import host_backend as host_backend
    from bridge_core.runtime.host.specs import host_block_spec as host_block_spec
    from bridge_core.runtime.host.specs import host_layer_spec as host_layer_spec
    from bridge_core.runtime.host.specs import host_mtp_block_spec as host_mtp_block_spec

_HOME = {
    "cpu_friendly": "cuda_free",
    "host_backend": "cuda_free",
    "host_block_spec": "specs",
    "host_layer_spec": "specs",
    "host_mtp_block_spec": "specs",
}
__all__ = ["cpu_friendly", "host_backend", "host_block_spec", "host_layer_spec", "host_mtp_block_spec"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
