"""A Mamba-2 mixer in plain torch, from its definition: the state-space recurrence, one position after the other.

For every head, with a state of [P, N] (P features, N state dims) that starts at zero:

    state[t] = exp(dt[t] * A) * state[t-1] + dt[t] * outer(x[t], B[t])        A = -exp(A_log)
    y[t]     = state[t] @ C[t] + D * x[t]

x, B, C come from a causal depthwise convolution, dt is softplus(dt + dt_bias), B and C are shared by the heads of
a group, and the output is gated by silu(z) and then normalised group by group. Source: Dao and Gu, "Transformers
are SSMs" (2024), sections 2 and 7. Nothing here looks at how megatron-core or transformers compute it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu, softplus


def mixer(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    *,
    head_dim: int,
    state: int,
    eps: float = 1e-5,
) -> Tensor:
    """What the output projection is given, [S, heads * head_dim], of the heads and groups that the tensors are for.

    Args:
        projected: [S, rows]: z, x, B, C, dt.
        conv_weight, conv_bias: [channels, 1, width], [channels]: x, B, C.
        a_log, d, dt_bias: [heads].
        norm_weight: [heads * head_dim].
        head_dim: P.
        state: N.
        eps: of the norm.
    """
    heads = a_log.numel()
    inner = heads * head_dim
    groups = (conv_bias.numel() - inner) // (2 * state)
    z, channels, dt = projected.split([inner, inner + 2 * groups * state, heads], dim=-1)
    width = conv_weight.shape[-1]
    padded = torch.nn.functional.pad(channels.T, (width - 1, 0))
    channels = silu(conv1d(padded[None], conv_weight, conv_bias, groups=channels.shape[-1])[0].T)
    x, b, c = channels.split([inner, groups * state, groups * state], dim=-1)
    x = x.reshape(-1, heads, head_dim)
    b, c = (part.reshape(-1, groups, state).repeat_interleave(heads // groups, dim=1) for part in (b, c))
    step = softplus(dt + dt_bias)
    decay = torch.exp(step * -torch.exp(a_log))
    held = x.new_zeros(heads, head_dim, state)
    outputs = []
    for t in range(len(x)):
        held = decay[t, :, None, None] * held + step[t, :, None, None] * x[t, :, :, None] * b[t, :, None, :]
        outputs.append((held * c[t, :, None, :]).sum(-1) + d[:, None] * x[t])
    y = torch.stack(outputs).reshape(-1, inner) * silu(z)
    by_group = y.reshape(-1, groups, inner // groups)
    normal = by_group * torch.rsqrt(by_group.pow(2).mean(-1, keepdim=True) + eps)
    return normal.reshape(-1, inner) * norm_weight


def rms_norm(hidden: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """A plain RMSNorm over the last dim."""
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * weight
