"""Placement of layers, and the layout string: examples and error texts. No megatron needed."""

import pytest

from bridge_core.errors import LayoutError
from bridge_core.topology import ParallelLayout, parse_layout_string, place_layers

DEEPSEEK = "Et*3|(tt|)*29,m|L"  # 61 layers and one MTP layer on 32 chunks


def layers(layout: ParallelLayout, num_layers: int, **options: int) -> list[list[list[int]]]:
    placement = place_layers(layout, num_layers=num_layers, **options)
    return [[list(stage.decoder_layers) for stage in placement.stages_of(rank)] for rank in range(layout.pp)]


def test_interleaved_chunks_take_turns():
    assert layers(ParallelLayout(pp=2, vpp=2), 8) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert layers(ParallelLayout(pp=2), 8) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_uneven_first_and_last_stage():
    layout = ParallelLayout(pp=3, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=2)
    assert layers(layout, 6) == [[[0]], [[1, 2, 3]], [[4, 5]]]
    layout = ParallelLayout(pp=2, vpp=2, num_layers_in_first_pipeline_stage=2)
    assert layers(layout, 6) == [[[0], [3]], [[1, 2], [4, 5]]]


def test_embedding_and_loss_take_the_place_of_a_layer():
    layout = ParallelLayout(
        pp=2, vpp=2, account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True
    )
    assert layers(layout, 6) == [[[0], [3, 4]], [[1, 2], [5]]]


def test_ends_of_the_model_without_mtp():
    placement = place_layers(ParallelLayout(pp=2, vpp=2), num_layers=4)
    assert [stage.has_embedding for stage in placement.stages] == [True, False, False, False]
    assert [stage.has_output_layer for stage in placement.stages] == [False, False, False, True]
    assert [stage.has_final_norm for stage in placement.stages] == [False, False, False, True]
    assert not any(stage.mtp_layers for stage in placement.stages)


def test_mtp_goes_to_the_last_chunk_and_brings_an_embedding():
    placement = place_layers(ParallelLayout(pp=2, vpp=2), num_layers=4, mtp_num_layers=2)
    assert [stage.mtp_layers for stage in placement.stages] == [(), (), (), (0, 1)]
    assert [stage.has_embedding for stage in placement.stages] == [True, False, False, True]


def test_layout_string_with_a_stage_for_mtp_alone():
    placement = place_layers(
        ParallelLayout(pp=16, pipeline_model_parallel_layout=DEEPSEEK), num_layers=61, mtp_num_layers=1
    )
    assert (placement.pp, placement.vpp) == (16, 2)
    assert placement.stage(0).decoder_layers == (0, 1, 2)
    last_layers, mtp, loss = (placement.stage(rank, 1) for rank in (13, 14, 15))
    assert last_layers.decoder_layers == (59, 60)
    assert last_layers.has_final_norm
    assert (mtp.mtp_layers, mtp.decoder_layers, mtp.layer_offset, mtp.has_embedding) == ((0,), (), 61, True)
    assert (loss.post_process, loss.has_final_norm, loss.has_embedding) == (True, False, False)


def test_final_norm_without_mtp_stays_at_the_output_layer():
    layout = ParallelLayout(pp=2, pipeline_model_parallel_layout="Ett|L")
    for mtp_num_layers, expected in ((None, [False, True]), (0, [True, False])):
        placement = place_layers(layout, num_layers=2, mtp_num_layers=mtp_num_layers)
        assert [stage.has_final_norm for stage in placement.stages] == expected


def test_stage_of_layer_skips_chunks_without_layers():
    layout = ParallelLayout(pp=3, vpp=2, pipeline_model_parallel_layout="E||tt||t|L")
    placement = place_layers(layout, num_layers=3)
    found = [placement.stage_of_layer(layer) for layer in range(3)]
    assert [(stage.pp_rank, stage.vp_stage) for stage in found] == [(2, 0), (2, 0), (1, 1)]
    with pytest.raises(LayoutError, match=r"no decoder layer 3[\s\S]*0 <= layer < 3"):
        placement.stage_of_layer(3)
    with pytest.raises(LayoutError, match=r"vp_stage=2[\s\S]*0 <= pp_rank < 3, 0 <= vp_stage < 2"):
        placement.stage(0, 2)


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("EtL", ("EtL",)),
        ("E,t*3|t,L", ("Ettt", "tL")),
        ("Et|(tt|)*2,m|L", ("Et", "tt", "tt", "m", "L")),
        ("E|*3tL", ("E", "", "", "tL")),
        ("E(t*2|)*2L", ("Ett", "tt", "L")),
        ("Et*0tL", ("EtL",)),
        ("(t)*2*3", ("tttt",)),  # the second count belongs to the last letter
        ("t*1,2", ("t" * 12,)),  # commas vanish before counts are read
    ],
)
def test_layout_string_unrolls(text, chunks):
    assert parse_layout_string(text) == chunks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Et |L", r"chunk 0 of the pipeline layout holds ' '[\s\S]*blanks"),
        ("E|txL", r"chunk 1 of the pipeline layout holds 'x'[\s\S]*got: +'txL'"),
        ("E((t|)*2)*2L", r"chunk 0 of the pipeline layout holds '\('"),
        ("E(tt)L", r"chunk 0 of the pipeline layout holds '\(', '\)'"),
        ("Et*L", r"holds '\*'"),
        ("Et*2000000L", r"unrolls to too many letters[\s\S]*at most 1000000"),
        ("Et*99999999999999999999L", r"unrolls to too many letters"),
        ("E((t)*1000)*10000L", r"holds|too many"),
        ("E(t*999)*999*999L", r"holds|too many"),
    ],
)
def test_layout_strings_that_say_nothing_are_refused(text, message):
    with pytest.raises(LayoutError, match=message):
        parse_layout_string(text)


