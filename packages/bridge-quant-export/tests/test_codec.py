"""The way back: packed checkpoints read by bridge-core, region by region, and converted to Megatron dequantised."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_folders import change, same_tensors, write_packed
from quant_cases import PAIRS, calibration, weights
from quant_models import make
from safetensors.torch import load_file, save_file

from bridge_core import AutoBridge, ParallelLayout, export_ckpt, import_ckpt, verify
from bridge_core.checkpoint.convert import Options
from bridge_core.checkpoint.files import OpenFiles
from bridge_core.checkpoint.hf_folder import open_hf
from bridge_core.checkpoint.inspect import inspect
from bridge_core.checkpoint.reading import Reader
from bridge_core.errors import BridgeError
from bridge_core.geometry import Box, Piece, View, restrict, row_major
from bridge_quant_export.configs.compressed_tensors import scheme_of
from bridge_quant_export.formats import FORMATS, format_of
from bridge_quant_export.formats.format import WRITERS
from bridge_quant_export.formats.packing import pack, unpack
from bridge_quant_export.readers import readers_of

DOWN = "model.layers.0.mlp.down_proj"
WRITABLE = [(name, writer) for name in FORMATS for writer in WRITERS if readers_of(writer, FORMATS[name])]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """HF folder of each small model, made once."""
    made = {}

    def folder(name, layers=1):
        if (name, layers) not in made:
            made[name, layers] = make(name, tmp_path_factory.mktemp(name) / "hf", num_hidden_layers=layers)
        return made[name, layers]

    return folder


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """A folder of a single packed layer, [256, 384], by format and writer; and its values."""
    made = {}

    def folder(name, writer):
        if (name, writer) not in made:
            from bridge_quant_export.configs import compressed_tensors, modelopt
            from bridge_quant_export.configs.layers import QuantizedLayers

            path, format = tmp_path_factory.mktemp(f"{name}-{writer}"), format_of(name)
            weight = weights(256, 384)
            tensors = pack(weight, calibration(format, weight), format=format, writer=writer)
            values = unpack(tensors, format=format, writer=writer)
            if "pre_quant_scale" in tensors:
                values = values * tensors["pre_quant_scale"].float()
            layers = QuantizedLayers(quantized={"layer.o_proj": format})
            said = (
                modelopt.compose(layers, producer_version="0")[0]
                if writer == "modelopt"
                else compressed_tensors.compose(layers)
            )
            save_file({f"layer.o_proj.{suffix}": t for suffix, t in tensors.items()}, path / "model.safetensors")
            (path / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": said}))
            made[name, writer] = open_hf(path), values.bfloat16()
        return made[name, writer]

    return folder


@settings(max_examples=60)
@given(data=st.data())
def test_any_region_is_that_of_the_unpacked_whole(one_layer, data):
    name, writer = data.draw(st.sampled_from(WRITABLE))
    folder, values = one_layer(name, writer)
    stored = folder.tensors["layer.o_proj.weight"]
    assert (stored.dtype, stored.shape) == ("BF16", (256, 384))
    start = [data.draw(st.integers(0, n - 1)) for n in stored.shape]
    box = Box(tuple(start), tuple(data.draw(st.integers(1, n - s)) for n, s in zip(stored.shape, start, strict=True)))
    view = View("", 0, row_major(stored.shape))
    (piece,) = restrict(Piece(stored.shape, view, view), "target", stored.shape, box, box.shape, (0, 0))
    from contextlib import ExitStack

    with ExitStack() as stack:
        reader = Reader(OpenFiles(stack))
        found = torch.from_numpy(reader.values(stored, piece).copy().view("int16")).view(torch.bfloat16)
    expected = values[start[0] :, start[1] :][: box.shape[0], : box.shape[1]]
    assert torch.equal(found, expected)
    # No more is read than the region widened to blocks.
    assert reader.nbytes <= stored.disk_bytes
    if box.shape[0] * 4 <= 256 and name not in ("fp8_block", "int4_awq", "w4a8_awq"):
        assert reader.nbytes < stored.disk_bytes / 2


@pytest.mark.parametrize(("name", "writer"), WRITABLE)
def test_packed_folders_are_imported_dequantised(plain, tmp_path, name, writer):
    packed, read = write_packed(plain("qwen3"), tmp_path, lambda module: name, writer, kv=name == "fp8")
    report = import_ckpt(packed, tmp_path / "megatron")
    verify(tmp_path / "megatron", read).raise_if_different()
    verify(tmp_path / "megatron", packed).raise_if_different()
    assert all("input_scale" in tensor or "_scale" in tensor or "weight_shape" in tensor for tensor in report.ignored)
    assert any(tensor.endswith("k_scale") for tensor in report.ignored) == (name == "fp8")
    # Out again, beside what the packed folder holds otherwise, but for what says how it was packed.
    export_ckpt(tmp_path / "megatron", tmp_path / "out", source=packed)
    same_tensors(tmp_path / "out", read)
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("writer", WRITERS)
def test_experts_and_formats_by_layer(plain, tmp_path, writer):
    def format_for(module):
        return "nvfp4" if "experts" in module else "fp8"

    packed, read = write_packed(plain("qwen3_moe", 2), tmp_path, format_for, writer)
    import_ckpt(packed, tmp_path / "megatron")
    verify(tmp_path / "megatron", read).raise_if_different()
    described = inspect(packed)
    assert described.quantised.startswith(f"{2 * (4 + 4 * 3)} weights, {writer}: ")
    assert "NVFP4" in described.quantised
    bridge = AutoBridge.from_hf_pretrained(packed)
    stored = load_file(packed / "model.safetensors")
    said = {meta.name: tuple(meta.shape) for meta in bridge.plan(ParallelLayout(ep=2, dp=2)).metadata()}
    assert said == {name: tuple(stored[name].shape) for name in said}
    of_inputs = {name for name in stored if re.search("input_.*scale$", name)}
    assert {name for name in stored if name not in said} == of_inputs
    # The same from the configuration alone, but for axes of one element.
    alone = AutoBridge.from_hf_config(json.loads((packed / "config.json").read_text())).plan().metadata()
    assert {meta.name: meta.nbytes for meta in alone if meta.name in said} == {
        meta.name: meta.nbytes for meta in bridge.plan().metadata()
    }


def test_folders_packed_by_different_methods_are_compared_as_they_are_read(plain, tmp_path):
    one, other = (
        write_packed(plain("qwen3"), tmp_path / writer, lambda module: "fp8", writer)[0] for writer in WRITERS
    )
    verify(one, other).raise_if_different()
    change(other, lambda tensors: tensors.update({f"{DOWN}.weight_scale": tensors[f"{DOWN}.weight_scale"] * 2}))
    with pytest.raises(BridgeError, match="down_proj"):
        verify(one, other).raise_if_different()


def test_fp32_models_are_read_without_rounding(plain, tmp_path):
    packed, read = write_packed(plain("qwen3"), tmp_path, lambda module: "int4", "compressed-tensors", dtype="float32")
    assert open_hf(packed).tensors["model.layers.0.mlp.up_proj.weight"].dtype == "F32"
    import_ckpt(packed, tmp_path / "megatron", options=Options(dtype="bf16"))
    values = load_file(read / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].bfloat16()
    export_ckpt(tmp_path / "megatron", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(found, values)


# --- As others write them ----------------------------------------------------------------------


def test_scales_in_half_precision_and_of_other_shapes(plain, tmp_path):
    packed, read = write_packed(plain("qwen3"), tmp_path, lambda module: "fp8_channel", "compressed-tensors")
    rounded = {}

    def edit(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name] = tensors[name].bfloat16().reshape(-1)
            weight = name.removesuffix("_scale")
            rounded[weight] = (tensors[weight].float() * tensors[name].float()[:, None]).bfloat16()

    change(packed, edit)
    change(read, lambda tensors: tensors.update(rounded))
    import_ckpt(packed, tmp_path / "megatron")
    verify(tmp_path / "megatron", read).raise_if_different()


def test_targets_by_expression_and_inputs_quantised_otherwise(plain, tmp_path):
    packed, read = write_packed(plain("qwen3"), tmp_path, lambda module: "int4", "compressed-tensors")

    def config(said):
        (group,) = said["config_groups"].values()
        group["targets"] = ["re:.*self_attn.*", "re:.*(gate|up|down)_proj$"]
        group["input_activations"] = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
        group["weights"] |= {"observer": "minmax", "actorder": None}
        said["ignore"] = ["re:.*lm_head"]

    change(packed, lambda tensors: None, config)
    import_ckpt(packed, tmp_path / "megatron")
    verify(tmp_path / "megatron", read).raise_if_different()


BROKEN = {
    "a scale is missing": (lambda t: t.pop(f"{DOWN}.weight_scale_2"), "is missing"),
    "no scale at all": (lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{DOWN}.weight_")], "has no scales"),
    "another shape": (lambda t: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"][:-1]}), "does not fit"),
    "another dtype": (lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].view(torch.int8)}), "does not fit"),
    "zero points": (lambda t: t.update({f"{DOWN}.weight_zero_point": torch.zeros(1)}), "may change what the weights"),
    "an order of groups": (lambda t: t.update({f"{DOWN}.weight_g_idx": torch.zeros(1)}), "may change what the weights"),
    "scales without a weight": (lambda t: t.update({"model.norm.weight_scale": torch.ones(1)}), "does not"),
    "nothing is quantised": (
        lambda t: (
            [t.pop(n) for n in list(t) if "_scale" in n],
            t.update({n: tensor.bfloat16() for n, tensor in t.items() if tensor.dtype == torch.uint8}),
        ),
        "none is",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_refused_before_anything_is_written(plain, tmp_path, case):
    packed, _ = write_packed(plain("qwen3"), tmp_path, lambda module: "nvfp4", "modelopt")
    edit, said = BROKEN[case]
    change(packed, edit)
    with pytest.raises(BridgeError, match=said):
        import_ckpt(packed, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize(
    ("kind", "writer"), [("fp8", "modelopt"), ("int8", "compressed-tensors"), ("mxfp8", "modelopt")]
)
def test_codes_without_scales_are_no_numbers(plain, tmp_path, kind, writer):
    packed, _ = write_packed(plain("qwen3"), tmp_path, lambda module: kind, writer)
    change(packed, lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{DOWN}.") and "_scale" in n])
    with pytest.raises(BridgeError, match="has no scales") as caught:
        import_ckpt(packed, tmp_path / "megatron")
    assert f"{DOWN}.weight" in str(caught.value)
    change(packed, lambda t: [t.pop(n) for n in list(t) if "_scale" in n])
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    (packed / "hf_quant_config.json").unlink(missing_ok=True)
    with pytest.raises(BridgeError, match="does not say that they are quantised"):
        import_ckpt(packed, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_SVD"}, "no format here has this algorithm"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "not converted"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {
                    "group_0": scheme_of(format_of("int4"), targets=["Linear"])
                    | {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": False}}
                },
            },
            "no format here has this scheme",
        ),
    ],
)
def test_unknown_forms_are_refused(plain, tmp_path, said, expected):
    shutil.copytree(plain("qwen3"), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(BridgeError, match=expected):
        import_ckpt(tmp_path / "hf", tmp_path / "megatron")


# --- Against others' own reading -----------------------------------------------------------------


READABLE = [name for name, writer in PAIRS if writer == "compressed-tensors" and readers_of(writer, FORMATS[name])]


@pytest.mark.parametrize("name", READABLE)
def test_read_as_transformers_reads(plain, tmp_path, name):
    """compressed-tensors' decompression in transformers; it computes some formats in bf16."""
    transformers = pytest.importorskip("transformers", reason="the reader that runs on a CPU")
    pytest.importorskip("compressed_tensors", reason="transformers needs it to read the folder")
    packed, _ = write_packed(plain("qwen3"), tmp_path, lambda module: name, "compressed-tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        packed,
        dtype=torch.float32,
        quantization_config=transformers.CompressedTensorsConfig(run_compressed=False),
    )
    import_ckpt(packed, tmp_path / "megatron")
    export_ckpt(tmp_path / "megatron", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    theirs = {key: value for key, value in model.state_dict().items() if key.endswith("_proj.weight")}
    assert len(theirs) == 7
    for key, value in theirs.items():
        # Each side rounds to the 8 bits of bf16, they in between, too.
        torch.testing.assert_close(found[key].float(), value.float(), rtol=2**-6, atol=0)
