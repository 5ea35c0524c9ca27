"""How writers encode the parts of a format, and back. Each entry of `ENCODINGS` is a pair of inverse functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bridge_core.geometry import Shape
from bridge_quant_export.codes import e2m1


class Encoding(NamedTuple):
    """A reversible change of representation; shapes are settled by the caller."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def _plain(part: Tensor) -> Tensor:
    return part


def _to_row_pairs(codes: Tensor) -> Tensor:
    nibbles = codes.view(torch.uint8) & 0xF
    return nibbles[0::2] | (nibbles[1::2] << 4)


def _from_row_pairs(packed: Tensor) -> Tensor:
    halves = torch.stack((packed & 0xF, packed >> 4), dim=1).flatten(0, 1)
    return (halves.view(torch.int8) ^ 8) - 8


def _to_words_of_4(codes: Tensor) -> Tensor:
    return e2m1.pair((codes + 8).view(torch.uint8)).view(torch.int32)


def _from_words_of_4(words: Tensor) -> Tensor:
    return e2m1.unpair(words.contiguous().view(torch.uint8)).view(torch.int8) - 8


def _flip_sign_bit(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8) ^ 0x80


def _to_words_of_8(codes: Tensor) -> Tensor:
    return _flip_sign_bit(codes).contiguous().view(torch.int32)


def _from_words_of_8(words: Tensor) -> Tensor:
    return _flip_sign_bit(words.contiguous().view(torch.uint8)).view(torch.int8)


ENCODINGS: dict[str, Encoding] = {
    "plain": Encoding(_plain, _plain),
    # compressed-tensors multiplies where ModelOpt divides.
    "reciprocal": Encoding(torch.reciprocal, torch.reciprocal),
    # Two's complement; row 2r in the low half of a byte, row 2r + 1 in the high half (ModelOpt 0.47,
    # export/quant_utils.py, pack_int4_in_uint8).
    "row pairs": Encoding(_to_row_pairs, _from_row_pairs),
    # Unsigned with an offset, along a row, the first in the lowest bits (compressed-tensors 0.20,
    # compressors/pack_quantized/helpers.py, pack_to_int32).
    "words of 4": Encoding(_to_words_of_4, _from_words_of_4),
    "words of 8": Encoding(_to_words_of_8, _from_words_of_8),
}


def whole_shape(whole: Shape) -> Tensor:
    """The part that compressed-tensors calls `weight_shape`: int64 `[2]`, rows and columns of the whole weight."""
    return torch.tensor(whole, dtype=torch.int64)
