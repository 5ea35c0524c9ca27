"""Configurations against those of ModelOpt and the models of compressed-tensors, and against what readers look for."""

import pytest
from quant_cases import PAIRS

from bridge_core.errors import ConfigError
from bridge_quant_export.configs import compressed_tensors, modelopt
from bridge_quant_export.configs.layers import QuantizedLayers
from bridge_quant_export.errors import FormatError
from bridge_quant_export.formats import FORMATS, format_of
from bridge_quant_export.readers import READERS, readers_of

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
EXPERTS = [f"mlp.experts.{expert}.{part}" for expert in range(12) for part in ("gate_proj", "up_proj", "down_proj")]
PLAIN = frozenset({"lm_head", "model.embed_tokens", "model.layers.1.mlp.gate"})


def dense(format, *, kv=False):
    names = [f"model.layers.{layer}.{name}" for layer in range(11) for name in LINEARS]
    return QuantizedLayers(quantized=dict.fromkeys(names, format), unquantized=PLAIN, fp8_kv_cache=kv)


def mixed(attention, experts, *, kv=False):
    found = {f"model.layers.{layer}.{name}": attention for layer in range(2) for name in LINEARS[:4]}
    found |= {f"model.layers.1.{name}": experts for name in EXPERTS}
    return QuantizedLayers(quantized=found, unquantized=PLAIN, fp8_kv_cache=kv)


def by_modelopt(layers):
    """Their configurations for the same layers, from what their exporter records of each."""
    utils = pytest.importorskip(
        "modelopt.torch.export.quant_utils", reason="needs the extra bridge-quant-export[modelopt]"
    )
    convert = pytest.importorskip("modelopt.torch.export.convert_hf_config")
    words = {"fp8_channel": "fp8_pc_pt", "fp8_block": "fp8_pb_wo", "int8_weight_only": "int8_wo"}
    record = {}
    for name, format in layers.quantized.items():
        record[f"{name}.quantization"] = words.get(format.name, format.name)
        record[f"{name}.awq_block_size"] = format.group_size or 0
    per_layer = utils.process_layer_quant_config(record)
    # As their Megatron exporter composes the file (export/unified_export_megatron.py): names in full, no wildcards.
    quantization = {
        "quant_algo": per_layer["quant_algo"],
        "kv_cache_quant_algo": "FP8" if layers.fp8_kv_cache else None,
    }
    for key in ("group_size", "has_zero_point", "pre_quant_scale", "quantized_layers"):
        if key in per_layer:
            quantization[key] = per_layer[key]
    quantization["exclude_modules"] = sorted(layers.unquantized)
    own = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization}
    return convert.convert_hf_quant_config_format(own), own


@pytest.mark.parametrize("kv", [False, True])
@pytest.mark.parametrize("name", [name for name in FORMATS if readers_of("modelopt", FORMATS[name])])
def test_modelopt_uniform(name, kv):
    layers = dense(format_of(name), kv=kv)
    inline, own = modelopt.compose(layers, producer_version="0.47.0")
    theirs_inline, theirs = by_modelopt(layers)
    assert own == theirs
    assert inline == theirs_inline
    for reader in readers_of("modelopt", format_of(name)):
        assert set(READERS[reader].config["modelopt"]) <= inline.keys()
        assert set(READERS[reader].own_config.get(name, ())) <= own["quantization"].keys()


@pytest.mark.parametrize(
    "pair",
    [("fp8", "nvfp4"), ("nvfp4", "fp8"), ("fp8", "w4a16_nvfp4"), ("fp8_channel", "int4_awq"), ("fp8", "w4a8_awq")],
)
def test_modelopt_mixed(pair):
    layers = mixed(*(format_of(name) for name in pair), kv=True)
    inline, own = modelopt.compose(layers, producer_version="0.47.0")
    theirs_inline, theirs = by_modelopt(layers)
    assert own == theirs
    groups, their_groups = inline.pop("config_groups"), theirs_inline.pop("config_groups")
    assert inline == theirs_inline
    # Theirs are in the order in which layers were recorded, which depends on ranks; ours in that of names.
    by_targets = {tuple(group["targets"]): group for group in groups.values()}
    for group in their_groups.values():
        ours = by_targets.pop(tuple(sorted(group["targets"])))
        if "w4a8_awq" in pair and group["weights"]["num_bits"] == 4:
            # Difference: theirs calls the integers floats, and gives a group size to inputs that have one scale.
            group["weights"]["type"] = "int"
            del group["input_activations"]["group_size"]
        assert ours == {**group, "targets": ours["targets"]}
    assert not by_targets
    assert own["quantization"]["quantized_layers"].keys() == layers.quantized.keys()


def test_the_order_of_layers_does_not_matter():
    layers = mixed(format_of("fp8"), format_of("nvfp4"))
    backwards = QuantizedLayers(quantized=dict(reversed(layers.quantized.items())), unquantized=layers.unquantized)
    for one, other in (
        (modelopt.compose(layers, producer_version="1"), modelopt.compose(backwards, producer_version="1")),
        (compressed_tensors.compose(layers), compressed_tensors.compose(backwards)),
    ):
        assert repr(one) == repr(other)


