"""HF -> MIMO torch_dist -> HF without a model, to the bit; and what is refused before anything is written."""

from __future__ import annotations

import json
import shutil

import llava_family
import pytest

from bridge_core.checkpoint.dcp import read_dcp
from bridge_core.checkpoint.hf_folder import open_hf
from bridge_core.errors import CheckpointError, ConfigError, CoverageError, LayoutError, OutputError
from bridge_mimo import ComponentLayout as C
from bridge_mimo import MegatronMIMOBridge
from bridge_mimo.checkpoint.convert import export_ckpt, import_ckpt, verify
from bridge_mimo.checkpoint.stored import stored_components

pytest.importorskip("torch", reason="tiny models are transformers'")
pytest.importorskip("transformers", reason="tiny models are transformers'")

FAMILIES = ["qwen3_5", "qwen3_5-tied", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"]
TOWER = "modality_submodules.images.encoders.qwen_visual."
TWO = {"language": C(tp=2), "images": C(tp=2)}


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """HF folders of tiny models as their publishers save them, prediction layers included; made once."""
    from bridge_core.testing.hf_layouts import save_published
    from bridge_core.testing.hf_models import make_model

    root, made = tmp_path_factory.mktemp("published"), {}

    def make(name):
        if name not in made:
            made[name] = save_published(make_model(name), root / name)
            (made[name] / "tokenizer.json").write_text('{"a": 1}', encoding="utf-8")
        return made[name]

    return make


def keys_of(folder):
    return {*read_dcp(folder / "iter_0000000").tensors}


def same_files(a, b):
    names = {file.name for file in a.iterdir()}
    assert names == {file.name for file in b.iterdir()}
    for name in names - {"config.json"}:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    first, second = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (a, b))
    assert first | {"dtype": second["dtype"]} == second  # said anew where it was not


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_to_the_bit(published, tmp_path, name):
    hf = published(name)
    bridge = MegatronMIMOBridge.from_hf_pretrained(hf, parallelism=TWO)
    imported = bridge.import_ckpt(hf, tmp_path / "megatron", parallelism=TWO)
    exported = bridge.export_ckpt(tmp_path / "megatron", tmp_path / "hf")
    assert not exported.from_source
    assert imported.tensors == exported.tensors == len(open_hf(hf).tensors)
    same_files(hf, tmp_path / "hf")
    assert verify(hf, tmp_path / "megatron").ok
    # Alone, without the folder that it came from, a checkpoint gives the same tensors.
    export_ckpt(tmp_path / "megatron", tmp_path / "alone")
    assert verify(hf, tmp_path / "alone").ok


def test_keys_are_those_of_mimo_model(published, tmp_path):
    import_ckpt(published("qwen3_vl"), tmp_path / "m")
    keys = keys_of(tmp_path / "m")
    assert all(key.startswith(("language_model.", TOWER)) for key in keys)
    # The layers of both components are alike, so both are stacked.
    assert "language_model.decoder.layers.self_attention.linear_qkv.weight" in keys
    assert f"{TOWER}decoder.layers.self_attention.linear_qkv.weight" in keys
    assert f"{TOWER}deepstack_merger_list.1.linear_fc1.weight" in keys
    tensors = read_dcp(tmp_path / "m" / "iter_0000000").tensors
    assert tensors[f"{TOWER}decoder.layers.mlp.linear_fc1.weight"].shape[0] == 3
    import_ckpt(published("qwen3_5"), tmp_path / "delta")
    keys = keys_of(tmp_path / "delta")
    assert "language_model.decoder.layers.0.self_attention.in_proj.weight.query" in keys
    assert "language_model.mtp.layers.0.eh_proj.weight" in keys


def test_the_transposed_and_the_straight_form_of_experts(published, tmp_path):
    """transformers writes experts the other way round than they are published; which it was is remembered."""
    from bridge_core.testing.hf_models import make_model, save_model

    straight = save_model(make_model("qwen3_vl_moe"), tmp_path / "straight")
    import_ckpt(straight, tmp_path / "m")
    export_ckpt(tmp_path / "m", tmp_path / "back")
    assert verify(straight, tmp_path / "back").ok
    assert verify(published("qwen3_vl_moe"), tmp_path / "back").counts


