"""Between torch tensors and the bytes of files: dtypes, flat views, strided views, reading."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bridge_core.checkpoint.reading import Reader
from bridge_core.checkpoint.transfer import Job, gather
from bridge_core.dtypes import dtype_of, numpy_dtype
from bridge_core.errors import CheckpointError
from bridge_core.geometry import Shape, View

if TYPE_CHECKING:
    from threading import Event

    import numpy as np
    from torch import Tensor


def dtype_name(tensor: Tensor) -> str:
    """The safetensors name of a tensor's dtype."""
    return dtype_of(str(tensor.dtype)).name


def torch_dtype(name: str) -> Any:
    """The torch dtype of a safetensors name."""
    import torch

    return getattr(torch, dtype_of(name).torch)


def cast(tensor: Tensor, dtype: str, *, where: str | None = None) -> Tensor:
    """A tensor in another dtype, given by its safetensors name.

    Args:
        where: what the error says of the tensor: its name.

    Raises:
        CheckpointError: a finite value is beyond the range of that dtype; it would become infinite in silence.
    """
    import torch

    wanted = torch_dtype(dtype)
    if tensor.dtype == wanted:
        return tensor
    made = tensor.to(wanted)
    narrower = tensor.is_floating_point() and torch.finfo(wanted).max < torch.finfo(tensor.dtype).max
    if narrower and made.numel() and not made.isfinite().all() and (lost := ~made.isfinite() & tensor.isfinite()).any():
        raise CheckpointError(
            f"values do not fit into {wanted}",
            where=where,
            expected=f"absolute values of at most {torch.finfo(wanted).max:.6g}",
            got=f"{int(lost.sum())} larger one(s), such as {float(tensor[lost].flatten()[0])}",
            fix="keep the dtype that the tensors have, or choose a wider one",
        )
    return made


def flat(tensor: Tensor) -> Tensor:
    """All elements of a contiguous parameter, in order, sharing its memory and outside of autograd."""
    return tensor.detach().view(-1)


def window(flat_tensor: Tensor, shape: Shape, view: View) -> Tensor:
    """The strided view of a piece on a flat tensor."""
    return flat_tensor.as_strided(shape, view.strides, flat_tensor.storage_offset() + view.offset)


def from_numpy(array: np.ndarray, dtype: str) -> Tensor:
    """A tensor that shares the memory of a flat array, also of dtypes that numpy itself does not know."""
    import numpy as np
    import torch

    return torch.from_numpy(array.view(np.uint8)).view(torch_dtype(dtype))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A flat array that shares the memory of a flat tensor on the CPU, also of dtypes that torch cannot hand over."""
    import torch

    return tensor.view(torch.uint8).numpy().view(numpy_dtype(dtype_name(tensor)))


def read_into(target: Tensor, job: Job, reader: Reader, stop: Event | None = None) -> None:
    """Fill a flat tensor with the target of a job, of the same dtype.

    On the CPU the bytes are read to where they belong, elsewhere block by block through the memory of the reader.

    Args:
        stop: ends the work after the block in hand, once it is set.
    """
    on_cpu = target.device.type == "cpu"
    for first, block in gather(job, reader, into=to_numpy(target) if on_cpu else None):
        if not on_cpu:
            target[first : first + block.size].copy_(from_numpy(block, job.target.dtype))
        if stop is not None and stop.is_set():
            return


def host_memory(device: Any) -> Callable[[int], np.ndarray]:
    """What makes memory that a device copies from: pinned for a GPU, so that its copy engine reads it directly."""
    import torch

    pinned = torch.device(device).type == "cuda"

    def allocate(nbytes: int) -> np.ndarray:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned).numpy()

    return allocate


def default_device() -> Any:
    """Where this rank's parameters would be: its GPU if it has one, else the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def staging(nbytes: int, device: Any) -> Tensor:
    """Bytes to receive in, uninitialised.

    Made before the ranks of a group wait for one another, in a step that they agree on: a rank that finds no memory in
    between could not tell the others.
    """
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, device=device)