def test_schemes_are_the_presets():
    quantization = pytest.importorskip(
        "compressed_tensors.quantization", reason="needs the extra bridge-quant-export[compressed-tensors]"
    )
    presets = {
        "fp8": "FP8",
        "fp8_channel": "FP8_DYNAMIC",
        "fp8_block": "FP8_BLOCK",
        "nvfp4": "NVFP4",
        "w4a16_nvfp4": "NVFP4A16",
        "mxfp4": "MXFP4",
        "w4a16_mxfp4": "MXFP4A16",
        "mxfp8": "MXFP8",
        "int4": "W4A16",
    }
    for name, preset in presets.items():
        ours = quantization.QuantizationScheme(**compressed_tensors.scheme_of(format_of(name), targets=["Linear"]))
        theirs = quantization.preset_name_to_scheme(preset, ["Linear"])
        for operand in ("weights", "input_activations", "output_activations"):
            mine, other = getattr(ours, operand), getattr(theirs, operand)
            assert (mine is None) == (other is None), (name, operand)
            if mine is not None:
                keep = {"observer", "zp_dtype", "observer_kwargs"}  # of use before compression only
                assert mine.model_dump(exclude=keep) == other.model_dump(exclude=keep), (name, operand)


@pytest.mark.parametrize("name", [name for name, writer in PAIRS if writer == "compressed-tensors"])
def test_compressed_tensors_uniform(name):
    quantization = pytest.importorskip(
        "compressed_tensors.quantization", reason="needs the extra bridge-quant-export[compressed-tensors]"
    )
    import torch
    from compressed_tensors.compressors.format import infer_module_format

    config = compressed_tensors.compose(dense(format_of(name), kv=True))
    read = quantization.QuantizationConfig(**config)
    assert read.quantization_status == "compressed"
    assert read.ignore == sorted(PLAIN)
    assert (read.kv_cache_scheme.num_bits, read.kv_cache_scheme.type) == (8, "float")
    (group,) = read.config_groups.values()
    assert group.targets == ["Linear"]
    # The storage that their library would choose for the scheme by itself.
    assert infer_module_format(torch.nn.Linear, group).value == group.format == read.format
    for reader in readers_of("compressed-tensors", format_of(name)):
        assert set(READERS[reader].config["compressed-tensors"]) <= config.keys()


def test_compressed_tensors_mixed():
    layers = mixed(format_of("fp8"), format_of("nvfp4"))
    config = compressed_tensors.compose(layers)
    assert config["format"] == "mixed-precision"
    targets = [name for group in config["config_groups"].values() for name in group["targets"]]
    assert sorted(targets) == sorted(layers.quantized)
    assert {group["format"] for group in config["config_groups"].values()} == {
        "float-quantized",
        "nvfp4-pack-quantized",
    }
    one_storage = compressed_tensors.compose(mixed(format_of("w4a16_nvfp4"), format_of("nvfp4")))
    assert (one_storage["format"], len(one_storage["config_groups"])) == ("nvfp4-pack-quantized", 2)


@pytest.mark.parametrize("compose", [compressed_tensors.compose, lambda it: modelopt.compose(it, producer_version="1")])
def test_what_no_reader_would_understand(compose):
    fp8, nvfp4 = format_of("fp8"), format_of("nvfp4")
    with pytest.raises(ConfigError, match="no layer"):
        compose(QuantizedLayers(quantized={}, unquantized=PLAIN, fp8_kv_cache=True))
    with pytest.raises(ConfigError, match="as quantised and as unquantised"):
        compose(QuantizedLayers(quantized={"a.o_proj": fp8}, unquantized=frozenset({"a.o_proj"})))
    fused = {"a.q_proj": fp8, "a.k_proj": fp8, "a.v_proj": nvfp4}
    with pytest.raises(ConfigError, match="one matrix") as caught:
        compose(QuantizedLayers(quantized=fused))
    assert "a.v_proj" in str(caught.value)
    with pytest.raises(ConfigError, match="one matrix"):
        compose(QuantizedLayers(quantized={"a.up_proj": fp8}, unquantized=frozenset({"a.gate_proj"})))
    with pytest.raises(FormatError, match="no reader"):
        compose(dense(format_of("int8_smoothquant")))


def test_an_excluded_name_that_is_the_beginning_of_a_quantised_one():
    fp8 = format_of("fp8")
    for quantized, plain in (
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.gate"),
        ("model.layers.0.attn.out_proj", "model.layers.0.attn.out"),
        ("model.mtp.lm_head", "lm_head"),
    ):
        layers = QuantizedLayers(quantized={quantized: fp8}, unquantized=frozenset({plain}))
        with pytest.raises(ConfigError, match="hides one"):
            modelopt.compose(layers, producer_version="1")
        compressed_tensors.compose(layers)
    # A router beside experts is nobody's beginning.
    experts = {f"model.layers.0.{name}": fp8 for name in EXPERTS}
    modelopt.compose(
        QuantizedLayers(quantized=experts, unquantized=frozenset({"model.layers.0.mlp.gate"})), producer_version="1"
    )