def test_what_rebuilds_the_model_is_stored_as_data(published, tmp_path):
    hf = published("qwen3_5_moe")
    given = {"images": C(tp=2), "language": C(tp=2, ep=4, etp=1)}
    import_ckpt(hf, tmp_path / "m", parallelism=given, world_size=8)
    stored = stored_components(tmp_path / "m" / "iter_0000000")
    bridge = MegatronMIMOBridge.from_hf_pretrained(hf, parallelism=given, world_size=8)
    assert stored is not None
    assert stored.layouts == bridge.layouts
    assert stored.routes == bridge.routes
    assert not stored.colocated
    import_ckpt(hf, tmp_path / "n")
    assert stored_components(tmp_path / "n" / "iter_0000000").layouts == {}


def test_weights_do_not_depend_on_layouts(published, tmp_path):
    hf = published("qwen3_vl")
    import_ckpt(hf, tmp_path / "one", parallelism={"language": C(tp=4), "images": C()})
    import_ckpt(hf, tmp_path / "two", parallelism={"images": C(pp=3), "language": C(pp=2)})
    names = sorted(file.name for file in (tmp_path / "one" / "iter_0000000").glob("*.distcp"))
    assert names
    for name in (*names, ".metadata"):
        one, two = ((tmp_path / folder / "iter_0000000" / name).read_bytes() for folder in ("one", "two"))
        assert one == two


def test_a_cast_goes_for_carried_tensors_too(published, tmp_path):
    hf = published("qwen3_5")
    MegatronMIMOBridge.import_ckpt(hf, tmp_path / "m", dtype="bf16")
    export_ckpt(tmp_path / "m", tmp_path / "back")
    tensors = open_hf(tmp_path / "back").tensors
    assert {tensor.dtype for name, tensor in tensors.items() if name.startswith("mtp.")} == {"BF16"}


# --- Prediction layers ------------------------------------------------------------------------------


def test_prediction_layers_left_out_when_asked(published, tmp_path):
    hf = published("qwen3_5")
    report = import_ckpt(hf, tmp_path / "m", ignore=["mtp.*"])
    assert len(report.ignored) == 15
    assert not [key for key in keys_of(tmp_path / "m") if ".mtp." in key]
    export_ckpt(tmp_path / "m", tmp_path / "back")
    back = open_hf(tmp_path / "back")
    assert not [name for name in back.tensors if name.startswith("mtp.")]
    assert back.config["text_config"]["mtp_num_hidden_layers"] in (0, None)


@pytest.fixture
def trained(published, tmp_path):
    """A checkpoint as a run leaves it: `MimoModel` has no prediction layers, and saves none."""
    without = tmp_path / "trained"
    import_ckpt(published("qwen3_5"), without, ignore=["mtp.*"])
    path = without / "iter_0000000" / "run_config.yaml"
    said = json.loads(path.read_text(encoding="utf-8"))
    said["bridge_core"] |= {"ignore": []}
    said["bridge_core"]["megatron"]["mtp_num_layers"] = 1
    path.write_text(json.dumps(said), encoding="utf-8")
    return without


def test_prediction_layers_come_from_the_source_of_a_run(published, tmp_path, trained):
    hf = published("qwen3_5")
    report = export_ckpt(trained, tmp_path / "back", source=hf)
    assert len(report.from_source) == 15
    assert all(name.startswith("mtp.") for name in report.from_source)
    same_files(hf, tmp_path / "back")


def test_prediction_layers_that_nobody_has(tmp_path, trained):
    with pytest.raises(CoverageError, match="belong to the model") as caught:
        export_ckpt(trained, tmp_path / "back")
    assert "--source" in caught.value.fix
    assert not (tmp_path / "back").exists()
    export_ckpt(trained, tmp_path / "back", ignore=["mtp.*"])
    assert not [name for name in open_hf(tmp_path / "back").tensors if name.startswith("mtp.")]


# --- A third party's model --------------------------------------------------------------------------


