"""Where patches lie: from the grids of images and videos to positions, lengths and interpolation weights.

Patches come in the order in which the merger takes them: frame by frame, in a frame by blocks of
`merge` x `merge`, in a block by rows. That is the order of HF's image processors for these towers
(transformers 5.23, models/qwen2_vl/image_processing_qwen2_vl.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bridge_core.errors import ConfigError


class Patches(NamedTuple):
    """Where each patch of a packed batch lies."""

    coordinates: Tensor
    """[patches, 2] int64: row and column in its frame."""
    sizes: Tensor
    """[patches, 2] int64: rows and columns of its frame."""
    boundaries: Tensor
    """[frames + 1] int32: where frames begin and end. A patch attends to those of its own frame."""
    longest: int
    """Patches of the largest frame."""


def place_patches(grid_thw: Tensor, merge: int) -> Patches:
    """Place the patches of a packed batch.

    Args:
        grid_thw: [images, 3] integers: frames, rows and columns of patches; an image has one frame.
        merge: side of the block of patches that makes one embedding.

    Returns:
        Patches of all images, one after the other, on the device of `grid_thw`.

    Raises:
        ConfigError: a grid is not of this shape, or does not divide into blocks.
    """
    grids = _checked(grid_thw, merge)
    device = grid_thw.device
    coordinates, sizes, lengths = [], [], []
    for frames, rows, columns in grids:
        cells = torch.arange(rows * columns, device=device)
        blocks = cells.view(rows // merge, merge, columns // merge, merge).transpose(1, 2).flatten()
        coordinates.append(torch.stack((blocks // columns, blocks % columns), dim=1).repeat(frames, 1))
        sizes.append(torch.tensor((rows, columns), device=device).expand(frames * rows * columns, 2))
        lengths += [rows * columns] * frames
    ends = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    return Patches(torch.cat(coordinates), torch.cat(sizes), ends, max(lengths))


def _checked(grid_thw: Tensor, merge: int) -> list[list[int]]:
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or not len(grid_thw) or grid_thw.is_floating_point():
        raise ConfigError(
            "grids of images have another shape",
            where="grid_thw",
            expected="integers [images, 3]: frames, rows and columns of patches",
            got=f"{grid_thw.dtype} {tuple(grid_thw.shape)}",
        )
    grids: list[list[int]] = grid_thw.tolist()
    for number, (frames, rows, columns) in enumerate(grids):
        if frames < 1 or rows < 1 or columns < 1 or rows % merge or columns % merge:
            raise ConfigError(
                "an image's patches do not divide into blocks",
                where=f"grid_thw[{number}]",
                expected=f"at least one frame, and rows and columns that are multiples of {merge}",
                got=f"{frames} x {rows} x {columns}",
                fix="resize images as the model's own processor does",
            )
    return grids


def rotary_angles(coordinates: Tensor, head_dim: int, *, base: float = 10000.0) -> Tensor:
    """Angles of a rotary embedding over two axes: half of the frequencies turn with the row, half with the column.

    Args:
        coordinates: [patches, 2].
        head_dim: size of an attention head, a multiple of four.
        base: of the frequencies.

    Returns:
        [patches, 1, 1, head_dim] float32, as mcore's attention takes it as `rotary_pos_emb`.

    The formula is the one of transformers 5.23, models/qwen3_vl/modeling_qwen3_vl.py, `Qwen3VLVisionRotaryEmbedding`.
    """
    each = head_dim // 2  # an axis has half of the head, two elements per frequency
    exponents = torch.arange(0, each, 2, dtype=torch.float32, device=coordinates.device) / each
    angles = (coordinates[:, :, None].float() * (1.0 / base**exponents)).flatten(1)
    return torch.cat((angles, angles), dim=1)[:, None, None, :]


def interpolation(patches: Patches, side: int) -> tuple[Tensor, Tensor]:
    """How to stretch a square table of learnt positions over each frame: bilinear, corners on corners.

    Args:
        patches: from `place_patches`.
        side: rows and columns of the table.

    Returns:
        Rows of the flattened table [patches, 4] int64, and their weights [patches, 4] float32.

    Same as `torch.nn.functional.interpolate(mode="bilinear", align_corners=True)`.
    """
    at = patches.coordinates.float() * (side - 1) / (patches.sizes - 1).clamp(min=1)
    low = at.floor()
    share = at - low
    taps = torch.stack((low, (low + 1).clamp(max=side - 1)), dim=2).long()  # [patches, axis, tap]
    weights = torch.stack((1 - share, share), dim=2)
    rows = taps[:, 0, :, None] * side + taps[:, 1, None, :]
    return rows.flatten(1), (weights[:, 0, :, None] * weights[:, 1, None, :]).flatten(1)
