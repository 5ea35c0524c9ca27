"""Routes: every tensor of a model goes to one component, and no other tensors are asked for."""

from __future__ import annotations

from dataclasses import replace

import llava_family
import pytest
from simulation import CONFIGS

from bridge_core.errors import ConfigError, CoverageError
from bridge_core.families import family_for, family_named
from bridge_core.rules import Replicated
from bridge_mimo.components import Components, MIMOComponent, register_mimo_conversion_spec, routes_of, validate_routes

VISION = ["qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"]
LANGUAGE = MIMOComponent("language", "", "language_model")
IMAGES = MIMOComponent("images", "vision_model.", "modality_submodules.images.encoders.qwen_visual")


def of(name):
    family = family_for(CONFIGS[name])
    return family, family.to_megatron(CONFIGS[name])


@pytest.mark.parametrize("name", VISION)
def test_routes_follow_from_the_family(name):
    family, fields = of(name)
    assert routes_of(family, fields) == (LANGUAGE, IMAGES)


@pytest.mark.parametrize("name", VISION)
def test_components_share_the_rows_of_the_table(name):
    """Every row is one component's, with the HF names and the rule of the family; prediction layers are nobody's."""
    family, fields = of(name)
    components, table = Components.of(family, fields), family.table(fields)
    found = {}
    for part in components.parts.values():
        for own, row in part.family.table(part.fields).items():
            found[part.targets[own]] = row.hf
            assert not own.startswith(("vision_model.", "mtp."))
    expected = {
        name.replace("vision_model.", IMAGES.module) if "vision_model" in name else f"language_model.{name}": row.hf
        for name, row in table.items()
        if not name.startswith("mtp.")
    }
    assert found == expected
    assert {name: row.hf for name, row in components.mapped.table(fields).items()} == expected
    carried = {name for name in components.whole.table(fields) if name not in expected}
    assert carried == {f"language_model.{name}" for name in table if name.startswith("mtp.")}


def refused(routes, kind=ConfigError, name="qwen3_5"):
    with pytest.raises(kind) as caught:
        validate_routes(*of(name), routes)
    return caught.value


def test_overlapping_routes():
    inner = MIMOComponent("layers", "vision_model.decoder.", "modality_submodules.layers.encoders.x")
    assert "images and layers overlap" in refused([LANGUAGE, IMAGES, inner]).what
    same = MIMOComponent("other", "audio_model.", "language_model.decoder")
    assert "overlap" in refused([LANGUAGE, IMAGES, same]).what
    assert "overlap" in refused([LANGUAGE, IMAGES, replace(LANGUAGE, target_module_path="elsewhere")]).what


def test_an_unrouted_tensor():
    error = refused([LANGUAGE], CoverageError)
    assert str(error.where).startswith("vision_model.patch_embed.proj.weight")
    family, fields = of("qwen3_vl")
    table = {**family.table(fields), "audio_model.proj.weight": Replicated("model.audio.weight", "hidden")}
    with pytest.raises(CoverageError, match=r"audio_model\.proj\.weight"):
        Components.of(replace(family, table=lambda _: table), fields)


def test_a_route_without_tensors():
    idle = MIMOComponent("audio", "audio_model.", "modality_submodules.audio.encoders.x")
    assert "audio" in refused([LANGUAGE, IMAGES, idle]).what


def test_no_route_for_language():
    assert "language" in refused([IMAGES]).what


@pytest.mark.parametrize(
    "route", [("a", "vision_model", "x"), ("a", "vision_model.", "x."), ("a", "vision_model.", "")]
)
def test_malformed_routes(route):
    with pytest.raises(ConfigError, match="malformed"):
        MIMOComponent(*route)


def test_a_plain_language_model_has_no_components():
    with pytest.raises(ConfigError, match="which components a qwen3 model has"):
        Components.of(*of("qwen3"))


def test_a_component_that_the_family_has_no_tower_for():
    family, fields = of("qwen3_5")
    routes = (LANGUAGE, replace(IMAGES, name="pictures"))
    with pytest.raises(ConfigError, match="no tower pictures"):
        _ = Components(family, fields, routes).parts


@pytest.fixture
def unregistered(monkeypatch):
    """What a test registers is forgotten after it."""
    from bridge_core import families
    from bridge_mimo import components

    monkeypatch.setattr(families, "_REGISTERED", {})
    monkeypatch.setattr(components, "_BUILDERS", {})


@pytest.mark.usefixtures("unregistered")
def test_registered_routes():
    """A third party's model, whose images component is an encoder and a projector."""
    with pytest.raises(ConfigError, match="no such model family"):
        family_named("llava")
    llava_family.register()
    assert family_named("llava") is llava_family.FAMILY
    text = {name: value for name, value in CONFIGS["llama"].items() if name != "architectures"}
    vision = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "num_channels": 3,
        "image_size": 8,
        "patch_size": 4,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    }
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": text, "vision_config": vision}
    family = family_for(config)
    fields = family.to_megatron(config | {"image_token_index": 7})
    components = Components.of(family, fields)
    assert components.names == ("language", "images")
    targets = components.parts["images"].targets
    assert targets["decoder.layers.{layer}.mlp.linear_fc1.weight"] == (
        "modality_submodules.images.encoders.clip.decoder.layers.{layer}.mlp.linear_fc1.weight"
    )
    assert "modality_submodules.images.input_projections.0.encoder.linear_fc2.bias" in targets.values()


@pytest.mark.usefixtures("unregistered")
def test_what_is_registered_has_to_be_a_family():
    with pytest.raises(ConfigError, match="no model family"):
        register_mimo_conversion_spec("llava")(lambda family, fields: [])
