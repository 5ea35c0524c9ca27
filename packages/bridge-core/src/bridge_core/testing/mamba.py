"""Real Mamba layers of megatron-core where mamba-ssm is not installed: built, loaded and checkpointed, not run.

megatron-core 0.19.2 asks for mamba-ssm and einops when a `MambaMixer` is made, but uses them in its forward alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from bridge_core.extras import require


@contextmanager
def mamba_layers() -> Iterator[None]:
    """Let `MambaMixer` be made without mamba-ssm while this is active; on exit megatron-core is as it was.

    The only part of the mixer that mamba-ssm brings is the class of its gated norm. The one here has the same
    parameter and, as mcore's `ExtendedRMSNorm` (ssm/mamba_mixer.py), a `sharded_state_dict` cut along dim 0; it
    computes nothing. Does nothing where mamba-ssm is installed.
    """
    require("megatron.core", extra="mcore")
    from megatron.core.ssm import mamba_context_parallel, mamba_mixer

    if mamba_mixer.HAVE_MAMBA_SSM:
        yield
        return
    replaced = (
        (mamba_mixer, {"HAVE_MAMBA_SSM": True, "HAVE_EINOPS": True, "ExtendedRMSNorm": _gated_norm()}),
        (mamba_context_parallel, {"HAVE_EINOPS": True}),
    )
    with ExitStack() as undo:
        for module, attributes in replaced:
            for name, value in attributes.items():
                undo.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, value)
        yield


def _gated_norm() -> type:
    import torch
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    class GatedNorm(torch.nn.Module):
        """The weight of a gated RMSNorm, [d_inner / tp], with what a checkpoint asks of it."""

        tp_group: Any  # the mixer sets it

        def __init__(self, size: int, *, eps: float, device: Any = None, dtype: Any = None, **options: Any) -> None:
            super().__init__()
            self.eps = eps
            self.weight = torch.nn.Parameter(torch.ones(size, device=device, dtype=dtype))

        def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
            """As every module of megatron-core has it."""
            state = self.state_dict(prefix="", keep_vars=True)
            groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
            return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets, **groups)

    return GatedNorm
