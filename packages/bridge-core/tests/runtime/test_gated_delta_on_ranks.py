"""Gated delta nets on real ranks: mcore's own model holds what HF's did, in every kind of layout, and says the same.

The vision tower of a model that sees is left out: its language model is what megatron-core runs.
"""

from __future__ import annotations

import pytest
from runtime.live_jobs import build_without_global_state, round_trip
from runtime.megatron_jobs import load, save

from bridge_core import AutoBridge, ParallelLayout, import_ckpt
from bridge_core.checkpoint.hf_folder import open_hf
from bridge_core.errors import ConfigError
from bridge_core.runtime.provider import _check_version
from bridge_core.testing.hf_layouts import save_published
from bridge_core.testing.hf_models import HYBRIDS, make_model, save_model
from bridge_core.testing.mcore_jobs import load_and_run

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip(
    "megatron.core.ssm.gated_delta_net.common", reason="megatron-core before 0.19 has no gated delta nets of this form"
)
pytest.importorskip("transformers", reason="the oracle is transformers")

TOKENS = torch.tensor([[3, 17, 91, 130, 5, 64, 64, 2, 77, 11, 40, 8]])
TOWER = "model.visual.*"

DENSE = [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"tp": 4}, {"pp": 2, "vpp": 2}]
EXPERTS = [{}, {"tp": 2}, {"pp": 2}, {"ep": 2, "dp": 2}, {"tp": 2, "ep": 2, "etp": 1}]
CASES = [
    *(("qwen3_next", layout) for layout in EXPERTS),
    ("qwen3_next-mixed", {"tp": 2, "pp": 2}),
    *(("qwen3_5-text", layout) for layout in DENSE),
    *(("qwen3_5_moe-text", layout) for layout in EXPERTS),
    ("qwen3_5", {"tp": 2}),
    ("qwen3_5-tied", {"pp": 2}),
    ("qwen3_5_moe", {"pp": 2, "ep": 2, "dp": 2}),
]
LOADED = [
    *(("qwen3_next", layout) for layout in EXPERTS[1:]),
    *(("qwen3_5-text", layout) for layout in DENSE[:3]),
    ("qwen3_5_moe-text", {"tp": 2, "ep": 2, "etp": 1}),
    ("qwen3_5", {"tp": 2}),
]
_ROTARY = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1], "mrope_interleaved": True}


