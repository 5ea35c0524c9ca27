"""Plans of several components: each in its own layout, on its own ranks, under the names of `MimoModel`."""

from __future__ import annotations

import json
from inspect import signature

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inventory import PUBLISHED, inventory, is_mtp
from simulation import CONFIGS, distinct, layouts, load_rank, make_plan, save_rank

from bridge_core import AutoBridge, ParallelLayout
from bridge_core.errors import ConfigError, CoverageError, LayoutError
from bridge_mimo import ComponentLayout as C
from bridge_mimo import MegatronMIMOBridge

VISION = ["qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"]
TOWER = "modality_submodules.images.encoders.qwen_visual."


def bridge(name, *, ignore=(), **options):
    return MegatronMIMOBridge.from_hf_config(CONFIGS[name], ignore=ignore, **options)


# --- Published models -------------------------------------------------------------------------------


def test_a_published_model_on_eight_ranks():
    config = PUBLISHED["qwen3.5-27b"]
    held = {name: shape for name, (shape, _) in inventory(config).items()}
    parallelism = {"language": C(tp=4), "images": C(tp=4)}
    plan = MegatronMIMOBridge.from_hf_config(config, parallelism=parallelism, world_size=8).plan()
    found = plan.audit(held)
    assert found.hf_tensors == len(plan.hf_tensors) == 1184
    assert len(plan.carried) == 15
    assert not found.ignored
    assert {*plan.hf_tensors} == {name for name in held if not is_mtp(name, config)}
    assert plan.carried == {name: shape for name, shape in held.items() if is_mtp(name, config)}
    assert [plan.components_of(rank) for rank in range(8)] == [["language"]] * 4 + [["images"]] * 4
    # Every rank holds its share, and what is replicated over tp, in bf16.
    sizes = {name: sum(np.prod(s) for n, s in held.items() if n in part.plan.hf_tensors) for name, part in
             plan.components.items()}  # fmt: skip
    for rank in range(8):
        (name,) = plan.components_of(rank)
        assert sizes[name] * 2 / 4 <= plan.cost(rank).nbytes <= sizes[name] * 2 / 4 * 1.06


@pytest.mark.parametrize(
    ("name", "parallelism"),
    [
        ("qwen3.5-397b-a17b", {"images": C(tp=4, pp=3), "language": C(tp=2, pp=4, ep=32, etp=1)}),
        ("qwen3-vl-30b-a3b-instruct", {"language": C(tp=2, pp=4, vpp=3), "images": C(tp=2, pp=3, dp=2)}),
    ],
)
def test_published_models_with_pipelines_and_experts(name, parallelism):
    config = PUBLISHED[name]
    held = {tensor: shape for tensor, (shape, _) in inventory(config).items()}
    plan = MegatronMIMOBridge.from_hf_config(config, parallelism=parallelism).plan()
    assert plan.audit(held).hf_tensors + len(plan.carried) == len(held)


# --- Simulated grids --------------------------------------------------------------------------------


