"""CPU host backend: real megatron-core models, built, trained and checkpointed without a GPU.

    from bridge_core.runtime.host import cpu_friendly, host_backend, host_block_spec

    with host_backend():                                   # mcore's CUDA-only spots, redirected until exit
        config = TransformerConfig(**kwargs | cpu_friendly(kwargs))
        model = GPTModel(config, host_block_spec(config), ..., pg_collection=groups)
        logits = model(tokens, positions, None)

The parameters have Transformer Engine's names and shapes (`linear_qkv.layer_norm_weight`,
`experts.linear_fc1.weight0`), and `sharded_state_dict` has its keys, so that a checkpoint written on a
laptop is one that a production model loads. Speed is no aim.

Groups are arguments: building, running, training and checkpointing a `GPTModel` reads nothing of mcore's
global `parallel_state`, except that

- 0.19.2 asks for two weight-rematerialisation groups (`tensor_parallel/layers.py`) and gets None: not used;
- multi-token prediction and a pipeline layout string ask which pipeline stage this is, and need the global state
  initialised (not in a model that a `Provider` builds: it answers by the groups);
- so does the loss inside the model (`labels=...`) on 0.16.1 (`tensor_parallel/cross_entropy.py`); compute it
  from the logits. On 0.19.2 it works, with `parallel_output=True`.

On gloo the all-to-all dispatcher needs `expert_tensor_parallel_size=1`: expert-TP ranks gather runs of
unequal length, which gloo refuses. The default of `cpu_friendly`, all-gather, has no such limit.

A `HybridModel` takes `host_hybrid_stack_spec`; its Mamba layers need mamba-ssm, whose kernels need a GPU.
Gated delta nets (0.19) run in PyTorch: mcore's own recurrence, and a convolution in place of the CUDA kernel's.

Not here: context parallelism (mcore has it with Transformer Engine only), FP8, Mamba.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridge_core.extras import late

if TYPE_CHECKING:
    from bridge_core.runtime.host.cuda_free import cpu_friendly as cpu_friendly
    from bridge_core.runtime.host.cuda_free import host_backend as host_backend
    from bridge_core.runtime.host.specs import host_block_spec as host_block_spec
    from bridge_core.runtime.host.specs import host_hybrid_stack_spec as host_hybrid_stack_spec
    from bridge_core.runtime.host.specs import host_layer_spec as host_layer_spec
    from bridge_core.runtime.host.specs import host_mtp_block_spec as host_mtp_block_spec

_HOME = {
    "cpu_friendly": "cuda_free",
    "host_backend": "cuda_free",
    "host_block_spec": "specs",
    "host_hybrid_stack_spec": "specs",
    "host_layer_spec": "specs",
    "host_mtp_block_spec": "specs",
}
__all__ = [
    "cpu_friendly",
    "host_backend",
    "host_block_spec",
    "host_hybrid_stack_spec",
    "host_layer_spec",
    "host_mtp_block_spec",
]


__getattr__, __dir__ = late(__name__, _HOME)
