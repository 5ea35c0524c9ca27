"""Placement of layers equals what megatron-core computes for itself, and what it refuses is refused."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bridge_core.errors import LayoutError
from bridge_core.topology import ParallelLayout, PipelineStage, parse_layout_string, place_layers

parallel_state = pytest.importorskip("megatron.core.parallel_state")

# A refusal by mcore comes as one of these: asserts, config errors, a division by its number of middle ranks,
# and indexing into an empty layout.
REFUSALS = (AssertionError, ValueError, ZeroDivisionError, IndexError)


def mcore_config(*, num_layers: int, mtp_num_layers: int | None, pp: int, vpp: int, **options):
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=num_layers,
        mtp_num_layers=mtp_num_layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        **options,
    )


@contextmanager
def mcore_rank(config, pp_rank: int):
    """Megatron's global state, as it would be on this pipeline rank."""
    with mock.patch.multiple(
        parallel_state,
        get_pipeline_model_parallel_rank=lambda: pp_rank,
        get_pipeline_model_parallel_world_size=lambda: config.pipeline_model_parallel_size,
        get_virtual_pipeline_model_parallel_world_size=lambda: config.virtual_pipeline_model_parallel_size,
    ):
        yield


def mcore_stage(config, pp_rank: int, vp_stage: int) -> PipelineStage:
    """The stage as mcore's own functions describe it."""
    from megatron.core.transformer.multi_token_prediction import get_mtp_layer_offset, get_mtp_num_layers_to_build
    from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    chunk = vp_stage if config.virtual_pipeline_model_parallel_size is not None else None
    with mcore_rank(config, pp_rank):
        offset = get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=pp_rank)
        count = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=pp_rank)
        mtp_offset = get_mtp_layer_offset(config, vp_stage=chunk)
        mtp_count = get_mtp_num_layers_to_build(config, vp_stage=chunk, pp_rank=pp_rank)
        pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk)
        post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk)
    block = SimpleNamespace(
        config=config,
        layers=[SimpleNamespace(layer_number=offset + index + 1) for index in range(count)],
        submodules=SimpleNamespace(layer_norm=True),
        post_process=post_process,
        post_layer_norm=True,
    )
    return PipelineStage(
        pp_rank=pp_rank,
        vp_stage=vp_stage,
        layer_offset=offset,
        decoder_layers=tuple(range(offset, offset + count)),
        mtp_layers=tuple(range(mtp_offset, mtp_offset + mtp_count)),
        pre_process=pre_process,
        post_process=post_process,
        has_embedding=pre_process or mtp_count > 0,
        has_final_norm=TransformerBlock.has_final_layernorm_in_this_stage(block),
    )


def mcore_stages(num_layers: int, mtp_num_layers: int | None, pp: int, vpp: int, **options) -> list[PipelineStage]:
    """All stages, or one of `REFUSALS`; also refused: to build a layer twice, or not at all."""
    config = mcore_config(num_layers=num_layers, mtp_num_layers=mtp_num_layers, pp=pp, vpp=vpp, **options)
    vpp = config.virtual_pipeline_model_parallel_size or 1
    assert vpp == 1 or pp > 1, "initialize_model_parallel refuses vpp without pp; see test_ranks_against_mcore"
    stages = [mcore_stage(config, rank, vp_stage) for vp_stage in range(vpp) for rank in range(pp)]
    built = sorted(layer for stage in stages for layer in stage.decoder_layers)
    assert built == list(range(num_layers)), "mcore would lose layers, or build some twice"
    return stages


def check_same(num_layers: int, mtp_num_layers: int | None, pp: int, vpp: int, **options) -> None:
    try:
        theirs = mcore_stages(num_layers, mtp_num_layers, pp, vpp, **options)
    except REFUSALS:
        with pytest.raises(LayoutError, match="expected:"):
            place_layers(
                ParallelLayout(pp=pp, vpp=vpp, **options), num_layers=num_layers, mtp_num_layers=mtp_num_layers
            )
        return
    ours = place_layers(ParallelLayout(pp=pp, vpp=vpp, **options), num_layers=num_layers, mtp_num_layers=mtp_num_layers)
    assert list(ours.stages) == theirs
    for stage in theirs:
        for layer in stage.decoder_layers:
            assert ours.stage_of_layer(layer) == stage


mtp = st.none() | st.integers(0, 2)
ends = st.none() | st.integers(1, 6)


