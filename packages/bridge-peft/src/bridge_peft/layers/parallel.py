"""The few collectives that adapters need, as mcore's differentiable functions with explicit groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


def sum_gradient(factor: Tensor, group: ProcessGroup) -> Tensor:
    """The factor as it is; its gradient is summed over `group`. Collective in the backward."""
    if group.size() == 1:
        return factor
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    return copy_to_tensor_model_parallel_region(factor, group=group)


def gather_input(hidden: Tensor, group: ProcessGroup, *, sequence_parallel: bool) -> Tensor:
    """What a column-parallel layer does to its input: all tokens on every rank. Collective.

    Args:
        hidden: [S / tp, B, r] under sequence parallelism, [S, B, r] otherwise.

    Returns:
        [S, B, r]; the gradient is summed over ranks, each of which holds other rows of B.
    """
    if group.size() == 1:
        return hidden
    from megatron.core.tensor_parallel import mappings

    if sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
    return mappings.copy_to_tensor_model_parallel_region(hidden, group=group)


def reduce_output(hidden: Tensor, group: ProcessGroup, *, sequence_parallel: bool) -> Tensor:
    """What a row-parallel layer does to its output: partial sums [S, B, r] added up. Collective.

    Returns:
        [S / tp, B, r] under sequence parallelism, [S, B, r] otherwise.
    """
    if group.size() == 1:
        return hidden
    from megatron.core.tensor_parallel import mappings

    if sequence_parallel:
        return mappings.reduce_scatter_to_sequence_parallel_region(hidden, group=group)
    return mappings.reduce_from_tensor_model_parallel_region(hidden, group=group)


def gather_features(output: Tensor, group: ProcessGroup) -> Tensor:
    """[..., out / tp] -> [..., out], for layers with `gather_output`. Collective."""
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    return gather_from_tensor_model_parallel_region(output, group=group)


def scatter_features(x: Tensor, group: ProcessGroup) -> Tensor:
    """[..., in] -> [..., in / tp], for layers without `input_is_parallel`. Collective in the backward."""
    from megatron.core.tensor_parallel.mappings import scatter_to_tensor_model_parallel_region

    return scatter_to_tensor_model_parallel_region(x, group=group)
