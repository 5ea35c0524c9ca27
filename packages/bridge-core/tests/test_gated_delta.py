"""Qwen3-Next and Qwen3.5: what is on disk, in every layout in which it is published, and back again to the bit."""

from __future__ import annotations

import json

import pytest
from inventory import PUBLISHED

from bridge_core import AutoBridge, ParallelLayout, export_ckpt, import_ckpt, verify
from bridge_core.checkpoint.convert import Options
from bridge_core.checkpoint.hf_folder import open_hf
from bridge_core.checkpoint.run_config import SECTION
from bridge_core.errors import ConfigError, CoverageError, LayoutError
from bridge_core.testing.hf_layouts import save_published
from bridge_core.testing.hf_models import make_model, save_model

torch = pytest.importorskip("torch", reason="the oracle is transformers")
pytest.importorskip("transformers", reason="the oracle is transformers")

MODELS = [
    "qwen3_next",
    "qwen3_next-mixed",
    "qwen3_5-text",
    "qwen3_5",
    "qwen3_5-tied",
    "qwen3_5_moe-text",
    "qwen3_5_moe",
]
MTP_TENSORS = {"qwen3_next": 3 * 8 + 17, "qwen3_5": 15, "qwen3_5_moe": 3 * 8 + 17}  # 8 experts


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of each model, by its name and who saved it."""
    made = {}

    def save(name, by):
        if (name, by) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{by}") / "hf"
            model = make_model(name)
            if by == "transformers":
                save_model(model, folder, max_shard_size="200KB")
            else:
                save_published(model, folder, mtp=by == "publisher")
            made[name, by] = folder
        return made[name, by]

    return save


@pytest.mark.parametrize("by", ["transformers", "publisher", "publisher-without-mtp"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(saved, tmp_path, name, by):
    folder = saved(name, by)
    report = import_ckpt(folder, tmp_path / "megatron")
    assert not report.ignored
    export_ckpt(tmp_path / "megatron", tmp_path / "like", source=folder)
    for file in folder.glob("*.safetensors*"):
        assert (tmp_path / "like" / file.name).read_bytes() == file.read_bytes(), file.name
    # Without the source its forms are known from the import.
    export_ckpt(tmp_path / "megatron", tmp_path / "alone")
    verify(folder, tmp_path / "alone").raise_if_different()
    assert set(open_hf(folder).tensors) == set(open_hf(tmp_path / "alone").tensors)
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "like"))
    assert after == before | {"dtype": "float32"}


@pytest.mark.parametrize("name", MTP_TENSORS)
def test_prediction_layers_can_be_left_out(saved, tmp_path, name):
    folder = saved(name, "publisher")
    mtp = {key for key in open_hf(folder).tensors if key.startswith("mtp.")}
    assert len(mtp) == MTP_TENSORS[name]
    report = import_ckpt(folder, tmp_path / "megatron", ignore=["mtp.*"])
    assert set(report.ignored) == mtp
    export_ckpt(tmp_path / "megatron", tmp_path / "hf")
    assert set(open_hf(tmp_path / "hf").tensors) == set(open_hf(folder).tensors) - mtp
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert not config.get("text_config", config).get("mtp_num_hidden_layers")


def rewrite(folder, target, change):
    """A copy of a published folder with other tensors."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    return target


WIDE = (".linear_attn.A_log", ".linear_attn.norm.weight")


def test_decay_and_norm_stay_wide_beside_bfloat16(saved, tmp_path):
    """As Qwen3.5 was published; a dtype that is asked for is for the others."""
    folder = rewrite(
        saved("qwen3_5-text", "publisher"),
        tmp_path / "hf",
        lambda tensors: {k: t if k.endswith(WIDE) else t.bfloat16() for k, t in tensors.items()},
    )
    import_ckpt(folder, tmp_path / "megatron")
    export_ckpt(tmp_path / "megatron", tmp_path / "back")
    verify(folder, tmp_path / "back").raise_if_different()
    export_ckpt(tmp_path / "megatron", tmp_path / "half", options=Options(dtype="float16"))
    for name, tensor in open_hf(tmp_path / "half").tensors.items():
        assert tensor.dtype == ("F32" if name.endswith(WIDE) else "F16"), name
    planned = AutoBridge.from_hf_config(json.loads((folder / "config.json").read_text())).plan().metadata()
    assert {meta.name for meta in planned if meta.dtype == "F32"} == {
        name for name in open_hf(folder).tensors if name.endswith(WIDE)
    }


@pytest.mark.parametrize("wide", [(".linear_attn.A_log",), (".norm.weight", "layernorm.weight"), (".q_norm.weight",)])
def test_a_shifted_norm_keeps_its_dtype_whatever_the_others_have(saved, tmp_path, wide):
    folder = rewrite(
        saved("qwen3_next", "publisher"),
        tmp_path / "hf",
        lambda tensors: {k: t if k.endswith(wide) else t.bfloat16() for k, t in tensors.items()},
    )
    import_ckpt(folder, tmp_path / "megatron")
    export_ckpt(tmp_path / "megatron", tmp_path / "back")
    verify(folder, tmp_path / "back").raise_if_different()


@pytest.mark.parametrize("by", ["transformers", "publisher"])
def test_forms_of_a_checkpoint_without_a_record_are_those_it_is_compared_with(saved, tmp_path, by):
    folder = saved("qwen3_next", by)
    import_ckpt(folder, tmp_path / "megatron")
    (path,) = (tmp_path / "megatron").glob("iter_*/run_config.yaml")
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != SECTION}))
    verify(folder, tmp_path / "megatron").raise_if_different()


