"""Adapters on what some families have and others not: recurrent layers, packed experts, prediction layers, ties."""

import json

import pytest

pytest.importorskip("megatron.core")
torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip(
    "megatron.core.ssm.gated_delta_net.common", reason="megatron-core before 0.19 has no gated delta nets of this form"
)

import family_jobs  # noqa: E402 - after the skips
from hf_cases import LORA, peft_logits, tensors, tokens, whole  # noqa: E402

from bridge_core.errors import CoverageError  # noqa: E402
from bridge_core.testing.hf_layouts import save_published  # noqa: E402
from bridge_core.testing.hf_models import HYBRIDS, make_model  # noqa: E402
from bridge_peft import export_adapter_ckpt, import_adapter_ckpt, merge_hf  # noqa: E402

# What a model that sees has: a rotary embedding for three positions, as the published ones.
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
ROTARY |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
TOWER = ("model.visual.*",)
PEFT = ("peft", "peft-target-parameters")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models as their publishers save them; "+mtp" for one with a prediction layer."""
    made = {}

    def make(name):
        if name not in made:
            kind, _, mtp = name.partition("+")
            changes = {}
            if kind.startswith("qwen3_5") and "text_config" in HYBRIDS[kind][1]:
                changes = {"text_config": HYBRIDS[kind][1]["text_config"] | {"rope_parameters": ROTARY}}
            made[name] = save_published(
                make_model(kind, **changes), tmp_path_factory.mktemp("hf") / "hf", mtp=bool(mtp)
            )
        return made[name]

    return make


def run_export(rank_pool, path, layout, lora, outs, ranks, **options):
    ignore = TOWER if "vision_config" in json.loads((path / "config.json").read_text()) else ()
    outs = {target: str(out) for target, out in outs.items()}
    return rank_pool.run(
        family_jobs.export, str(path), layout, LORA | lora, outs, ranks=range(ranks), ignore=ignore, **options
    )


@pytest.mark.parametrize(
    ("name", "layout", "ranks", "lora"),
    [
        ("qwen3_5-text", {}, 1, {}),
        ("qwen3_5-text", {"tp": 2}, 2, {"exclude_modules": ["in_proj"]}),
        ("qwen3_5_moe", {"ep": 2, "dp": 2}, 2, {}),
        ("qwen3_vl_moe", {"tp": 2, "etp": 2}, 2, {}),
        ("mixtral", {"tp": 2, "ep": 2, "etp": 1}, 2, {}),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_peft_computes_the_same_logits(rank_pool, models, tmp_path, name, layout, ranks, lora):
    """Segments of delta nets, experts that lie on disk in one tensor (turned or not) or under w1, w2, w3."""
    path = models(name)
    outs = {target: tmp_path / target for target in PEFT}
    answers = run_export(rank_pool, path, layout, lora, outs, ranks, run=str(tmp_path / "run"), tokens=tokens())
    ours = whole(answers)
    for target, out in outs.items():
        torch.testing.assert_close(peft_logits(path, out), ours, rtol=1e-5, atol=1e-5)
        export_adapter_ckpt(tmp_path / "run", tmp_path / "offline" / target, target=target)
        file = "adapter_model.safetensors"
        assert (tmp_path / "offline" / target / file).read_bytes() == (out / file).read_bytes()
    import_adapter_ckpt(outs["peft-target-parameters"], tmp_path / "imported", path)
    export_adapter_ckpt(tmp_path / "imported", tmp_path / "back", target="peft-target-parameters")
    assert_same_tensors(tmp_path / "back", outs["peft-target-parameters"])


def assert_same_tensors(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("name", "layer"), [("qwen3_5-text", "self_attention.in_proj"), ("nemotron_h", "mixer.in_proj")]
)
def test_a_projection_of_segments_is_refused_on_two_ranks(rank_pool, models, name, layer):
    lora = LORA | {"target_modules": ["in_proj"]}
    answers = rank_pool.run(family_jobs.refused, str(models(name)), {"tp": 2}, lora, ranks=[0, 1])
    for text, same in answers:
        assert f"decoder.layers.0.{layer}" in text
        assert 'exclude_modules=["*in_proj"]' in text
        assert same


@pytest.mark.parametrize("name", ["deepseek_v3+mtp", "qwen3_5-text+mtp", "nemotron_h+mtp"])
def test_prediction_layers(rank_pool, models, tmp_path, name):
    """Live, offline, imported and back: the same bytes. PEFT, which would drop them, is not given any."""
    path = models(name)
    outs = {"vllm": tmp_path / "vllm", "peft": tmp_path / "peft"}
    (answer,) = run_export(rank_pool, path, {}, {}, outs, 1, run=str(tmp_path / "run"))
    assert "mtp.layers.0.eh_proj" in answer["names"]
    assert not any("transformer_layer" in name and "mtp_model_layer" in name for name in answer["names"])
    assert 'exclude_adapter_base_prefix=["mtp."]' in answer["peft"]
    assert not outs["peft"].exists()
    export_adapter_ckpt(tmp_path / "run", tmp_path / "offline", target="vllm")
    import_adapter_ckpt(outs["vllm"], tmp_path / "imported", path)
    export_adapter_ckpt(tmp_path / "imported", tmp_path / "back", target="vllm")
    for folder in ("offline", "back"):
        assert_same_tensors(tmp_path / folder, outs["vllm"])


def test_without_its_prediction_layers_peft_computes_the_same(rank_pool, models, tmp_path):
    path = models("qwen3_5-text+mtp")
    outs = {"peft": tmp_path / "peft"}
    answers = run_export(rank_pool, path, {}, {}, outs, 1, tokens=tokens(), exclude=("mtp.",))
    torch.testing.assert_close(peft_logits(path, outs["peft"]), whole(answers), rtol=1e-5, atol=1e-5)


def test_an_adapter_on_a_tied_output_layer(rank_pool, models, tmp_path):
    """It trains and goes to PEFT; there is no weight of its own to fold it into."""
    path = models("llama-tied")
    lora = {"target_modules": ["linear_qkv", "output_layer"]}
    outs = {"peft": tmp_path / "peft"}
    answers = run_export(rank_pool, path, {"tp": 2}, lora, outs, 2, run=str(tmp_path / "run"), tokens=tokens())
    assert "peft" not in answers[0], answers[0]["peft"]
    torch.testing.assert_close(peft_logits(path, outs["peft"]), whole(answers), rtol=1e-5, atol=1e-5)
    for text in rank_pool.run(family_jobs.merge, str(path), LORA | lora, ranks=[0])[0]:
        assert "output_layer" in text
        assert "untie" in text
    with pytest.raises(CoverageError, match=r"lm_head\.weight"):
        merge_hf(path, outs["peft"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_is_where_the_model_is(rank_pool, models):
    """Also where the layer has no weight that would say so. The meta device stands in for a GPU."""
    lora = {"target_modules": ["linear_qkv", "output_layer"]}
    (found,) = rank_pool.run(family_jobs.devices, str(models("llama-tied")), LORA | lora, ranks=[0])
    assert {f"output_layer.adapter.default.{factor}" for factor in ("lora_A", "lora_B")} <= set(found)
    assert set(found.values()) == {"meta"}
