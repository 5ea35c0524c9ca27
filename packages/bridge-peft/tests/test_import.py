"""PEFT's adapters on Megatron models: live and through checkpoints, and back to the bit."""

import json
import shutil

import pytest

pytest.importorskip("megatron.core")
torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from convert_jobs import load, load_checkpoint, save_checkpoint  # noqa: E402 - after the skips
from hf_cases import LORA, peft_adapter, peft_logits, tensors, tokens, whole  # noqa: E402

from bridge_core.testing.hf_models import make_model, save_model  # noqa: E402
from bridge_peft import export_adapter_ckpt, import_adapter_ckpt, merge_hf  # noqa: E402

LAYOUTS = {
    "1": ({}, 1),
    "tp2": ({"tp": 2}, 2),
    "pp2-vpp2": ({"pp": 2, "vpp": 2}, 2),
    "tp2-ep2": ({"tp": 2, "dp": 2, "ep": 2, "etp": 1}, 4),
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = ALL[:4]
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Adapters as PEFT makes them: every module has an A of its own, so fused layers get ranks side by side.
ADAPTERS = {
    "all": ("qwen3", {"target_modules": ALL}),
    "q and v": ("qwen3", {"target_modules": ["q_proj", "v_proj"]}),
    "up alone": ("qwen3", {"target_modules": ["up_proj"]}),
    "dora": ("qwen3", {"target_modules": ALL, "use_dora": True}),
    "rslora": ("qwen3", {"target_modules": ALL, "use_rslora": True}),
    "one layer": ("qwen3", {"target_modules": ALL, "layers_to_transform": [2]}),
    "patterns": (
        "qwen3",
        {"target_modules": ALL, "rank_pattern": {"q_proj": 2, "up_proj": 6}, "alpha_pattern": {"v_proj": 4}},
    ),
    "experts": ("qwen3_moe", {"target_modules": ATTENTION, "target_parameters": PARAMETERS}),
    "down alone": ("qwen3_moe", {"target_modules": ["o_proj"], "target_parameters": PARAMETERS[1:]}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models, by name."""
    return {
        name: save_model(make_model(name), tmp_path_factory.mktemp(name)) for name in ("qwen3", "qwen3_moe", "llama")
    }


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory):
    """Model and folder of PEFT's adapters, by name."""
    made = {}

    def make(name):
        if name not in made:
            model, options = ADAPTERS[name]
            made[name] = models[model], peft_adapter(models[model], tmp_path_factory.mktemp("adapter"), **options)
        return made[name]

    return make


@pytest.mark.parametrize("canonical", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_megatron_computes_what_peft_does(rank_pool, adapters, name, canonical):
    path, adapter = adapters(name)
    sizes, ranks = LAYOUTS["tp2-ep2" if "qwen3_moe" in str(path) else "tp2"]
    answers = rank_pool.run(
        load, str(path), str(adapter), sizes, tokens(), canonical=canonical, ranks=range(ranks), timeout_s=120
    )
    torch.testing.assert_close(whole(answers), peft_logits(path, adapter), rtol=0, atol=1e-5)
    if name == "all":
        r = answers[0]["ranks"]["decoder.layers.0.self_attention.linear_qkv"]
        assert r == (4 if canonical else 12)


def equal_as(source, out, *, kinds):
    """Give modules of a kind the A of the first of them, as fused layers have it."""
    shutil.copytree(source, out)
    held = tensors(source)
    for name in list(held):
        for kind, first in kinds.items():
            if f".{kind}.lora_A" in name:
                held[name] = held[name.replace(f".{kind}.", f".{first}.")].clone()
    from safetensors.torch import save_file

    save_file(held, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(
    ("name", "layout"),
    [("all", "1"), ("all", "tp2"), ("all", "pp2-vpp2"), ("rslora", "tp2"), ("experts", "1"), ("experts", "tp2-ep2")],
)
def test_a_round_trip_is_equal_to_the_bit(rank_pool, adapters, tmp_path, name, layout):
    path, made = adapters(name)
    kinds = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    source = equal_as(made, tmp_path / "source", kinds=kinds)
    sizes, ranks = LAYOUTS[layout]
    out = tmp_path / "back"
    target = "peft-target-parameters"
    rank_pool.run(load, str(path), str(source), sizes, tokens(), str(out), target, ranks=range(ranks), timeout_s=120)
    checkpoint = tmp_path / "megatron"
    import_adapter_ckpt(source, checkpoint, path)
    export_adapter_ckpt(checkpoint, tmp_path / "offline", target=target)
    wanted = tensors(source)
    for folder in (tmp_path / "offline", out):
        found = tensors(folder)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
        config = json.loads((folder / "adapter_config.json").read_text())
        for field in ("r", "lora_alpha", "use_rslora", "use_dora"):
            assert config[field] == json.loads((source / "adapter_config.json").read_text())[field]


@pytest.mark.parametrize(
    ("name", "lora", "saved", "loaded"),
    [
        ("qwen3", {}, "tp2", "pp2-vpp2"),
        ("qwen3", {"use_dora": True}, "pp2-vpp2", "tp2"),
        ("qwen3", {"variant": "canonical", "layers_to_transform": [0, 3]}, "tp2", "1"),
        ("qwen3_moe", {}, "tp2-ep2", "1"),
        ("qwen3_moe", {"expert_adapters": "shared_outer"}, "tp2-ep2", "tp2"),
        ("qwen3_moe", {"expert_adapters": "shared"}, "1", "tp2-ep2"),
    ],
)
def test_checkpoints_of_live_models_convert_offline(rank_pool, models, tmp_path, name, lora, saved, loaded):
    lora = LORA | lora
    (sizes, ranks), (other, others) = LAYOUTS[saved], LAYOUTS[loaded]
    path = str(models[name])
    folder = tmp_path / "run"
    rank_pool.run(save_checkpoint, path, sizes, lora, str(folder), ranks=range(ranks), timeout_s=120)
    report = export_adapter_ckpt(folder, tmp_path / "hf")
    assert report.layers > 0
    answers = rank_pool.run(
        load_checkpoint, path, str(folder), other, lora, tokens(), ranks=range(others), timeout_s=120
    )
    torch.testing.assert_close(peft_logits(path, tmp_path / "hf"), whole(answers), rtol=0, atol=1e-5)


def test_an_imported_checkpoint_loads_into_mcore(rank_pool, adapters, models, tmp_path):
    path, adapter = adapters("experts")
    import_adapter_ckpt(adapter, tmp_path / "run", path)
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"linear_qkv": 12}, "alpha_pattern": {"linear_qkv": 24}}
    sizes, ranks = LAYOUTS["tp2-ep2"]
    answers = rank_pool.run(
        load_checkpoint, str(path), str(tmp_path / "run"), sizes, config, tokens(), ranks=range(ranks), timeout_s=120
    )
    torch.testing.assert_close(whole(answers), peft_logits(path, adapter), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["all", "dora", "experts"])
def test_merging_folders_equals_merge_and_unload(adapters, tmp_path, name):
    from hf_cases import base
    from peft import PeftModel

    path, adapter = adapters(name)
    merge_hf(path, adapter, tmp_path / "merged")
    ours = base(tmp_path / "merged").state_dict()
    theirs = PeftModel.from_pretrained(base(path), str(adapter)).merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-6)