@st.composite
def parallelisms(draw, name):
    """Layouts of both components, one after the other or on the same ranks."""
    language = draw(layouts(CONFIGS[name])).to_dict()
    language = {key: language[key] for key in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    images = {"tp": draw(st.sampled_from([1, 2, 4, 8])), "pp": draw(st.sampled_from([1, 3]))}
    if draw(st.booleans()):
        language |= {"pp": 1, "vpp": 1}
        world = language["tp"] * language["cp"] * language["dp"]
        return {"language": C(**language), "images": C(tp=min(images["tp"], world))}, world, True
    order = draw(st.permutations(["language", "images"]))
    sizes = {"language": language, "images": images | {"dp": draw(st.sampled_from([1, 2]))}}
    return {name: C(**sizes[name]) for name in order}, None, False


@pytest.mark.parametrize("name", VISION)
@settings(max_examples=12)
@given(data=st.data())
def test_a_grid_holds_the_model_and_gives_it_back(name, data):
    parallelism, world, colocated = data.draw(parallelisms(name))
    try:
        plan = bridge(name, parallelism=parallelism, world_size=world, colocated=colocated).plan()
    except LayoutError:
        return  # layers or heads that do not divide: core's own tests look at these
    plan.audit()
    before = distinct(plan)
    after = {name: np.full_like(tensor, -1) for name, tensor in before.items()}
    for rank in range(plan.layout.world_size):
        save_rank(plan, rank, load_rank(plan, rank, before), after)
    for key, tensor in before.items():
        assert (after[key] == tensor).all(), key


@pytest.mark.parametrize("name", VISION)
def test_components_hold_what_core_gives_them(name):
    """Language TP2 x PP2 and images TP4: the parameters of core's plans in these layouts, under other names."""
    parallelism = {"language": C(tp=2, pp=2), "images": C(tp=4)}
    plan = bridge(name, parallelism=parallelism).plan()
    hf = distinct(plan)
    alone = {
        "language": make_plan(CONFIGS[name], ParallelLayout(tp=2, pp=2), ignore=("mtp.*", "model.visual.*")),
        "images": make_plan(CONFIGS[name], ParallelLayout(tp=4)),
    }
    alone_hf = distinct(alone["images"]) | hf
    for part, prefix, of in (("language", "language_model.", ""), ("images", TOWER, "vision_model.")):
        for own, rank in enumerate(plan.components[part].layout.ranks):
            expected = load_rank(alone[part], own, alone_hf)
            expected = {
                (chunk, prefix + param.removeprefix(of)): value
                for (chunk, param), value in expected.items()
                if param.startswith(of)
            }
            found = load_rank(plan, rank, hf)
            assert found.keys() == expected.keys()
            assert all((found[key] == expected[key]).all() for key in expected)


def test_a_tower_with_a_pipeline():
    """Patches first, the merger last, and the mergers of deepstack where their layers are (0 and 2 of 3)."""
    plan = bridge("qwen3_vl", parallelism={"language": C(), "images": C(pp=3)}).plan()
    held = [{shard.param.removeprefix(TOWER) for shard in plan.local_shards(rank)} for rank in (1, 2, 3)]
    parts = [sorted({name.split(".")[0] for name in names}) for names in held]
    assert parts == [
        ["decoder", "deepstack_merger_list", "patch_embed", "pos_embed"],
        ["decoder"],
        ["decoder", "deepstack_merger_list", "merger"],
    ]
    assert "deepstack_merger_list.1.linear_fc1.weight" in held[2]  # numbered as in the whole tower
    assert all("decoder.layers.0.mlp.linear_fc2.bias" in names for names in held)  # numbered on the stage


def test_names_and_entries_are_those_of_mimo_model():
    plan = bridge("qwen3_5_moe", parallelism={"language": C(pp=2, ep=2, dp=2), "images": C()}).plan()
    names = {entry.name for entry in plan.entries}
    tensors = plan.megatron_tensors
    for rank in range(plan.layout.world_size):
        for shard in plan.iter_local_shards(rank):
            assert shard.entry in names
            assert shard.name in tensors
            assert all(piece.target.tensor == shard.param for piece in shard.pieces)
    manifest = json.loads(plan.to_json(4))
    assert manifest["components"] == ["images"]
    assert manifest["shards"][0]["param"].startswith(TOWER)
    whole = json.loads(plan.to_json())
    assert whole["carried"] == {name: list(shape) for name, shape in plan.carried.items()}
    assert whole["ranks"][4] == {"images": plan.cost(4).nbytes}


def test_prediction_layers_are_carried_or_left_out():
    whole = bridge("qwen3_5").plan()
    assert whole.carried
    assert all(name.startswith("mtp.") for name in whole.carried)
    assert not {*whole.carried} & {meta.name for meta in whole.metadata()}
    without = bridge("qwen3_5", ignore=["mtp.*"]).plan()
    assert not without.carried
    assert without.hf_tensors == whole.hf_tensors
    held = whole.hf_tensors | whole.carried
    assert {*without.audit(held).ignored} == {*whole.carried}
    assert whole.audit(held).ignored == ()


@pytest.mark.parametrize("colocated", [False, True])
def test_colocated_ranks_hold_both(colocated):
    plan = bridge("qwen3_vl", parallelism={"language": C(tp=2), "images": C(tp=1)}, colocated=colocated).plan()
    assert plan.components_of(0) == (["language", "images"] if colocated else ["language"])
    both = sum(cost.nbytes for cost in plan.component_costs(0).values())
    assert plan.cost(0).nbytes == both
    assert len({shard.param for shard in plan.local_shards(0)}) == len(plan.local_shards(0))


# --- Refusals ---------------------------------------------------------------------------------------


def test_components_have_to_be_those_of_the_model():
    for parallelism in ({"language": C(), "audio": C()}, {"language": C()}):
        with pytest.raises(ConfigError) as caught:
            bridge("qwen3_5", parallelism=parallelism)
        assert caught.value.expected == "language, images"
        assert caught.value.got == ", ".join(parallelism)


def test_a_layout_that_does_not_divide_names_its_component():
    for parallelism, where, got in (
        ({"language": C(tp=3), "images": C()}, "component language, num_attention_heads", "8 heads"),
        ({"language": C(), "images": C(pp=2)}, "component images", "3 + 0 + 0 = 3"),
        ({"language": C(), "images": C(tp=2, ep=2)}, "component images, ep", "ep=2"),
    ):
        with pytest.raises(LayoutError) as caught:
            bridge("qwen3_vl", parallelism=parallelism).plan()
        assert str(caught.value.where).startswith(where)
        assert got in str(caught.value.got)


def test_a_world_that_is_not_the_layouts():
    with pytest.raises(LayoutError, match="no component"):
        bridge("qwen3_vl", parallelism={"language": C(dp=1), "images": C(dp=1)}, world_size=4)
    with pytest.raises(LayoutError, match="rank 2 does not exist"):
        bridge("qwen3_vl").plan().local_shards(2)


def test_one_layout_for_all_is_refused():
    with pytest.raises(LayoutError, match="several components"):
        bridge("qwen3_vl").plan(ParallelLayout(tp=2))


def test_a_component_without_tensors():
    with pytest.raises(ConfigError, match="would hold no tensor"):
        bridge("qwen3_vl", ignore=["model.visual.*"]).plan()


def test_an_inventory_without_the_prediction_layers_or_with_a_stranger():
    plan = bridge("qwen3_5").plan()
    with pytest.raises(CoverageError, match="prediction layers"):
        plan.audit(plan.hf_tensors)
    held = plan.hf_tensors | plan.carried
    name = next(iter(plan.carried))
    with pytest.raises(CoverageError, match="1 of another shape"):
        plan.audit(held | {name: (1,)})
    with pytest.raises(CoverageError, match=r"unexpected 1: model\.audio\.weight"):
        plan.audit(held | {"model.audio.weight": (1,)})
    with pytest.raises(CoverageError, match=r"missing 1: model\.visual\.patch_embed\.proj\.bias"):
        plan.audit({n: s for n, s in held.items() if n != "model.visual.patch_embed.proj.bias"})


def test_verbs_are_those_of_core_with_its_arguments():
    """What is called on an `AutoBridge` can be called on this one: more may be said, nothing else has to be."""
    verbs = [name for name in vars(AutoBridge) if not name.startswith("_") and callable(getattr(AutoBridge, name))]
    assert {"from_hf_pretrained", "load_hf_weights", "export_hf_weights", "import_ckpt", "plan"} <= {*verbs}
    for verb in verbs:
        theirs, ours = (signature(getattr(kind, verb)).parameters for kind in (AutoBridge, MegatronMIMOBridge))
        positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional, verb
        assert theirs.keys() <= ours.keys(), verb
        for name, parameter in ours.items():
            if name in theirs:
                assert (parameter.kind, parameter.default) == (theirs[name].kind, theirs[name].default), (verb, name)
            else:
                assert parameter.kind is parameter.KEYWORD_ONLY, (verb, name)
                assert parameter.default is not parameter.empty, (verb, name)


def test_bridges_say_what_they_are_for():
    assert MegatronMIMOBridge.supports(CONFIGS["qwen3_5"])
    assert not MegatronMIMOBridge.supports(CONFIGS["qwen3"])
    one = bridge("qwen3_vl", parallelism={"language": C(tp=2), "images": C()})
    two = one.with_parallelism({"language": C(dp=1), "images": C(tp=2)}, world_size=3)
    assert (one.layouts["language"].tp, one.world_size) == (2, 3)
    assert (two.layouts["language"].tp, two.layouts["images"].ranks) == (1, range(1, 3))
    assert two.plan().layout.world_size == 3
