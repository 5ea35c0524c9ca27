"""Which layers, and which ends of the model, each pipeline stage holds."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from bridge_core.errors import LayoutError
from bridge_core.topology.layout import ParallelLayout
from bridge_core.topology.layout_string import DECODER, MTP, OPTION, parse_layout_string


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStage:
    """One model chunk: what pipeline rank `pp_rank` builds for virtual stage `vp_stage`.

    Layer numbers are global and start at 0 (Megatron's `layer_number` starts at 1). A layer's index in
    `decoder_layers` is its index in the chunk's `decoder.layers`; for MTP layers likewise.
    """

    pp_rank: int
    vp_stage: int
    layer_offset: int
    """Decoder layers before this chunk; also defined for a chunk without layers."""
    decoder_layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    pre_process: bool
    """The chunk takes token ids: Megatron's `pre_process`."""
    post_process: bool
    """The chunk ends in the output layer: Megatron's `post_process`."""
    has_embedding: bool
    """True for the first chunk, and for one with MTP layers, which hold a copy of the word embedding."""
    has_final_norm: bool
    """With MTP the final norm sits after the last decoder layer, which need not be the last chunk."""

    @property
    def has_output_layer(self) -> bool:
        """The chunk holds the output layer (without a weight of its own if that is tied and in one chunk)."""
        return self.post_process


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePlacement:
    """Every chunk of a model, in the order in which a token passes them."""

    pp: int
    vpp: int
    num_layers: int
    mtp_num_layers: int | None
    stages: tuple[PipelineStage, ...]

    def stage(self, pp_rank: int, vp_stage: int = 0) -> PipelineStage:
        """The chunk of `pp_rank` in virtual stage `vp_stage`.

        Raises:
            LayoutError: there is no such stage.
        """
        if not (0 <= pp_rank < self.pp and 0 <= vp_stage < self.vpp):
            raise LayoutError(
                f"there is no pipeline stage (pp_rank={pp_rank}, vp_stage={vp_stage})",
                expected=f"0 <= pp_rank < {self.pp}, 0 <= vp_stage < {self.vpp}",
                got=f"({pp_rank}, {vp_stage})",
            )
        return self.stages[vp_stage * self.pp + pp_rank]

    def stages_of(self, pp_rank: int) -> tuple[PipelineStage, ...]:
        """All chunks of one pipeline rank, by virtual stage: Megatron's list of model chunks."""
        return tuple(self.stage(pp_rank, vp_stage) for vp_stage in range(self.vpp))

    def stage_of_layer(self, layer: int) -> PipelineStage:
        """The chunk that holds decoder layer `layer`.

        Raises:
            LayoutError: there is no such layer.
        """
        if not 0 <= layer < self.num_layers:
            raise LayoutError(
                f"there is no decoder layer {layer}", expected=f"0 <= layer < {self.num_layers}", got=layer
            )
        # Chunks without layers share their offset with the next one that has some: the last match is right.
        return self.stages[bisect_right(self.stages, layer, key=lambda stage: stage.layer_offset) - 1]


def place_layers(
    layout: ParallelLayout, *, num_layers: int, mtp_num_layers: int | None = None, hybrid: bool = False
) -> PipelinePlacement:
    """Place the decoder layers, the MTP layers and both ends of a model on pipeline stages.

    Chunks are filled in the order in which a token passes them, so a chunk's first layer is the sum of
    all chunks before it. These are the numbers of megatron-core 0.16.1 and 0.19.2:
    `transformer_block.get_num_layers_to_build`, `transformer_layer.get_transformer_layer_offset`,
    `multi_token_prediction.get_mtp_num_layers_to_build`, `TransformerBlock.has_final_layernorm_in_this_stage`.
    Stricter: every layer has to be placed exactly once. Megatron takes a first and a last stage that
    together have more layers than the model and then builds some layers twice.

    Args:
        layout: the parallel layout.
        num_layers: decoder layers of the whole model.
        mtp_num_layers: as in `TransformerConfig`. None and 0 differ, as there: with 0 the final norm
            follows the last decoder layer. All MTP layers go to one chunk, the last unless the layout
            string says otherwise.
        hybrid: a `HybridModel` instead of a `GPTModel`: its final norm is on the last chunk, even if no layer
            is (0.19.2, models/hybrid/hybrid_block.py, `HybridStack`; its chunks are those of
            `hybrid_layer_allocation.select_pipeline_segment`, as `hybrid_pattern.with_pipeline` reads them).

    Raises:
        LayoutError: the layers do not divide as the layout asks; the message has all numbers.
    """
    if num_layers < 1 or (mtp_num_layers is not None and mtp_num_layers < 0):
        raise LayoutError(
            "the number of layers is out of range",
            expected="num_layers >= 1, and mtp_num_layers >= 0 or None",
            got=f"num_layers={num_layers}, mtp_num_layers={mtp_num_layers}",
        )
    if layout.pipeline_model_parallel_layout is not None:
        counts, mtp_chunk = _from_string(layout.pipeline_model_parallel_layout, num_layers, mtp_num_layers)
    else:
        ends = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
        counts = _even(layout, num_layers) if ends == (None, None) else _uneven(layout, num_layers)
        mtp_chunk = len(counts) - 1
    offsets = accumulate(counts[:-1], initial=0)
    last_layer_chunk = max(chunk for chunk, count in enumerate(counts) if count)
    final_norm_chunk = len(counts) - 1 if mtp_num_layers is None or hybrid else last_layer_chunk
    stages = tuple(
        PipelineStage(
            pp_rank=chunk % layout.pp,
            vp_stage=chunk // layout.pp,
            layer_offset=offset,
            decoder_layers=tuple(range(offset, offset + count)),
            mtp_layers=tuple(range(mtp_num_layers or 0)) if chunk == mtp_chunk else (),
            pre_process=chunk == 0,
            post_process=chunk == len(counts) - 1,
            has_embedding=chunk == 0 or (chunk == mtp_chunk and bool(mtp_num_layers)),
            has_final_norm=chunk == final_norm_chunk,
        )
        for chunk, (offset, count) in enumerate(zip(offsets, counts, strict=True))
    )
    return PipelinePlacement(
        pp=layout.pp, vpp=layout.vpp, num_layers=num_layers, mtp_num_layers=mtp_num_layers, stages=stages
    )


def _from_string(text: str, num_layers: int, mtp_num_layers: int | None) -> tuple[list[int], int]:
    """Decoder layers of each chunk, and the chunk of the MTP layers."""
    chunks = parse_layout_string(text)
    counts = [chunk.count(DECODER) for chunk in chunks]
    mtp_chunk = next((number for number, chunk in enumerate(chunks) if MTP in chunk), len(chunks) - 1)
    found = sum(counts), chunks[mtp_chunk].count(MTP)
    if found != (num_layers, mtp_num_layers or 0):
        raise LayoutError(
            "the pipeline layout does not name the layers that the model has",
            where=f"{OPTION}={text!r}",
            expected=f"{num_layers} x 't' and {mtp_num_layers or 0} x 'm' (num_layers={num_layers}, "
            f"mtp_num_layers={mtp_num_layers})",
            got=f"{found[0]} x 't' and {found[1]} x 'm'",
        )
    return counts, mtp_chunk


def _even(layout: ParallelLayout, num_layers: int) -> list[int]:
    """Equal chunks; the embedding and the output layer may each take the place of one layer."""
    embedding = int(layout.account_for_embedding_in_pipeline_split)
    loss = int(layout.account_for_loss_in_pipeline_split)
    slots, num_chunks = num_layers + embedding + loss, layout.pp * layout.vpp
    if slots % num_chunks:
        raise LayoutError(
            f"{num_layers} decoder layers do not divide over pp={layout.pp} x vpp={layout.vpp}",
            where=str(layout),
            expected=f"layers + embedding + loss to be a multiple of {num_chunks}",
            got=f"{num_layers} + {embedding} + {loss} = {slots}",
            fix="choose other sizes, or give num_layers_in_first_pipeline_stage, "
            f"num_layers_in_last_pipeline_stage or {OPTION}",
        )
    counts = [slots // num_chunks] * num_chunks
    counts[0] -= embedding
    counts[-1] -= loss
    return counts


def _uneven(layout: ParallelLayout, num_layers: int) -> list[int]:
    """The first or last rank (or both) by number, equal shares for the ranks between."""
    first, last = layout.num_layers_in_first_pipeline_stage, layout.num_layers_in_last_pipeline_stage
    middle_ranks = layout.pp - (first is not None) - (last is not None)
    middle_layers = num_layers - (first or 0) - (last or 0)
    share, rest = divmod(middle_layers, middle_ranks) if middle_ranks else (0, middle_layers)
    if rest or middle_layers < 0 or (middle_ranks and not share):
        raise LayoutError(
            f"{num_layers} decoder layers do not divide over {layout.pp} uneven pipeline stages",
            where=str(layout),
            expected=f"the layers between first and last to be a positive multiple of {middle_ranks} stages"
            if middle_ranks
            else "no layers to remain",
            got=f"{num_layers} - {first or 0} (first) - {last or 0} (last) = {middle_layers}",
        )
    per_rank = [share] * middle_ranks
    if first is not None:
        per_rank.insert(0, first)
    if last is not None:
        per_rank.append(last)
    if wrong := [(rank, count) for rank, count in enumerate(per_rank) if count % layout.vpp]:
        raise LayoutError(
            f"pipeline rank {wrong[0][0]} cannot divide its {wrong[0][1]} layers over vpp={layout.vpp}",
            where=str(layout),
            expected=f"a multiple of {layout.vpp} layers on every pipeline rank",
            got=f"layers per rank: {', '.join(map(str, per_rank))}",
        )
    return [count // layout.vpp for count in per_rank] * layout.vpp
