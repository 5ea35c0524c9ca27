"""Jobs for the pool: how much memory exports take beside the model."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

from bridge_core.testing.memory import Peak

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h


def peaks_of_exports(config: dict[str, Any], out: str, depths: list[int], bucket_bytes: int) -> list[dict[str, int]]:
    """The language model on rank 0, the tower on rank 1, at some depths of the former.

    Returns:
        For each depth bytes of this rank's parameters, and what a folder, and a stream, took beside them.
    """
    import torch.distributed as dist

    from bridge_core.runtime.host import host_backend
    from bridge_mimo import MegatronMIMOBridge

    found = []
    with host_backend():
        for depth in [depths[0], *depths]:  # the first pays for what is loaded once
            text = config["text_config"] | {"num_hidden_layers": depth}
            bridge = MegatronMIMOBridge.from_hf_config(config | {"text_config": text})
            model = bridge.to_megatron_model(spec="host")
            held = sum(parameter.nbytes for parameter in model.parameters())

            def save(bridge=bridge, model=model, depth=depth) -> None:
                bridge.save_hf_pretrained(model, f"{out}/{depth}", overwrite=True)

            def stream(bridge=bridge, model=model) -> None:
                for _, tensor in bridge.export_hf_weights(model, bucket_bytes=bucket_bytes):
                    assert tensor.numel()

            # gloo's threads let go of a sum's buffers when they get to it: on a busy machine late, not in every pass.
            found.append({"held": held, "save": _peak(save), "stream": min(_peak(stream) for _ in range(3))})
            model.destroy()
            del model, save, stream
            dist.barrier()
    return found[1:]


def _peak(step: Callable[[], None]) -> int:
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 20)  # large tensors come from the system, and go back at once
    libc.malloc_trim(0)  # what is used again of freed memory counts as well
    with Peak() as peak:
        step()
    return peak.nbytes
