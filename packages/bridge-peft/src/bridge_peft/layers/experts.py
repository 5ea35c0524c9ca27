"""One matrix per expert, applied to that expert's run of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bridge_core.errors import LayoutError

if TYPE_CHECKING:
    from torch import Tensor

Splits = Sequence[int] | None


def splits_of(m_splits: object, tokens: int, *, where: str) -> list[int]:
    """Tokens of each expert as plain numbers.

    Args:
        m_splits: what the layer was called with: a list, or a tensor of whole numbers.
        tokens: rows of the layer's input. Rows behind the last expert's are padding.
        where: name of the layer.

    Raises:
        LayoutError: the experts have more tokens than there are.
    """
    splits = [int(count) for count in (m_splits.tolist() if hasattr(m_splits, "tolist") else m_splits)]  # type: ignore[attr-defined, union-attr]
    if sum(splits) > tokens:
        raise LayoutError(
            "experts have more tokens than there are",
            where=where,
            expected=f"at most {tokens}",
            got=f"{sum(splits)} = sum of {splits}",
            fix="pass the layer the splits that its input was ordered by",
        )
    return splits


def by_expert(x: Tensor, weight: Tensor, splits: Splits) -> Tensor:
    """x times the transpose of each token's matrix.

    Args:
        x: [..., in]; [T, in] ordered by expert if the experts differ.
        weight: [out, in] for all tokens, or [E, out, in].
        splits: tokens of each of the E experts, padding included; the rows behind them give zeros.

    Returns:
        [..., out].
    """
    import torch
    from torch.nn import functional as F  # noqa: N812 - its usual name

    if weight.dim() == 2:
        return F.linear(x, weight)
    assert splits is not None
    aligned = not (x.shape[-1] * 2 % 16 or weight.shape[1] * 2 % 16)
    if weight.is_cuda and weight.dtype is torch.bfloat16 and aligned and hasattr(torch, "_grouped_mm"):
        return grouped_mm(x, weight, splits)
    # An expert without tokens takes part with an empty run, so that its factors get a (zero) gradient.
    rest = x.shape[0] - sum(splits)
    runs = x.split([*splits, rest])
    outputs = [F.linear(run, matrix) for run, matrix in zip(runs, weight, strict=False)]
    if rest:
        outputs.append(x.new_zeros(rest, weight.shape[1]))
    return torch.cat(outputs)


def grouped_mm(x: Tensor, weight: Tensor, splits: Sequence[int]) -> Tensor:
    """`by_expert` in one kernel: bfloat16, strides of multiples of 16 bytes (torch 2.13, `torch._grouped_mm`)."""
    import torch

    used = sum(splits)
    ends = torch.tensor(splits, device=x.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    output = torch._grouped_mm(x[:used], weight.transpose(-2, -1), offs=ends)
    return output if used == x.shape[0] else torch.cat([output, output.new_zeros(x.shape[0] - used, weight.shape[1])])


def rows_by_expert(values: Tensor, splits: Splits, tokens: int, fill: float) -> Tensor:
    """One row of values per token: [out] as it is, [E, out] -> [tokens, out], rows of padding all `fill`."""
    import torch

    if values.dim() == 1:
        return values
    assert splits is not None
    rows = values.repeat_interleave(torch.tensor(splits, device=values.device), dim=0)
    rest = tokens - rows.shape[0]
    return torch.cat([rows, values.new_full((rest, values.shape[1]), fill)]) if rest else rows
