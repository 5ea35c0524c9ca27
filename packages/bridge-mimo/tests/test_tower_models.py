"""Encoders inside `MimoModel` against whole HF models: deepstack, CLIP with a projector, the HF tower as it is."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")
transformers = pytest.importorskip("transformers")

import llava_family  # noqa: E402
import model_jobs as jobs  # noqa: E402

from bridge_core import AutoBridge, ParallelLayout  # noqa: E402
from bridge_core.errors import ConfigError, LayoutError  # noqa: E402
from bridge_core.families import register_family  # noqa: E402
from bridge_core.runtime.tensors import window  # noqa: E402
from bridge_core.testing.hf_models import make_model  # noqa: E402

live = pytest.mark.skipif(
    find_spec("megatron.core.models.mimo.comm") is None, reason="live components need megatron-core 0.17"
)
GRIDS = torch.tensor([[1, 4, 2], [1, 2, 6]])
IMAGE_TOKEN = 3


def shares(bridge, tensors, tp, wanted=""):
    """HF tensors, cut and named by the plan, for each tensor-parallel rank."""
    plan = bridge.plan(ParallelLayout(tp=tp))

    def one(shard):
        filled = torch.zeros(shard.shape)  # rows that pad the vocabulary stay so
        for piece in shard.pieces:
            source = tensors[piece.source.tensor].detach().contiguous().view(-1)
            window(filled.view(-1), piece.shape, piece.target).copy_(window(source, piece.shape, piece.source))
        return filled

    return [{s.name: one(s) for s in plan.local_shards(rank) if s.name.startswith(wanted)} for rank in range(tp)]


@live
@pytest.mark.parametrize("tp", [1, 2])
def test_deepstack_reaches_the_language_model(rank_pool, tp):
    """Logits of text with images; with tp=2 also cut along the sequence."""
    model = make_model("qwen3_vl", image_token_id=IMAGE_TOKEN, video_token_id=2)
    vision = model.config.vision_config
    bridge = AutoBridge.from_hf_config(model.config.to_dict())
    pixels = torch.randn(
        int(GRIDS.prod(1).sum()), vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    )
    images = [IMAGE_TOKEN] * 2, [IMAGE_TOKEN] * 3  # merged patches of each image
    tokens = torch.tensor([[9, 11, *images[0], 13, 15, 21, 8], [12, *images[1], 50, 60, 70, 9]])
    positions = torch.arange(tokens.shape[1]).expand(3, *tokens.shape)  # all axes alike: a plain rotary embedding
    inputs = {"pixel_values": pixels, "image_grid_thw": GRIDS, "position_ids": positions}
    wanted = model(tokens, **inputs, mm_token_type_ids=(tokens == IMAGE_TOKEN).int()).logits
    wanted.square().sum().backward()
    alone = model(tokens.clamp(min=IMAGE_TOKEN + 1), position_ids=positions).logits
    results = rank_pool.run(
        jobs.run_mimo,
        bridge.fields,
        shares(bridge, dict(model.named_parameters()), tp),
        tokens,
        pixels,
        GRIDS,
        tp=tp,
        ranks=range(tp),
    )
    results.sort(key=lambda result: result[3])
    for number, expected in enumerate((wanted, alone)):
        logits = torch.cat([result[number] for result in results], dim=-1)[..., : expected.shape[-1]]
        torch.testing.assert_close(logits, expected.detach(), rtol=1e-5, atol=1e-5)
    gradient = model.model.visual.deepstack_merger_list[0].norm.bias.grad
    for result in results:
        torch.testing.assert_close(result[2], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@live
def test_clip_and_a_projector(rank_pool):
    register_family(llava_family.FAMILY)
    model = llava_family.tiny_model()
    config = model.config.to_dict()
    bridge = AutoBridge.from_hf_config(config)
    names = {"model.language_model.": "language_model.model.", "model.": "", "lm_head": "language_model.lm_head"}
    weights = {}
    for name, value in model.named_parameters():
        old, new = next((old, new) for old, new in names.items() if name.startswith(old))
        weights[new + name.removeprefix(old)] = value
    pixels = torch.randn(2, 3, 16, 16)
    expected = torch.cat(list(model.get_image_features(pixels).pooler_output))
    tp = 2
    (one, two) = rank_pool.run(
        jobs.run_llava,
        bridge.fields,
        config["vision_config"],
        shares(bridge, weights, tp, "vision_model."),
        pixels,
        tp=tp,
        ranks=range(tp),
    )
    for output, frozen, held, keys in (one, two):
        torch.testing.assert_close(output, expected.detach(), rtol=1e-5, atol=1e-5)
        # The last layer and the norm after it are not on the way to the state before the last.
        assert all(".layers.2." in name or ".ln_post." in name for name in frozen)
        assert frozen
        planned = {name for name in bridge.plan(ParallelLayout()).megatron_tensors if name.startswith("vision_model.")}
        routes = {
            "encoders.clip.": "vision_model.tower.",
            "input_projections.0.": "vision_model.projector.",
        }
        assert {planned_name(name, routes) for name in held} == planned
        assert {key.replace(".layers.", ".") for key in keys} == {_stacked(name) for name in held}


def planned_name(name, routes):
    old = next(old for old in routes if name.startswith(old))
    return routes[old] + name.removeprefix(old)


def _stacked(name):
    """A checkpoint's key, without the word and the number that say which layer."""
    head, _, tail = name.partition(".layers.")
    return f"{head}.{tail.partition('.')[2]}" if tail else name


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5"])
def test_hf_tower_as_it_is(rank_pool, name):
    model = make_model(name)
    tower = model.model.visual
    size = tower.patch_embed.proj.weight[0].numel()
    inputs = {"pixel_values": torch.randn(int(GRIDS.prod(1).sum()), size), "grid_thw": GRIDS}
    output = tower(inputs["pixel_values"], grid_thw=GRIDS)
    wide = torch.cat((output.pooler_output, *(getattr(output, "deepstack_features", None) or ())), dim=-1)
    weights = {key: value.detach() for key, value in tower.named_parameters()}
    plan = AutoBridge.from_hf_config(model.config.to_dict()).plan(ParallelLayout())
    prefix = "model.visual."
    planned = {f"hf.{key.removeprefix(prefix)}": shape for key, shape in plan.hf_tensors.items() if prefix in key}
    results = rank_pool.run(jobs.run_replicated, model.config.to_dict(), weights, inputs, tp=2, ranks=range(2))
    for got, held, _ in results:
        torch.testing.assert_close(got, wide.detach(), rtol=1e-6, atol=1e-6)
        assert held == planned
    owners = [{key: replica[:2] for key, replica in result[2].items()} for result in results]
    assert owners[0].keys() == owners[1].keys() == held.keys()
    assert all(owners[0][key] == (0, 0) and owners[1][key] == (0, 1) for key in held)


