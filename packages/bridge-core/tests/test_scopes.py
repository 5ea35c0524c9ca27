"""A part of a model, or all of it under other names, planned and converted as a family of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulation import CONFIGS, distinct, load_rank, save_rank

from bridge_core import ParallelLayout, families
from bridge_core.checkpoint.convert import export_ckpt, import_ckpt
from bridge_core.checkpoint.dcp import read_dcp
from bridge_core.checkpoint.hf_folder import open_hf
from bridge_core.checkpoint.keys import Form, written_forms
from bridge_core.checkpoint.variant import Variant
from bridge_core.checkpoint.verify import verify
from bridge_core.errors import ConfigError, CoverageError
from bridge_core.families import family_for, family_named, register_family
from bridge_core.plan import Plan, scoped


def of(name):
    family = family_for(CONFIGS[name])
    return family, family.to_megatron(CONFIGS[name])


def whole(family, fields):
    """All of it, below a prefix."""
    return scoped(family, fields, lambda name: f"inner.{name}", reason="", holds=lambda name, stage: True)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_moe", "qwen3_vl_moe", "nemotron_h", "deepseek_v3"])
def test_a_whole_model_below_a_prefix(name):
    """The same pieces, the same forms in a checkpoint; a prefix is on every Megatron name and on no HF name."""
    family, fields = of(name)
    plain, moved = (Plan(f, fields, ParallelLayout()) for f in (family, whole(family, fields)))
    moved.audit(plain.hf_tensors)
    assert moved.hf_tensors == plain.hf_tensors
    assert moved.megatron_tensors == {f"inner.{key}": shape for key, shape in plain.megatron_tensors.items()}
    assert {b.removeprefix("inner."): f for b, f in written_forms(moved.entries).items() if b} == {
        b: f for b, f in written_forms(plain.entries).items() if b
    }
    assert ("decoder.layers", Form.PER_LAYER) in written_forms(plain.entries).items() or name in (
        "qwen3",
        "qwen3_vl_moe",
    )


def test_a_part_of_a_model():
    """A tower alone, in a layout of its own: with a pipeline, which in the whole model only the decoder has."""
    family, fields = of("qwen3_vl")
    tower = family.towers["images"]

    def own(name):
        return name.removeprefix(tower.prefix) if name.startswith(tower.prefix) else None

    part = scoped(family, fields, own, reason="elsewhere", holds=lambda name, stage: tower.holds(name, stage, fields))
    alone = {"vocab_size": 0, "share_embeddings_and_output_weights": False, **tower.fields(fields)}
    plan = Plan(part, alone, ParallelLayout(tp=2, pp=3))
    everything = Plan(family, fields, ParallelLayout()).hf_tensors
    assert {*plan.hf_tensors} == {name for name in everything if name.startswith("model.visual.")}
    audit = plan.audit(everything)
    assert {*audit.ignored} == {*everything} - {*plan.hf_tensors}
    before = distinct(plan)
    after = {name: tensor * 0 - 1 for name, tensor in before.items()}
    for rank in range(6):
        save_rank(plan, rank, load_rank(plan, rank, before), after)
    assert all((after[name] == before[name]).all() for name in before)
    with pytest.raises(CoverageError, match="unexpected 1"):
        plan.audit({**everything, "model.other.weight": (1,)})


def test_two_tensors_under_one_name():
    family, fields = of("qwen3")
    with pytest.raises(CoverageError, match="same name"):
        scoped(family, fields, lambda name: "one", reason="")


def test_a_copy_of_what_was_left_out_is_known():
    family, fields = of("llama-tied")
    part = scoped(family, fields, lambda name: None if "embedding" in name else name, reason="elsewhere")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= part.ignored.keys()
    assert not part.copies(fields)


def test_a_registered_family_is_known_to_this_process(monkeypatch):
    monkeypatch.setattr(families, "_REGISTERED", {})
    family = replace(of("qwen3")[0], name="mine", architectures=("MineForCausalLM",))
    with pytest.raises(ConfigError, match="no such model family"):
        family_named("mine")
    assert register_family(family) is family
    assert family_named("mine") is family
    assert family_for({"architectures": ["MineForCausalLM"]}) is family
    with pytest.raises(ConfigError, match="no model family"):
        register_family("mine")


# --- Conversions ------------------------------------------------------------------------------------


@pytest.fixture
def hf(tmp_path):
    """A tiny Qwen3.5 with prediction layers."""
    pytest.importorskip("torch", reason="tiny models are transformers'")
    pytest.importorskip("transformers", reason="tiny models are transformers'")
    from bridge_core.testing.hf_layouts import save_published
    from bridge_core.testing.hf_models import make_model

    return save_published(make_model("qwen3_5"), tmp_path / "published")


INNER = Variant(
    family=lambda family, fields, folder: whole(family, fields),
    sections=lambda family, fields: {"inner": {"layers": fields["num_layers"]}},
    from_source=("mtp.*",),
)


def test_a_conversion_under_other_names(hf, tmp_path):
    import_ckpt(hf, tmp_path / "m", variant=INNER)
    assert all(key.startswith("inner.") for key in read_dcp(tmp_path / "m" / "iter_0000000").tensors)
    assert '"inner": {\n    "layers": 4' in (tmp_path / "m/iter_0000000/run_config.yaml").read_text(encoding="utf-8")
    assert verify(hf, tmp_path / "m", variant=INNER).ok
    export_ckpt(tmp_path / "m", tmp_path / "back", source=hf, variant=INNER)
    assert (hf / "model.safetensors").read_bytes() == (tmp_path / "back" / "model.safetensors").read_bytes()
    with pytest.raises(CoverageError):
        export_ckpt(tmp_path / "m", tmp_path / "again", source=hf)


def test_what_a_checkpoint_lacks_comes_from_the_source(hf, tmp_path):
    """Only what was named for it, only where all of it is absent, and cast like the rest."""
    import_ckpt(hf, tmp_path / "m", ignore=["mtp.*"], variant=INNER)
    path = tmp_path / "m/iter_0000000/run_config.yaml"
    said = path.read_text(encoding="utf-8").replace('"mtp_num_layers": null', '"mtp_num_layers": 1')
    path.write_text(said.replace('"ignore": [\n      "mtp.*"\n    ]', '"ignore": []'), encoding="utf-8")
    export_ckpt(tmp_path / "m", tmp_path / "back", source=hf, variant=INNER)
    assert (hf / "model.safetensors").read_bytes() == (tmp_path / "back" / "model.safetensors").read_bytes()
    from bridge_core.checkpoint.convert import Options

    export_ckpt(tmp_path / "m", tmp_path / "half", source=hf, variant=INNER, options=Options(dtype="bf16"))
    dtypes = {name: tensor.dtype for name, tensor in open_hf(tmp_path / "half").tensors.items()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("mtp.")} == {"BF16"}
    with pytest.raises(CoverageError, match="belong to the model"):
        export_ckpt(tmp_path / "m", tmp_path / "none", variant=INNER)
    with pytest.raises(CoverageError, match="lacks tensors"):
        export_ckpt(tmp_path / "m", tmp_path / "none", source=hf, variant=replace(INNER, from_source=()))
    assert not (tmp_path / "none").exists()
