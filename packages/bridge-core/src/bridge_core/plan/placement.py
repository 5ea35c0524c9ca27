"""Where on a layout a tensor lies that is not simply a decoder layer's, and whether a layout fits a model at all."""

from __future__ import annotations

from bridge_core.errors import LayoutError
from bridge_core.families import Fields
from bridge_core.topology import ParallelLayout, PipelinePlacement, PipelineStage, expert_range, place_layers
from bridge_core.topology.hybrid_pattern import parse_hybrid_pattern, with_pipeline

DECODER_LAYERS = "decoder.layers"
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
HYBRID_FINAL_NORM = "decoder.final_norm.weight"
FINAL_NORMS = ("decoder.final_layernorm.weight", HYBRID_FINAL_NORM)  # GPTModel's, HybridModel's


def holds(name: str, stage: PipelineStage, *, tied: bool) -> bool:
    """Whether a pipeline stage holds a tensor that belongs to no decoder layer.

    A vision tower is with the embedding, on the first stage; MTP layers are all on one stage.
    """
    if name.startswith("mtp."):
        return bool(stage.mtp_layers)
    if name.startswith("vision_model."):
        return stage.pre_process
    if name == EMBEDDING:
        return stage.has_embedding or (tied and stage.has_output_layer)
    if name in FINAL_NORMS:
        return stage.has_final_norm
    if name == OUTPUT:
        return stage.has_output_layer
    raise LayoutError(
        "a tensor without a decoder layer has no pipeline stage",
        where=name,
        expected="an embedding, a final norm, an output layer, or a tensor of `mtp.` or `vision_model.`",
        fix="teach plan.holds where megatron-core puts it",
    )


def layout_of_model(fields: Fields, layout: ParallelLayout) -> ParallelLayout:
    """The layout, with the pipeline that a hybrid model's pattern may name in its place."""
    text = fields.get("hybrid_layer_pattern")
    return with_pipeline(layout, parse_hybrid_pattern(text)) if text else layout


def place(fields: Fields, layout: ParallelLayout, *, mtp: bool) -> PipelinePlacement:
    """`place_layers` of a model; without its prediction layers where a plan leaves them out."""
    return place_layers(
        layout,
        num_layers=fields["num_layers"],
        mtp_num_layers=fields.get("mtp_num_layers") if mtp else None,
        hybrid=bool(fields.get("hybrid_layer_pattern")),
    )


def part_of(name: str) -> str:
    """The part of a model that a tensor belongs to, for tables that people read."""
    if "{expert}" in name:
        return "experts"
    if name.startswith("vision_model."):
        return "vision"
    for mark, part in _PARTS.items():
        if mark in name:
            return part
    return "norms" if "norm" in name else "mlp"


_PARTS = {
    "embed": "embedding",
    "merger": "merger",
    "output_layer": "output",
    "self_attention": "attention",
    "router": "router",
    "mixer": "mixer",
}


def check_layout(fields: Fields, layout: ParallelLayout) -> None:
    """Raise unless attention heads and experts divide over the layout.

    The rules are those of megatron-core 0.19 (transformer/transformer_config.py `__post_init__`,
    transformer/attention.py): heads are a multiple of tp; query groups divide tp or are a multiple of it.
    """
    _check_heads("num_attention_heads", fields["num_attention_heads"], "tp", layout.tp)
    for name in ("mamba_num_heads", "mamba_num_groups"):
        if fields.get(name):
            _check_heads(name, fields[name], "tp", layout.tp)
    for name in ("linear_num_key_heads", "linear_num_value_heads"):
        if fields.get(name):  # context parallelism divides the heads of gated delta nets as well
            _check_heads(name, fields[name], "tp*cp", layout.tp * layout.cp)
    groups, tp = fields["num_query_groups"], layout.tp
    if groups % tp and tp % groups:
        raise LayoutError(
            "query groups do not divide over the tensor-parallel ranks",
            where="num_query_groups",
            expected=f"a multiple or a divisor of tp={tp}",
            got=f"{groups} groups",
            fix=f"choose a tp that divides {groups}, or a multiple of it",
        )
    experts = fields.get("num_moe_experts")
    if layout.ep > 1 and not experts:
        raise LayoutError(
            "the model has no experts to spread",
            where="ep",
            expected="ep=1",
            got=f"ep={layout.ep}",
            fix="leave out ep",
        )
    if experts:
        expert_range(experts, ep=layout.ep, ep_rank=0)


def _check_heads(name: str, heads: int, sizes: str, ranks: int) -> None:
    if heads % ranks:
        raise LayoutError(
            "attention heads do not divide over the tensor-parallel ranks",
            where=name,
            expected=f"a multiple of {sizes}={ranks}",
            got=f"{heads} heads",
            fix=f"choose a {sizes} that divides {heads}",
        )