def test_hf_clip_as_it_is(rank_pool):
    model = llava_family.tiny_model()
    tower = model.model.vision_tower
    pixels = torch.randn(2, 3, 16, 16)
    expected = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    weights = {key: value.detach() for key, value in tower.named_parameters()}
    inputs = {"pixel_values": pixels}
    ((got, *_),) = rank_pool.run(
        jobs.run_replicated, model.config.to_dict(), weights, inputs, feature_layer=-2, ranks=[0]
    )
    torch.testing.assert_close(got, expected.detach(), rtol=1e-6, atol=1e-6)


def test_pixels_of_other_grids_are_refused(rank_pool):
    fields = AutoBridge.from_hf_config(make_model("qwen3_5").config.to_dict()).fields
    from bridge_core.testing.ranks import RankError

    with pytest.raises(RankError, match="20 patches of 96 numbers"):
        rank_pool.run(jobs.wrong_pixels, fields, torch.zeros(16, 96), GRIDS, ranks=[0])


# --- What is refused before anything is built -----------------------------------------------------


@pytest.fixture(scope="module")
def fields():
    return AutoBridge.from_hf_config(make_model("qwen3_vl").config.to_dict()).fields


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"tensor_model_parallel_size": 3}, LayoutError, "4 heads"),
        ({"sequence_parallel": True}, LayoutError, "sequence_parallel"),
        ({"context_parallel_size": 2}, LayoutError, "context_parallel_size"),
        ({"virtual_pipeline_model_parallel_size": 2}, LayoutError, "one chunk"),
        ({"hidden_size": 64}, ConfigError, "another tower"),
        ({"hiden_size": 64}, ConfigError, "hiden_size"),
    ],
)
def test_settings_that_do_not_fit(fields, settings, error, said):
    from bridge_mimo.towers import tower_spec

    with pytest.raises(error, match=said):
        tower_spec(fields, settings, groups=None, spec="host")


