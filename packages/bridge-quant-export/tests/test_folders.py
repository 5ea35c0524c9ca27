"""Folders: described, verified, retagged, by the library and on the command line. One process, no Megatron."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from quant_cases import calibration, same_bytes, weights
from safetensors.torch import load_file, save_file

from bridge_quant_export.cli import main
from bridge_quant_export.configs import compressed_tensors, modelopt
from bridge_quant_export.configs.layers import QuantizedLayers
from bridge_quant_export.configs.reading import LINEAR, read_claims
from bridge_quant_export.errors import FormatError
from bridge_quant_export.folders.open import open_quantized
from bridge_quant_export.folders.retag import retag
from bridge_quant_export.folders.verify import verify_quantized
from bridge_quant_export.formats import FORMATS, format_of
from bridge_quant_export.formats.format import WRITERS
from bridge_quant_export.formats.packing import pack
from bridge_quant_export.readers import readers_of

WRITABLE = [(name, writer) for name in FORMATS for writer in WRITERS if readers_of(writer, FORMATS[name])]
BOTH = sorted({name for name, _ in WRITABLE if all((name, writer) in WRITABLE for writer in WRITERS)})
SHAPES = {"self_attn.q_proj": (256, 128), "self_attn.k_proj": (128, 128), "mlp.down_proj": (128, 256)}


def original():
    """The tensors of a model that nobody could run, with the names of one."""
    found = {"model.embed_tokens.weight": weights(60, 128), "lm_head.weight": weights(60, 128, seed=1)}
    for layer in range(2):
        for number, (name, shape) in enumerate(SHAPES.items()):
            found[f"model.layers.{layer}.{name}.weight"] = weights(*shape, seed=10 * layer + number)
        found[f"model.layers.{layer}.input_layernorm.weight"] = 1 + weights(1, 128, seed=layer)[0]
    return found


def write(folder, kinds, writer, *, kv=False):
    """A quantised folder, with one format for each of the two layers, or one for both."""
    tensors, quantized = {}, {}
    for name, tensor in original().items():
        module = name.removesuffix(".weight")
        if "_proj" not in name:
            tensors[name] = tensor
            continue
        format = format_of(kinds[int(name.split(".")[2]) % len(kinds)])
        known = calibration(format, tensor)
        if format.amax == ():
            known = known.__class__(**{**vars(known), "weight": torch.tensor(0.5)})
        if known.pre_quant_scale is not None:
            tensor = (tensor.float() / known.pre_quant_scale).bfloat16()
            known = calibration(format, tensor)
        if known.weight_2 is not None:  # layers that engines fuse share it
            known = known.__class__(**{**vars(known), "weight_2": torch.tensor(0.5)})
        for suffix, made in pack(tensor, known, format=format, writer=writer).items():
            tensors[f"{module}.{suffix}"] = made
        quantized[module] = format
    if kv:
        at = "self_attn.{0}_proj.{0}_scale" if writer == "modelopt" else "self_attn.{0}_scale"
        for which in "kv":
            tensors |= {f"model.layers.{n}.{at.format(which)}": torch.tensor([1.5 + n]) for n in range(2)}
    layers = QuantizedLayers(
        quantized=quantized, unquantized=frozenset({"lm_head", "model.embed_tokens"}), fp8_kv_cache=kv
    )
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    if writer == "modelopt":
        inline, beside = modelopt.compose(layers, producer_version="0.47.0")
        (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    else:
        inline = compressed_tensors.compose(layers)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": inline}))
    (folder / "tokenizer.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def plain(tmp_path):
    """The folder of the original."""
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}))
    save_file(original(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("name", "writer"), WRITABLE)
def test_configurations_are_read_as_they_were_meant(name, writer):
    layers = QuantizedLayers(
        quantized={"model.layers.0.mlp.down_proj": FORMATS[name]}, unquantized=frozenset({"lm_head"})
    )
    if writer == "compressed-tensors":
        claims = read_claims(compressed_tensors.compose(layers))
    else:
        inline, beside = modelopt.compose(layers, producer_version="0.47.0")
        claims = read_claims(inline, beside)
    assert claims.writer == writer
    assert claims.formats == {LINEAR: FORMATS[name]}
    assert claims.excluded == {"lm_head"}


@pytest.mark.parametrize(("name", "writer"), WRITABLE)
def test_a_sound_folder_is_found_sound(tmp_path, plain, name, writer):
    folder = write(tmp_path / "out", [name], writer)
    found = open_quantized(folder)
    assert (found.wrong, len(found.layers.quantized)) == ((), 6)
    assert {found.shapes[f"model.layers.0.{module}"] for module in SHAPES} == set(SHAPES.values())
    checked = verify_quantized(folder, plain)
    assert checked.ok, checked.wrong
    assert len(checked.errors) == 6
    assert all(0 < error.relative < 0.3 for error in checked.errors)
    assert checked.unquantized == 4


@pytest.mark.parametrize("kv", [False, True])
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("source", WRITERS)
def test_retagging_there_and_back(tmp_path, name, source, kv):
    target = next(writer for writer in WRITERS if writer != source)
    first = write(tmp_path / "first", [name], source, kv=kv)
    wanted = write(tmp_path / "wanted", [name], target, kv=kv)
    made = retag(first, tmp_path / "made", writer=target)
    assert made.layers == 6
    found, expected = load_file(tmp_path / "made" / "model.safetensors"), load_file(wanted / "model.safetensors")
    assert sorted(found) == sorted(expected)
    for key, tensor in expected.items():
        if "global_scale" in key or key.endswith(("scale_2", "input_scale")):
            torch.testing.assert_close(found[key], tensor, rtol=2**-22, atol=0)  # a reciprocal
        else:
            assert same_bytes(found[key], tensor), key
    assert open_quantized(tmp_path / "made").wrong == ()
    for file in ("config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "made" / file).read_text()) == json.loads((wanted / file).read_text())
    assert (tmp_path / "made" / "hf_quant_config.json").exists() == (target == "modelopt")
    retag(tmp_path / "made", tmp_path / "back", writer=source)
    assert verify_quantized(tmp_path / "back").ok


def test_mixed_precision(tmp_path, plain):
    folder = write(tmp_path / "out", ["fp8", "nvfp4"], "modelopt")
    assert verify_quantized(folder, plain).ok
    retag(folder, tmp_path / "other", writer="compressed-tensors")
    found = open_quantized(tmp_path / "other")
    assert not found.wrong
    assert {format.name: len(names) for format, names in found.layers.formats.items()} == {"fp8": 3, "nvfp4": 3}


def spoil(folder, change):
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


_Q = "model.layers.0.self_attn.q_proj"
SPOILED = {
    "a scale is missing": (lambda t: t.pop(f"{_Q}.weight_scale_2"), f"{_Q}.weight_scale_2 is missing"),
    "a scale is zero": (lambda t: t[f"{_Q}.input_scale"].zero_(), "not finite and positive"),
    "a scale is nan": (lambda t: t[f"{_Q}.weight_scale_2"].fill_(float("nan")), "not finite and positive"),
    "a fused scale differs": (lambda t: t[f"{_Q}.weight_scale_2"].mul_(2), "engines fuse them"),
    "a shape is wrong": (
        lambda t: t.update({f"{_Q}.weight_scale": t[f"{_Q}.weight_scale"][:, :4].contiguous()}),
        "is F8_E4M3 [256, 4], not F8_E4M3 [256, 8]",
    ),
    "an unquantised weight": (
        lambda t: (
            [t.pop(key) for key in list(t) if key.startswith(f"{_Q}.")]
            and t.update({f"{_Q}.weight": weights(256, 128)})
        ),
        "has no scales, but the configuration says",
    ),
    "a scale too many": (
        lambda t: t.update({"lm_head.weight_scale": torch.ones(60, 8)}),
        "has scales, but the configuration says that it is not",
    ),
    "KV scales unannounced": (
        lambda t: t.update({"model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}),
        "does not mention an FP8 KV cache",
    ),
    "a weight of another layer": (
        lambda t: t.update({f"{_Q}.weight": t["model.layers.1.self_attn.q_proj.weight"].clone()}),
        "away from the original",
    ),
    "a norm differs": (lambda t: t["model.layers.0.input_layernorm.weight"].mul_(1.5), "differs from the original"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_wrong_is_told(tmp_path, plain, capsys, case):
    change, said = SPOILED[case]
    folder = write(tmp_path / "out", ["nvfp4"], "modelopt")
    spoil(folder, change)
    found = verify_quantized(folder, plain)
    assert any(said in line for line in found.wrong), found.wrong
    assert main(["verify", str(folder), "--original", str(plain)]) == 1
    assert said in capsys.readouterr().out
    if open_quantized(folder).wrong:
        assert main(["retag", str(folder), str(tmp_path / "made")]) == 1
        assert "contradicts itself" in capsys.readouterr().err
        assert not (tmp_path / "made").exists()


def test_configurations_that_disagree(tmp_path):
    folder = write(tmp_path / "out", ["fp8"], "modelopt")
    beside = json.loads((folder / "hf_quant_config.json").read_text())
    beside["quantization"]["exclude_modules"].append("model.layers.0.mlp.down_proj")
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    with pytest.raises(FormatError, match="different things"):
        open_quantized(folder)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "not quantised"),
        ({"quant_method": "gptq"}, "not known here"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_SVD"}, "no format here has this algorithm"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 3, "type": "int"}}},
            },
            "no format here has this scheme",
        ),
    ],
)
def test_folders_that_are_not_known(tmp_path, plain, capsys, config, said):
    folder = tmp_path / "out"
    shutil.copytree(plain, folder)
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": config}))
    assert main(["inspect", str(folder)]) == 1
    assert said in capsys.readouterr().err


def test_commands(tmp_path, plain, capsys):
    folder = write(tmp_path / "out", ["nvfp4"], "modelopt")
    assert main(["inspect", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["formats"] == {"nvfp4": {"layers": 6, "group_size": 16, "read_by": ["vLLM", "SGLang", "TensorRT-LLM"]}}
    assert main(["inspect", str(folder)]) == 0
    assert "vLLM, SGLang" in capsys.readouterr().out
    assert main(["verify", str(folder), "--original", str(plain), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"]
    assert len(told["errors"]) == 6
    assert main(["verify", str(folder), "--original", str(plain)]) == 0
    assert "sound" in capsys.readouterr().out
    assert main(["retag", str(folder), str(tmp_path / "ct"), "--to", "compressed-tensors"]) == 0
    assert main(["retag", str(folder), str(tmp_path / "ct")]) == 1
    assert "already holds something" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["retag", str(folder)])
    assert left.value.code == 2


def test_describing_needs_no_torch(tmp_path):
    folder = write(tmp_path / "out", ["fp8"], "compressed-tensors")
    code = (
        "import sys; from bridge_quant_export.cli import main; import bridge_quant_export; "
        f"code = main(['inspect', {str(folder)!r}]); "
        "assert not {'torch', 'modelopt', 'megatron', 'transformers'} & set(sys.modules), 'imported'; sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
