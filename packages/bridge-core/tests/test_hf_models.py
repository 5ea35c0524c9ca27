"""The small models that other tests convert are what they claim: real, distinct, and saved as their publishers save."""

from __future__ import annotations

import pytest
from inventory import inventory, is_mtp

from bridge_core.testing.hf_layouts import disk_tensors, save_published
from bridge_core.testing.hf_models import HYBRIDS, make_model, save_model

torch = pytest.importorskip("torch", reason="the models are transformers'")
transformers = pytest.importorskip("transformers", reason="the models are transformers'")
safetensors = pytest.importorskip("safetensors", reason="the models are transformers'")

TOKENS = torch.tensor([[3, 1, 4, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]])
WITHOUT_MTP = ("qwen3_vl", "qwen3_vl_moe")


@pytest.fixture(scope="module", params=HYBRIDS)
def saved(request, tmp_path_factory):
    """Name, model, and the folder with its publisher's layout."""
    model = make_model(request.param)
    return request.param, model, save_published(model, tmp_path_factory.mktemp("hf"))


def header(folder):
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_a_model_computes_the_same_from_either_layout(saved, tmp_path):
    _, model, folder = saved
    expected = logits(model)
    assert expected.isfinite().all()
    assert expected.std() > 0.01
    for path in (folder, save_model(model, tmp_path / "transformers")):
        again = type(model).from_pretrained(path, dtype=torch.float32).eval()
        assert torch.equal(logits(again), expected)


def test_the_published_layout_is_the_inventory_of_its_configuration(saved):
    name, model, folder = saved
    config, _ = model.config_class.get_config_dict(folder)  # transformers has a notation of its own for infinity
    expected = {key: shape for key, (shape, _) in inventory(config).items()}
    assert header(folder) == expected
    assert any(is_mtp(key, config) for key in expected) == (not name.startswith(WITHOUT_MTP))


def test_without_prediction_layers_the_layout_is_the_models_own(saved, tmp_path):
    name, model, _ = saved
    own = header(save_published(model, tmp_path / "hf", mtp=False))
    assert own.keys() == disk_tensors(model).keys()
    theirs = header(save_model(model, tmp_path / "transformers"))
    assert (own == theirs) == (name not in ("qwen3_5_moe", "qwen3_vl_moe"))  # published otherwise


def test_every_weight_is_its_own(saved):
    """No norm, bias or state-space parameter is left as it was created."""
    _, model, _ = saved
    for name, tensor in disk_tensors(model).items():
        assert tensor.numel() == tensor.unique().numel(), name


def test_transformers_takes_the_prediction_layer_of_deepseek(tmp_path, monkeypatch):
    """transformers' own model of prediction layers finds all its weights in the file."""
    from transformers.modeling_layers import MtpModel

    folder = save_published(make_model("deepseek_v3"), tmp_path / "hf")
    main = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # transformers tells prediction layers by their number in the published model, 61.
    monkeypatch.setattr(main, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.4\..*"])
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        layer = MtpModel.from_pretrained(main).layers[0]
        prefix = "model.layers.4."
        assert torch.equal(layer.eh_proj.weight, file.get_tensor(prefix + "eh_proj.weight"))
        assert torch.equal(layer.post_norm.weight, file.get_tensor(prefix + "shared_head.norm.weight"))
        o_proj = layer.mtp_block.self_attn.o_proj.weight
        assert torch.equal(o_proj, file.get_tensor(prefix + "self_attn.o_proj.weight"))
        down = torch.stack([file.get_tensor(f"{prefix}mlp.experts.{e}.down_proj.weight") for e in range(8)])
        assert torch.equal(layer.mtp_block.mlp.experts.down_proj, down)