def test_a_registered_model_goes_there_and_back(tmp_path, monkeypatch):
    """LLaVA: CLIP, a projector, Llama. No line of the packages knows it."""
    from bridge_core import families
    from bridge_core.testing.hf_models import save_model
    from bridge_mimo import components

    monkeypatch.setattr(families, "_REGISTERED", {})
    monkeypatch.setattr(components, "_BUILDERS", {})
    llava_family.register()
    hf = save_model(llava_family.tiny_model(), tmp_path / "hf")
    bridge = MegatronMIMOBridge.from_hf_pretrained(hf, parallelism={"language": C(tp=2, pp=2), "images": C(tp=4)})
    bridge.plan().audit({name: tensor.shape for name, tensor in open_hf(hf).tensors.items()})
    bridge.import_ckpt(hf, tmp_path / "m", parallelism=bridge.layouts)
    assert any(key.startswith("modality_submodules.images.input_projections.0.") for key in keys_of(tmp_path / "m"))
    bridge.export_ckpt(tmp_path / "m", tmp_path / "back")
    assert (hf / "model.safetensors").read_bytes() == (tmp_path / "back" / "model.safetensors").read_bytes()


# --- Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"parallelism": {"language": C(), "audio": C()}}, ConfigError, "other components"),
        ({"parallelism": {"images": C()}}, LayoutError, "language"),
        ({"parallelism": {"language": C(tp=16), "images": C()}}, LayoutError, "component language"),
        (
            {"parallelism": {"language": C(dp=1, rank_offset=0), "images": C(dp=1, rank_offset=0)}},
            LayoutError,
            "overlap",
        ),
        ({"parallelism": {"language": C(dp=1), "images": C(dp=1)}, "world_size": 4}, LayoutError, "no component"),
        ({"ignore": ["*.self_attn.q_proj.weight"]}, CoverageError, "part of a Megatron tensor"),
    ],
)
def test_nothing_is_written_for_wrong_layouts(published, tmp_path, options, error, text):
    with pytest.raises(error, match=text):
        import_ckpt(published("qwen3_5"), tmp_path / "m", **options)
    assert not list(tmp_path.iterdir())


def test_a_plain_megatron_checkpoint_is_not_one_of_components(published, tmp_path):
    from bridge_core import AutoBridge

    AutoBridge.import_ckpt(published("qwen3_5"), tmp_path / "plain")
    with pytest.raises(CoverageError, match=r"language_model\."):
        export_ckpt(tmp_path / "plain", tmp_path / "hf")
    import_ckpt(published("qwen3_5"), tmp_path / "m")
    with pytest.raises(CoverageError, match=r"language_model\."):
        AutoBridge.from_hf_pretrained(published("qwen3_5")).export_ckpt(tmp_path / "m", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_damaged_section(published, tmp_path):
    import_ckpt(published("qwen3_vl"), tmp_path / "m")
    path = tmp_path / "m" / "iter_0000000" / "run_config.yaml"
    said = json.loads(path.read_text(encoding="utf-8"))
    for wrong in ({"routes": [["a"]]}, {"routes": 3}, [], {"routes": [], "components": {"a": {"tp": 0}}}):
        path.write_text(json.dumps(said | {"bridge_mimo": wrong}), encoding="utf-8")
        with pytest.raises(CheckpointError, match="damaged"):
            export_ckpt(tmp_path / "m", tmp_path / "hf")
    path.write_text(json.dumps({k: v for k, v in said.items() if k != "bridge_mimo"}), encoding="utf-8")
    export_ckpt(tmp_path / "m", tmp_path / "hf")  # the routes follow from the family


def test_an_output_in_use_stays_as_it_is(published, tmp_path):
    hf = shutil.copytree(published("qwen3_vl"), tmp_path / "hf")
    with pytest.raises(OutputError):
        import_ckpt(hf, hf)
    with pytest.raises(OutputError):
        import_ckpt(hf, hf, options=_overwriting())
    assert verify(hf, published("qwen3_vl")).ok


def _overwriting():
    from bridge_core.checkpoint.convert import Options

    return Options(overwrite=True)