def _groups(*, tp=1, pp=1, stage=0):
    return SimpleNamespace(
        tp=SimpleNamespace(size=lambda: tp, rank=lambda: 0), pp=SimpleNamespace(size=lambda: pp, rank=lambda: stage)
    )


@pytest.mark.parametrize("groups", [None, _groups(tp=2)])
def test_groups_of_other_sizes(fields, groups):
    from megatron.core.transformer.spec_utils import build_module

    from bridge_mimo.towers import tower_spec

    with pytest.raises(LayoutError, match="process groups differ"):
        build_module(tower_spec(fields, groups=groups, spec="host"))


def test_hf_tower_has_no_stages(fields):
    from megatron.core.transformer.spec_utils import build_module

    from bridge_mimo.towers import replicated_tower_spec

    spec = replicated_tower_spec({}, {"pipeline_model_parallel_size": 2}, groups=_groups(pp=2))
    with pytest.raises(LayoutError, match="pp=2"):
        build_module(spec)


def test_an_older_megatron_is_named(monkeypatch):
    """Before 0.17 nothing is built on live ranks; what needs no model works (test_mimo_plan, test_mimo_checkpoint)."""
    from bridge_mimo import MegatronMIMOBridge
    from bridge_mimo.runtime import groups

    if groups._takes_grids():
        monkeypatch.setattr(groups, "_takes_grids", lambda: False)
    config = make_model("qwen3_vl").config.to_dict() | {"architectures": ["Qwen3VLForConditionalGeneration"]}
    for colocated in (False, True):
        bridge = MegatronMIMOBridge.from_hf_config(config, colocated=colocated)
        bridge.plan().audit()
        with pytest.raises(ConfigError, match=r"megatron-core 0\.17 or newer"):
            bridge.to_megatron_model(spec="host")


def test_an_activation_function_that_towers_do_not_have():
    from bridge_mimo.towers.config import activation_function

    with pytest.raises(ConfigError) as error:
        activation_function("swish")
    assert error.value.where == "activation_function"
    assert error.value.expected == "gelu or gelu_tanh or quick_gelu"
    assert error.value.got == "'swish'"
    assert "the function itself" in str(error.value.fix)


def test_a_model_without_a_tower():
    from bridge_mimo.towers import tower_spec

    fields = AutoBridge.from_hf_config(make_model("qwen3").config.to_dict()).fields
    with pytest.raises(ConfigError, match="no vision tower"):
        tower_spec(fields, groups=None, spec="host")


# --- Where patches lie ----------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [1, 2])
def test_patches_lie_where_transformers_says(merge):
    from transformers import vision_utils

    from bridge_mimo.towers.grids import interpolation, place_patches

    grids = torch.tensor([[1, 4, 6], [2, 8, 2], [1, 2, 2], [3, 20, 14]])
    patches = place_patches(grids, merge)
    assert torch.equal(patches.coordinates, vision_utils.get_vision_position_ids(grids, merge))
    assert torch.equal(patches.boundaries, vision_utils.get_vision_cu_seqlens(grids))
    assert patches.longest == 20 * 14
    rows, weights = interpolation(patches, 7)
    theirs, their_weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grids, 7, align_corners=True, spatial_merge_size=merge
    )
    table = torch.randn(49, 5)
    got, wanted = ((table[r] * w[..., None]).sum(1) for r, w in ((rows, weights), (theirs, their_weights)))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("grid", [[1, 3, 4], [0, 4, 4], [1, 4, 6, 1]])
def test_grids_that_do_not_fit(grid):
    from bridge_mimo.towers.grids import place_patches

    with pytest.raises(ConfigError, match="grid_thw"):
        place_patches(torch.tensor([[1, 2, 2], grid][len(grid) != 3 :]), 2)
