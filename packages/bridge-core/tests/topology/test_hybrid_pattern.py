"""Pipelines of hybrid models against megatron-core's own choice of layers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_core.errors import LayoutError
from bridge_core.topology import ParallelLayout, place_layers
from bridge_core.topology.hybrid_pattern import parse_hybrid_pattern, pipeline_of, with_chunks, with_pipeline

pytest.importorskip("megatron.core.models.hybrid", reason="hybrid models need megatron-core 0.17")


def mcore_stage(monkeypatch, pattern: str, *, pp: int, rank: int, vp_stage: int | None = None, **ends):
    """Letters and offset of one chunk, by `select_pipeline_segment` of a rank that is not really there."""
    import torch.distributed as dist
    from megatron.core.models.hybrid import hybrid_layer_allocation as theirs

    monkeypatch.setattr(dist, "get_rank", lambda group=None: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: pp)
    monkeypatch.setattr(theirs, "log_on_each_pipeline_stage", lambda *args, **kwargs: None)
    monkeypatch.setattr(theirs, "log_single_rank", lambda *args, **kwargs: None)
    main = theirs.parse_hybrid_pattern(pattern).main_pattern
    first, last = (ends.get(f"num_layers_in_{end}_pipeline_stage") for end in ("first", "last"))
    letters, offset = theirs.select_pipeline_segment(main, object(), vp_stage, first, last)
    return "".join(letters), offset


def compare(text: str, layout: ParallelLayout, **ends) -> None:
    pattern = parse_hybrid_pattern(text)
    layout = with_pipeline(layout, pattern)
    with pytest.MonkeyPatch.context() as monkeypatch:
        expected = []
        try:
            for vp_stage in range(layout.vpp):
                for rank in range(layout.pp):
                    stage = vp_stage if layout.vpp > 1 else None
                    expected.append(mcore_stage(monkeypatch, text, pp=layout.pp, rank=rank, vp_stage=stage, **ends))
        except ValueError:
            expected = None
    try:
        placement = place_layers(
            layout, num_layers=len(pattern.decoder), mtp_num_layers=pattern.depths or None, hybrid=True
        )
    except LayoutError:
        # Stricter than megatron-core, which builds layers twice, leaves some out, or leaves a stage empty.
        held = "" if expected is None else "".join(part for part, _ in expected)
        assert held != pattern.decoder or sum(count or 0 for count in ends.values()) >= len(held)
        return
    assert expected is not None
    letters = pattern.decoder
    found = [
        ("".join(letters[layer] for layer in stage.decoder_layers), stage.layer_offset) for stage in placement.stages
    ]
    assert found == expected
    assert [stage.has_final_norm for stage in placement.stages] == [stage.post_process for stage in placement.stages]
    assert [bool(stage.mtp_layers) for stage in placement.stages[:-1]] == [False] * (len(placement.stages) - 1)
    assert len(placement.stages[-1].mtp_layers) == pattern.depths
    assert with_chunks(pattern, placement).chunks == tuple(letters for letters, _ in expected)


letters = st.text("M*-E", min_size=1, max_size=12)
mtp = st.sampled_from(["", "/*E", "/*E/*E"])


@settings(max_examples=200)
@given(
    letters=letters,
    mtp=mtp,
    pp=st.integers(1, 4),
    first=st.none() | st.integers(1, 5),
    last=st.none() | st.integers(1, 5),
)
def test_a_pattern_without_chunks(letters, mtp, pp, first, last):
    given_ends = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
    if pp == 1:
        given_ends = {}
    compare(letters + mtp, ParallelLayout(pp=pp, **given_ends), **given_ends)


@settings(max_examples=200)
@given(chunks=st.lists(st.text("M*-E", max_size=4), min_size=2, max_size=6).filter(any), mtp=mtp, vpp=st.integers(1, 3))
def test_a_pattern_with_chunks_of_any_length(chunks, mtp, vpp):
    """Also empty ones, and virtual stages."""
    if len(chunks) % vpp or len(chunks) // vpp < 2:
        return
    compare("|".join(chunks) + mtp, ParallelLayout(pp=len(chunks) // vpp, vpp=vpp))


def test_a_pattern_is_taken_apart_and_put_together():
    pattern = parse_hybrid_pattern("M*E-||ME/*E/*E")
    assert pattern == (("M*E-", "", "ME"), "*E", 2)
    assert str(pattern) == "M*E-||ME/*E/*E"
    assert pipeline_of(pattern) == "Etttt||ttmmL"
    assert pipeline_of(parse_hybrid_pattern("M*E-/*E")) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [("MX*", "'X'"), ("/*E", "no decoder layers"), ("M/*E/E", "depths"), ("M//*E", "depths"), ("M/*|E", "'|'")],
)
def test_a_pattern_that_mcore_refuses(text, words):
    from megatron.core.models.hybrid.hybrid_layer_allocation import parse_hybrid_pattern as theirs

    with pytest.raises(LayoutError) as caught:
        parse_hybrid_pattern(text)
    assert words in str(caught.value)
    if text[0] != "/":  # mcore takes a model that only predicts
        with pytest.raises(ValueError, match=r"valid|identical"):
            theirs(text)


def test_a_layout_that_contradicts_the_pattern_is_refused():
    pattern = parse_hybrid_pattern("M*|E-")
    assert with_pipeline(ParallelLayout(), pattern).vpp == 1
    assert with_pipeline(ParallelLayout(pp=2), pattern).pipeline_model_parallel_layout == "Ett|ttL"
    with pytest.raises(LayoutError, match="different chunks"):
        with_pipeline(ParallelLayout(pp=2, pipeline_model_parallel_layout="Ettt|tL"), pattern)
    with pytest.raises(LayoutError, match="exclude each other"):
        with_pipeline(ParallelLayout(pp=2, num_layers_in_first_pipeline_stage=1), pattern)
    with pytest.raises(LayoutError, match="do not divide"):
        with_pipeline(ParallelLayout(pp=3), pattern)