def small_model(name):
    """The model; one that sees has a rotary embedding for three positions, as the published ones."""
    changes = {}
    if "text_config" in HYBRIDS[name][1]:
        text = HYBRIDS[name][1]["text_config"] | {"rope_parameters": {"rope_type": "default", **_ROTARY}}
        changes = {"text_config": text}
    return make_model(name, **changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each model once, saved with a prediction layer as its publisher would, with transformers' logits."""
    made = {}

    def make(name):
        if name not in made:
            model = small_model(name)
            folder = save_published(model, tmp_path_factory.mktemp(name) / "hf")
            with torch.no_grad():
                made[name] = folder, model(TOKENS).logits
        return made[name]

    return make


@pytest.mark.parametrize(("name", "layout"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_load_run_save_and_stream(rank_pool, models, tmp_path, name, layout):
    folder, logits = models(name)
    check_round_trip(rank_pool, folder, logits, layout, tmp_path / "out")


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5-text", "qwen3_5_moe-text"])
def test_as_transformers_saves_it(rank_pool, models, tmp_path, name):
    """Without a prediction layer, and with experts one by one."""
    folder = save_model(make_model(name), tmp_path / "hf")
    check_round_trip(rank_pool, folder, models(name)[1], {"tp": 2}, tmp_path / "out", mtp=False)


def check_round_trip(pool, folder, logits, layout, out, *, mtp=True):
    sizes = ParallelLayout(**layout)
    results = pool.run(
        round_trip, str(folder), layout, "host", str(out), TOKENS, ignore=(TOWER,), ranks=range(sizes.world_size)
    )
    source, saved = tensors(folder), tensors(out)
    assert any(name.startswith("mtp.") for name in source) is mtp
    wanted = {name for name in source if not name.startswith("model.visual.")}
    for found in (saved, *(result["stream"] for result in results)):
        assert found.keys() == wanted
        for name in wanted:
            assert same_bits(found[name], source[name]), name
    for result in results:
        assert result["loaded"].bytes_read == result["held"] - result["padding"]
    compare_logits(last_stage(results, sizes), logits)


def last_stage(results, sizes):
    """Logits by tensor-parallel rank, of one replica."""
    return {r["tp"]: r["logits"] for k, r in enumerate(results) if r["logits"] is not None and not sizes.coords(k).dp}


def compare_logits(parts, expected):
    got = torch.cat([parts[rank] for rank in sorted(parts)], dim=-1)[..., : expected.shape[-1]]
    assert (got - expected).abs().max() <= 1e-4


def tensors(folder):
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize(("name", "layout"), LOADED, ids=lambda value: str(value).replace(" ", ""))
def test_mcore_loads_an_imported_checkpoint(rank_pool, models, tmp_path, name, layout):
    folder, logits = models(name)
    import_ckpt(folder, tmp_path / "megatron", ignore=[TOWER])
    bridge = AutoBridge.from_hf_pretrained(folder, ignore=[TOWER])
    sizes = ParallelLayout(**layout)
    iteration = str(tmp_path / "megatron" / "iter_0000000")
    results = rank_pool.run(load_and_run, bridge.fields, layout, iteration, TOKENS, ranks=range(sizes.world_size))
    hf, plan = tensors(folder), bridge.plan(sizes)
    assert len(open_hf(folder).tensors) == len(hf)
    for rank, (params, _, _) in enumerate(results):
        shards = {(shard.chunk, shard.param): shard for shard in plan.local_shards(rank)}
        assert len(params) == len(shards)
        for (chunk, name), held in params.items():
            shard = shards[chunk, name.replace("mtp_model_layer", "transformer_layer")]
            assert same_bits(held, cut(shard, hf, plan.entry(shard.entry).shift)), name
    parts = {tp: part for rank, (_, part, tp) in enumerate(results) if part is not None and not sizes.coords(rank).dp}
    compare_logits(parts, logits)


def test_mcore_loads_what_is_float32_on_disk_into_bfloat16(rank_pool, models, tmp_path):
    """As Qwen3.5 was published: mcore's own parameters for decay and norm have the model's dtype."""
    from safetensors.torch import save_file

    wide = (".linear_attn.A_log", ".linear_attn.norm.weight")
    folder, _ = models("qwen3_5-text")
    source = {key: t if key.endswith(wide) else t.bfloat16() for key, t in tensors(folder).items()}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text((folder / "config.json").read_text())
    save_file(source, tmp_path / "hf" / "model.safetensors")
    import_ckpt(tmp_path / "hf", tmp_path / "megatron")
    bridge = AutoBridge.from_hf_pretrained(tmp_path / "hf")
    layout = {"tp": 2, "bf16": True, "params_dtype": torch.bfloat16}
    iteration = str(tmp_path / "megatron" / "iter_0000000")
    results = rank_pool.run(load_and_run, bridge.fields, layout, iteration, TOKENS, ranks=[0, 1])
    plan = bridge.plan(ParallelLayout(tp=2))
    for rank, (params, _, _) in enumerate(results):
        shards = {shard.param: shard for shard in plan.local_shards(rank)}
        for (_, name), held in params.items():
            shard = shards[name.replace("mtp_model_layer", "transformer_layer")]
            wanted = cut(shard, source, plan.entry(shard.entry).shift)
            assert held.dtype == torch.bfloat16
            assert torch.equal(held, wanted.bfloat16()), name


@pytest.mark.parametrize(
    ("name", "saved_at", "loaded_at"),
    [("qwen3_5_moe-text", {"tp": 2, "ep": 2, "etp": 1}, {"pp": 2}), ("qwen3_5-tied", {"pp": 2}, {"tp": 2, "pp": 2})],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_a_live_model_as_a_megatron_checkpoint(rank_pool, models, tmp_path, name, saved_at, loaded_at):
    folder, _ = models(name)
    sizes = [range(ParallelLayout(**layout).world_size) for layout in (saved_at, loaded_at)]
    rank_pool.run(save, str(folder), saved_at, str(tmp_path / "run"), ignore=(TOWER,), ranks=sizes[0])
    rank_pool.run(load, str(folder), loaded_at, str(tmp_path / "run"), ignore=(TOWER,), ranks=sizes[1])
    AutoBridge.from_hf_pretrained(folder, ignore=[TOWER]).export_ckpt(tmp_path / "run", tmp_path / "hf")
    source, back = tensors(folder), tensors(tmp_path / "hf")
    assert back.keys() == {name for name in source if not name.startswith("model.visual.")}
    assert all(same_bits(back[name], source[name]) for name in back)


@pytest.mark.parametrize(("spec", "words"), [("host", "no error"), ("local", "Transformer Engine's modules only")])
def test_what_mcore_cannot_build_is_said_and_the_rest_needs_no_global_state(rank_pool, models, spec, words):
    folder, _ = models("qwen3_5-text")
    (text,) = rank_pool.run(build_without_global_state, str(folder), spec, ranks=[0])
    assert words in text


def test_a_version_without_the_modules_is_refused(models):
    fields = AutoBridge.from_hf_pretrained(models("qwen3_5_moe-text")[0]).fields
    with pytest.raises(ConfigError, match=r"attention_output_gate[\s\S]*megatron-core 0.19"):
        _check_version(fields, {"num_layers", "mtp_num_layers", "layernorm_zero_centered_gamma"})
    _check_version({"num_layers": 4, "attention_output_gate": False}, {"num_layers"})


def cut(shard, hf, shift):
    """What the plan says a parameter holds, cut out of the HF tensors."""
    local = torch.zeros(shard.shape)
    for piece in shard.pieces:
        source, target = piece.source, piece.target
        values = hf[source.tensor].flatten().as_strided(piece.shape, source.strides, source.offset)
        local.as_strided(piece.shape, target.strides, target.offset).copy_(values + shift if shift else values)
    return local