@settings(deadline=None, max_examples=250)
@given(
    pp=st.integers(1, 5),
    vpp=st.integers(1, 3),
    per_chunk=st.integers(1, 3),
    change=st.integers(-2, 1),
    embedding=st.booleans(),
    loss=st.booleans(),
    mtp_num_layers=mtp,
)
def test_even_stages(pp, vpp, per_chunk, change, embedding, loss, mtp_num_layers):
    num_layers = pp * vpp * per_chunk + change
    assume(num_layers > 0)
    check_same(
        num_layers,
        mtp_num_layers,
        pp,
        vpp,
        account_for_embedding_in_pipeline_split=embedding,
        account_for_loss_in_pipeline_split=loss,
    )


@settings(deadline=None, max_examples=400)
@given(
    pp=st.integers(1, 5),
    vpp=st.integers(1, 2),
    first=ends,
    last=ends,
    per_middle=st.integers(0, 4),
    change=st.sampled_from((0, 0, 0, 1, -1, -4)),
    mtp_num_layers=mtp,
)
def test_uneven_stages(pp, vpp, first, last, per_middle, change, mtp_num_layers):
    # One rank with two numbers: refused here, see the last test of this file.
    assume(pp > 1 or first is None or last is None)
    middle_ranks = pp - (first is not None) - (last is not None)
    num_layers = (first or 0) + (last or 0) + middle_ranks * per_middle * vpp + change
    assume(num_layers > 0)
    check_same(
        num_layers,
        mtp_num_layers,
        pp,
        vpp,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )


@st.composite
def layout_texts(draw: st.DrawFn) -> tuple[str, int]:
    """A layout string that is right more often than not, and its pipeline size."""
    pp, vpp = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    counts = draw(st.lists(st.integers(0, 3), min_size=pp * vpp, max_size=pp * vpp))
    chunks = ["t" * count for count in counts]
    chunks[0] = "E" + chunks[0]
    mtp_chunk = draw(st.none() | st.integers(max(0, len(chunks) - pp - 1), len(chunks) - 1))
    if mtp_chunk is not None:
        chunks = [chunk.replace("t", "") if number > mtp_chunk else chunk for number, chunk in enumerate(chunks)]
        chunks[mtp_chunk] += "m" * draw(st.integers(1, 2))
    chunks[-1] += "L"
    text = "|".join(chunks)
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from("EtmL|")) + text[at + draw(st.integers(0, 1)) :]
    return text.replace("tt", draw(st.sampled_from(("tt", "t*2", "(t)*2", "t,t")))), pp


@settings(deadline=None, max_examples=400)
@given(text_pp=layout_texts(), change=st.sampled_from((0, 0, 0, 1)), mtp_change=st.sampled_from((0, 0, 0, 1)))
def test_layout_strings(text_pp, change, mtp_change):
    text, pp = text_pp
    unrolled = "".join(parse_layout_string(text))
    num_layers = unrolled.count("t") + change
    assume(num_layers > 0)
    mtp_num_layers = (unrolled.count("m") + mtp_change) or None
    check_same(num_layers, mtp_num_layers, pp, 1, pipeline_model_parallel_layout=text)


@settings(deadline=None, max_examples=1000)
@given(st.text("EtmL|(),*0123 )*|", max_size=14))
def test_layout_string_grammar(text):
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    # Counts of three digits, nested, fill the memory in mcore; here they meet a limit (see test_pipeline).
    digits = "".join("d" if letter.isdigit() else letter for letter in text.replace(",", ""))
    assume("ddd" not in digits)
    try:
        theirs = PipelineParallelLayerLayout.parse_str_to_list(text)
    except AssertionError:
        with pytest.raises(LayoutError, match="pipeline layout holds"):
            parse_layout_string(text)
        return
    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    assert parse_layout_string(text) == tuple("".join(letters[kind.name] for kind in chunk) for chunk in theirs)


@pytest.mark.parametrize(
    ("num_layers", "pp", "first", "last", "built"),
    [
        (4, 3, 4, 4, [0, 1, 2, 3, 0, 1, 2, 3]),  # the last stage starts again at layer 0
        (10, 1, 2, 2, [0, 1]),  # one rank that is first and last: eight layers are lost
    ],
)
def test_where_we_are_stricter_mcore_builds_the_wrong_layers(num_layers, pp, first, last, built):
    options = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
    config = mcore_config(num_layers=num_layers, mtp_num_layers=None, pp=pp, vpp=1, **options)
    stages = [mcore_stage(config, rank, 0) for rank in range(pp)]
    assert [layer for stage in stages for layer in stage.decoder_layers] == built
    with pytest.raises(LayoutError, match=r"uneven pipeline stages|two numbers of layers"):
        place_layers(ParallelLayout(pp=pp, **options), num_layers=num_layers)