@pytest.mark.parametrize(
    ("pp", "text", "message"),
    [
        (2, "Et|t|tL", r"3 chunks do not divide over pp=2"),
        (1, "tL", r"0 x 'E', 1 x 'L', first 't', last 'L'"),
        (1, "", r"0 x 'E', 0 x 'L', first '', last ''"),
        (2, "Et|LtL", r"1 x 'E', 2 x 'L'"),
        (2, "Et|tLm", r"1 x 'E', 1 x 'L', first 'E', last 'm'"),
        (2, "Em|tL", r"a decoder layer comes after an MTP layer"),
        (3, "Et|m|mL", r"MTP layers are not in one chunk[\s\S]*0\.\.2 \(pp=3, 3 chunks\)[\s\S]*chunk\(s\) 1, 2"),
        (2, "Et|m||L", r"MTP layers are not in one chunk[\s\S]*2\.\.3 \(pp=2, 4 chunks\)[\s\S]*chunk\(s\) 1"),
    ],
)
def test_layout_strings_that_megatron_refuses(pp, text, message):
    with pytest.raises(LayoutError, match=message):
        ParallelLayout(pp=pp, pipeline_model_parallel_layout=text)


@pytest.mark.parametrize(
    ("options", "num_layers", "message"),
    [
        ({"pp": 4, "vpp": 2}, 30, r"30 decoder layers do not divide over pp=4 x vpp=2[\s\S]*multiple of 8[\s\S]*= 30"),
        (
            {"pp": 4, "account_for_embedding_in_pipeline_split": True},
            32,
            r"32 decoder layers[\s\S]*got: +32 \+ 1 \+ 0 = 33[\s\S]*num_layers_in_first_pipeline_stage",
        ),
        (
            {"pp": 4, "num_layers_in_first_pipeline_stage": 3},
            16,
            r"4 uneven pipeline stages[\s\S]*multiple of 3 stages[\s\S]*16 - 3 \(first\) - 0 \(last\) = 13",
        ),
        (
            {"pp": 2, "num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 4},
            8,
            r"no layers to remain[\s\S]*8 - 3 \(first\) - 4 \(last\) = 1",
        ),
        (
            {"pp": 3, "num_layers_in_first_pipeline_stage": 4, "num_layers_in_last_pipeline_stage": 4},
            4,
            r"4 - 4 \(first\) - 4 \(last\) = -4",
        ),
        ({"pp": 2, "num_layers_in_first_pipeline_stage": 4}, 4, r"positive multiple of 1 stages[\s\S]*= 0"),
        (
            {"pp": 3, "vpp": 2, "num_layers_in_last_pipeline_stage": 3},
            7,
            r"pipeline rank 2 cannot divide its 3 layers over vpp=2[\s\S]*layers per rank: 2, 2, 3",
        ),
        ({}, 0, r"out of range[\s\S]*num_layers=0, mtp_num_layers=None"),
        (
            {"pp": 2, "pipeline_model_parallel_layout": "Ett|tL"},
            4,
            r"4 x 't' and 0 x 'm'[\s\S]*got: +3 x 't' and 0 x 'm'",
        ),
    ],
)
def test_layers_that_do_not_divide_are_refused_with_their_numbers(options, num_layers, message):
    with pytest.raises(LayoutError, match=message):
        place_layers(ParallelLayout(**options), num_layers=num_layers)


def test_mtp_layers_have_to_match_the_string():
    layout = ParallelLayout(pp=2, pipeline_model_parallel_layout="Et|mL")
    for mtp_num_layers in (None, 0, 2):
        with pytest.raises(LayoutError, match=rf"mtp_num_layers={mtp_num_layers}\)[\s\S]*got: +1 x 't' and 1 x 'm'"):
            place_layers(layout, num_layers=1, mtp_num_layers=mtp_num_layers)
    with pytest.raises(LayoutError, match="mtp_num_layers=-1"):
        place_layers(layout, num_layers=1, mtp_num_layers=-1)
