"""Megatron's layer pattern of hybrid models (`hybrid_layer_pattern`), and the pipeline that it may spell out.

One letter per decoder layer; `|` ends a pipeline chunk, as in the layout string; `/` begins the layers of one
depth of multi-token prediction, which are the same at every depth: `M*E-|ME/*E` is six layers in two chunks,
and one depth of two layers.

Grammar: megatron-core 0.19.2, `models/hybrid/hybrid_layer_allocation.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from bridge_core.errors import LayoutError
from bridge_core.topology.layout import ParallelLayout
from bridge_core.topology.layout_string import DECODER, EMBEDDING, LOSS, MTP
from bridge_core.topology.pipeline import PipelinePlacement

OPTION = "hybrid_layer_pattern"
MAMBA, ATTENTION, MLP, MOE = "M", "*", "-", "E"
_LETTERS = frozenset((MAMBA, ATTENTION, MLP, MOE, "G", "D", "+"))  # gated delta net, sparse and latent attention


class HybridPattern(NamedTuple):
    """A pattern taken apart.

    Attributes:
        chunks: letters of the decoder layers, by pipeline chunk; a single one where the pattern names none.
        mtp: letters of one depth of prediction layers; empty without any.
        depths: how many such depths there are.
    """

    chunks: tuple[str, ...]
    mtp: str
    depths: int

    @property
    def decoder(self) -> str:
        """Letters of all decoder layers."""
        return "".join(self.chunks)

    def __str__(self) -> str:
        return "|".join(self.chunks) + f"/{self.mtp}" * self.depths


def parse_hybrid_pattern(text: str) -> HybridPattern:
    """Take a pattern apart.

    Raises:
        LayoutError: a letter is unknown, there is no decoder layer, or depths differ.
    """
    decoder, *depths = text.split("/")
    chunks = tuple(decoder.split("|"))
    letters = "".join((*chunks, *depths))
    if unknown := sorted(set(letters) - _LETTERS):
        raise _refused(
            f"a hybrid pattern holds {', '.join(map(repr, unknown))}", f"letters of {sorted(_LETTERS)}", text
        )
    if not any(chunks):
        raise _refused("a hybrid pattern has no decoder layers", "at least one letter before any '/'", text)
    if len(set(depths)) > 1 or not all(depths):
        raise _refused("the depths of prediction layers differ", "the same letters after every '/'", text)
    return HybridPattern(chunks, depths[0] if depths else "", len(depths))


def pipeline_of(pattern: HybridPattern) -> str | None:
    """The chunks of a pattern as a layout string, prediction layers on the last; None where it names no chunks."""
    if len(pattern.chunks) == 1:
        return None
    ends = [DECODER * len(chunk) for chunk in pattern.chunks]
    return EMBEDDING + "|".join(ends) + MTP * pattern.depths + LOSS


def with_pipeline(layout: ParallelLayout, pattern: HybridPattern) -> ParallelLayout:
    """The layout with the pipeline that a pattern names, if it names one; one stage holds all chunks anyway.

    Raises:
        LayoutError: the layout says otherwise, or its sizes do not fit the number of chunks.
    """
    text = pipeline_of(pattern)
    if text is None or layout.pp == 1:
        return layout
    if layout.pipeline_model_parallel_layout not in (None, text):
        raise LayoutError(
            "the hybrid pattern and the pipeline layout name different chunks",
            where=f"{OPTION}={pattern}",
            expected=text,
            got=layout.pipeline_model_parallel_layout,
            fix="leave one of them out",
        )
    return replace(layout, pipeline_model_parallel_layout=text)


def with_chunks(pattern: HybridPattern, placement: PipelinePlacement) -> HybridPattern:
    """The pattern with the chunks of a placement."""
    letters = pattern.decoder
    return pattern._replace(
        chunks=tuple("".join(letters[layer] for layer in stage.decoder_layers) for stage in placement.stages)
    )


def _refused(what: str, expected: str, text: str) -> LayoutError:
    return LayoutError(what, where=f"{OPTION}={text!r}", expected=expected, got=repr(text))
