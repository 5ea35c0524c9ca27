"""What every codec says: which tensors store a weight, and which regions of them a region of it is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from bridge_core.geometry import Box, Shape

if TYPE_CHECKING:
    import numpy as np


class Header(NamedTuple):
    """A tensor of a checkpoint, as its header has it: its dtype by safetensors' name."""

    dtype: str
    shape: Shape


class Found(NamedTuple):
    """What a codec makes of the tensors of a checkpoint.

    Attributes:
        weights: shape of every quantised weight, by the name that it is read under.
        beside: tensors that belong to no weight and are not read, each with the reason.
    """

    weights: dict[str, Shape]
    beside: dict[str, str]


class Codec(Protocol):
    """A form in which matrices are stored. Made for one checkpoint, from its config.json.

    Attributes:
        presented: dtype in which weights are read, by its safetensors name.
        files: files beside config.json that say how the weights are quantised; they are not carried along.
        names_weights: whether config.json says which weights are quantised (`chosen`); else their dtypes do.
    """

    @property
    def presented(self) -> str: ...

    @property
    def files(self) -> frozenset[str]: ...

    @property
    def names_weights(self) -> bool: ...

    def chosen(self, weights: Mapping[str, Shape]) -> frozenset[str]:
        """Those of a model's weights that are quantised, as config.json says."""
        ...

    def find(self, stored: Mapping[str, Header], *, where: object) -> Found:
        """The quantised weights of a checkpoint, from the headers of its files.

        Raises:
            CheckpointError: a weight lacks a part, or a part its weight, or they do not fit one another.
        """
        ...

    def parts(self, weight: str, shape: Shape) -> dict[str, Header]:
        """The tensors that store a weight [R, C], by name; the codes come first."""
        ...

    def regions(self, weight: str, shape: Shape, box: Box) -> tuple[Box, ...]:
        """The region of each part that a region of a weight is made from."""
        ...

    def decode(self, weight: str, shape: Shape, box: Box, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """A region of a weight in the presented dtype, from the `regions` of its parts. Called from several threads."""
        ...


class Codecs(Protocol):
    """What a package offers under an entry point: the codec of a checkpoint, from the content of its config.json.

    Attributes:
        files: names of files beside config.json that say how weights are quantised.
    """

    @property
    def files(self) -> frozenset[str]: ...

    def __call__(self, config: Mapping[str, Any], *, where: object) -> Codec:
        """The codec of the checkpoint.

        Raises:
            BridgeError: its weights are quantised in a way that is not known.
        """
        ...

    def completed(
        self, said: Mapping[str, Any] | None, beside: Mapping[str, Any], *, where: object
    ) -> Mapping[str, Any] | None:
        """`quantization_config` as config.json has it, or would have, by what a file beside it says.

        Raises:
            BridgeError: they contradict each other.
        """
        ...
