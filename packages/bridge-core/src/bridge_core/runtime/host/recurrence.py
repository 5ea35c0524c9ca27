"""What gated delta nets take from CUDA kernels, in plain PyTorch.

megatron-core 0.19 (ssm/gated_delta_net/common.py) imports three functions of flash-linear-attention. For the
recurrence itself it has a PyTorch version of its own, `torch_chunk_gated_delta_rule`; the other two are here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

from bridge_core.errors import ConfigError

_ACTIVATIONS = {None: lambda x: x, "silu": F.silu, "swish": F.silu}


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """A convolution of every channel with the positions up to its own; `fla.modules.convolution.causal_conv1d`.

    Args:
        x: [batch, positions, channels].
        weight: [channels, width]; the last column is that of the position itself.
        bias: [channels].
        activation: `"silu"`, its other name `"swish"`, or None.
        cu_seqlens: not supported; nor is it by the recurrence that follows.
        unused: what the kernel takes for inference.

    Returns:
        The convolved [batch, positions, channels] in the dtype of `x`, and None in the place of a final state.

    Raises:
        ConfigError: several sequences in one row (`cu_seqlens`).
    """
    if cu_seqlens is not None:
        raise ConfigError(
            "packed sequences do not run through gated delta nets on a CPU",
            where="cu_seqlens",
            expected="None: one sequence per row",
            got=f"{len(cu_seqlens) - 1} sequences",
            fix="give every sequence a row of its own",
        )
    channels, width = weight.shape
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    convolved = F.conv1d(padded, weight[:, None], bias, groups=channels)
    return _ACTIVATIONS[activation](convolved).transpose(1, 2), None


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`x` [..., D] divided by its length over the last dim; `fla.modules.l2norm.l2norm`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