def test_costs_count_wide_tensors_as_wide():
    plan = AutoBridge.from_hf_config(PUBLISHED["qwen3.5-27b"]).plan()
    assert any(meta.dtype == "F32" for meta in plan.metadata())
    assert plan.cost(0).nbytes == sum(meta.nbytes for meta in plan.metadata())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_that_is_far_from_one_comes_back_in_half_precision(saved, tmp_path, dtype):
    """Its distance from one has more digits than it has itself."""

    def halve(tensors):
        norms = [key for key in tensors if key.endswith(".linear_attn.norm.weight")]
        size = tensors[norms[0]].numel()
        signs = torch.tensor([1.0, -1.0]).repeat(len(norms) * size // 2)
        values = torch.logspace(-9, 6, len(norms) * size, base=2) * signs
        far = dict(zip(norms, values.split(size), strict=True))
        return {key: far.get(key, tensor).to(dtype) for key, tensor in tensors.items()}

    folder = rewrite(saved("qwen3_next", "publisher"), tmp_path / "hf", halve)
    import_ckpt(folder, tmp_path / "megatron")
    export_ckpt(tmp_path / "megatron", tmp_path / "back", source=folder)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    verify(folder, tmp_path / "megatron").raise_if_different()


@pytest.mark.parametrize("name", ["qwen3_5_moe-text", "qwen3_5_moe"])
def test_packed_experts_of_the_prediction_layer(saved, tmp_path, name):
    """As Qwen3.6 has them."""

    def pack(tensors):
        stem, packed = "mtp.layers.0.mlp.experts", dict(tensors)
        gate, up, down = ([packed.pop(f"{stem}.{e}.{p}_proj.weight") for e in range(8)] for p in ("gate", "up", "down"))
        packed[f"{stem}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        packed[f"{stem}.down_proj"] = torch.stack(down)
        return packed

    folder = rewrite(saved(name, "publisher"), tmp_path / "hf", pack)
    assert sum(key.startswith("mtp.") for key in open_hf(folder).tensors) == 19
    import_ckpt(folder, tmp_path / "megatron")
    import_ckpt(saved(name, "publisher"), tmp_path / "other")
    export_ckpt(tmp_path / "megatron", tmp_path / "back", source=folder)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    # What Megatron gets is the same from either form: written in the other one, it is the other's files.
    export_ckpt(tmp_path / "other", tmp_path / "unpacked", source=folder)
    verify(folder, tmp_path / "unpacked").raise_if_different()


@pytest.mark.parametrize("name", ["qwen3_5-text", "qwen3_5_moe-text"])
def test_a_language_model_may_have_the_names_of_one_that_sees(saved, tmp_path, name):
    def move(tensors):
        return {key.replace("model.", "model.language_model.", 1): tensor for key, tensor in tensors.items()}

    folder = rewrite(saved(name, "publisher"), tmp_path / "hf", move)
    import_ckpt(folder, tmp_path / "megatron")
    export_ckpt(tmp_path / "megatron", tmp_path / "back")
    verify(folder, tmp_path / "back").raise_if_different()


@pytest.mark.parametrize(
    ("name", "lost", "words"),
    [
        ("qwen3_next", "mtp.layers.0.mlp.experts.3.up_proj.weight", "experts.3.up_proj"),
        ("qwen3_next", "mtp.norm.weight", "mtp.norm"),
        ("qwen3_5", "model.visual.merger.norm.bias", "merger.norm.bias"),
        ("qwen3_5_moe", "model.language_model.layers.1.mlp.experts.down_proj", "experts.down_proj"),
        ("qwen3_5_moe", "mtp.", "mtp."),  # all of them, which the configuration announces
    ],
)
def test_a_tensor_that_is_missing_is_named(saved, tmp_path, name, lost, words):
    folder = rewrite(
        saved(name, "publisher"),
        tmp_path / "hf",
        lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.startswith(lost)},
    )
    with pytest.raises(CoverageError, match=words):
        import_ckpt(folder, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen3_next", {"layer_types": ["linear_attention"] * 4}, "full_attention"),
        ("qwen3_next", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "sliding_attention"),
        ("qwen3_next", {"full_attention_interval": 3}, "full_attention_interval=3"),
        ("qwen3_next", {"partial_rotary_factor": 0.5}, "0.25, 0.5"),
        ("qwen3_5-text", {"mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers"),
        ("qwen3_5-text", {"attn_output_gate": False}, "attn_output_gate"),
        ("qwen3_5-text", {"brand_new_option": 3}, "brand_new_option=3"),
        ("qwen3_5-text", {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 1, 0]}}, "mrope_interleaved"),
        ("qwen3_5_moe-text", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    ],
)
def test_an_option_that_cannot_be_translated_is_named(saved, name, changes, words):
    config = json.loads((saved(name, "publisher") / "config.json").read_text()) | changes
    with pytest.raises(ConfigError, match=words):
        AutoBridge.from_hf_config(config)


def test_heads_of_delta_nets_divide_over_context_ranks_too(saved):
    bridge = AutoBridge.from_hf_pretrained(saved("qwen3_5-text", "publisher"))  # 4 key heads
    bridge.plan(ParallelLayout(tp=2, cp=2))
    with pytest.raises(LayoutError, match=r"linear_num_key_heads[\s\S]*tp\*cp=8"):
        bridge.plan(ParallelLayout(tp=4, cp=2))
