"""Bytes of files into tensors, without maps: what is read is what is held."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bridge_core.checkpoint.safetensors import Stored
from bridge_core.errors import CheckpointError
from bridge_core.runtime.tensors import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


def read_into(descriptor: int, tensor: Tensor, offset: int, where: str | Path) -> None:
    """Fill a contiguous tensor from byte `offset` of a file on.

    Raises:
        CheckpointError: the file ends before.
    """
    data = tensor.view(-1).view(torch.uint8).numpy().data
    at = 0
    while at < len(data):
        count = os.preadv(descriptor, [data[at:]], offset + at)
        if count == 0:
            raise CheckpointError("a file has become shorter", where=where, expected=f"{offset + len(data)} bytes")
        at += count


def read_stored(descriptor: int, stored: Stored) -> Tensor:
    """A tensor of a safetensors file.

    Raises:
        CheckpointError: the file ends before it does.
    """
    tensor = torch.empty(stored.shape, dtype=torch_dtype(stored.dtype))
    read_into(descriptor, tensor, stored.offset, stored.path)
    return tensor
