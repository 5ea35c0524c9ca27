"""fp8 checkpoints in blocks: read by region as their publisher would, written, verified, and refused where broken."""

from __future__ import annotations

import json
from contextlib import ExitStack
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the oracle is torch")
pytest.importorskip("transformers", reason="the models are transformers'")

from fp8_folders import BLOCK, as_read, dequantise, load, quantise, same, write_fp8  # noqa: E402 - after the skips

from bridge_core import AutoBridge, ParallelLayout, export_ckpt, import_ckpt, verify  # noqa: E402
from bridge_core.checkpoint import transfer as transfers  # noqa: E402
from bridge_core.checkpoint.convert import Options  # noqa: E402
from bridge_core.checkpoint.files import OpenFiles  # noqa: E402
from bridge_core.checkpoint.fp8 import encode  # noqa: E402
from bridge_core.checkpoint.hf_folder import open_hf  # noqa: E402
from bridge_core.checkpoint.inspect import inspect  # noqa: E402
from bridge_core.checkpoint.reading import Reader  # noqa: E402
from bridge_core.checkpoint.safetensors import Encoded, Stored  # noqa: E402
from bridge_core.codecs import Fp8Blocks  # noqa: E402
from bridge_core.dtypes import numpy_dtype  # noqa: E402
from bridge_core.errors import CheckpointError, ConfigError, VerificationError  # noqa: E402
from bridge_core.geometry import Box, Piece, View, restrict, row_major, whole  # noqa: E402


def tensor_of(array: np.ndarray, dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).view(np.uint8)).view(dtype).reshape(array.shape)


def in_file(path, codes: torch.Tensor, scales: torch.Tensor, codec: Fp8Blocks) -> Stored:
    """Codes and scales one after the other in a file, at odd offsets."""
    path.write_bytes(b"..." + codes.view(torch.uint8).numpy().tobytes() + b"." + scales.numpy().tobytes())
    beside = Stored(str(path), 3 + codes.numel() + 1, "F32", tuple(scales.shape))
    stored = Stored(str(path), 3, codec.dtype, tuple(codes.shape))
    return stored._replace(dtype="BF16", encoded=Encoded(codec, "weight", (stored, beside)))


def random_weight(shape, block, seed=0):
    """Every code occurs, NaN too; scales of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    grid = [-(-n // size) for n, size in zip(shape, block, strict=True)]
    return codes, torch.rand(grid, generator=generator) * 10.0 ** torch.randint(-8, 3, grid, generator=generator)


# --- Reading and writing matrices -----------------------------------------------------------------


@settings(max_examples=80)
@given(data=st.data())
def test_a_region_is_what_the_publishers_formula_gives(tmp_path_factory, data):
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    block = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    codes, scales = random_weight(shape, block, data.draw(st.integers(0, 99)))
    stored = in_file(tmp_path_factory.mktemp("fp8") / "data", codes, scales, Fp8Blocks(*block))
    start = [data.draw(st.integers(0, n - 1)) for n in shape]
    box = Box(tuple(start), tuple(data.draw(st.integers(1, n - s)) for n, s in zip(shape, start, strict=True)))
    view = View("", 0, row_major(shape))
    (piece,) = restrict(Piece(shape, view, view), "target", shape, box, box.shape, (0, 0))
    expected = dequantise(codes, scales, block)[box.start[0] :, box.start[1] :][: box.shape[0], : box.shape[1]]
    with ExitStack() as stack:
        reader = Reader(OpenFiles(stack))
        got = reader.values(stored, piece)
    bits, wanted = tensor_of(got, torch.int16), expected.contiguous().view(torch.int16)
    nan = expected.isnan()
    assert torch.equal(bits[~nan], wanted[~nan])
    assert tensor_of(got, torch.bfloat16)[nan].isnan().all()
    rows, cols = ({i // size for i in range(s, s + n)} for s, n, size in zip(*box, block, strict=True))
    # Rows of less than 64 bytes are read with what lies between.
    grid_width = -(-shape[1] // block[1])
    assert box.numel + 4 * len(rows) * len(cols) <= reader.nbytes
    assert reader.nbytes <= box.shape[0] * shape[1] + 4 * len(rows) * grid_width


@pytest.mark.parametrize("strides", [(24, 12, 1), (72, 24, 1), (12, 36, 1), (6, 12, 1), (24, 1, 2)])
def test_any_view_is_read(tmp_path, strides):
    """Rows in groups, transposed axes, and axes that run on from row to row."""
    codes, scales = random_weight((36, 12), (16, 5))
    stored = in_file(tmp_path / "data", codes, scales, Fp8Blocks(16, 5))
    extents = (3, 2, 4)
    piece = Piece(extents, View("", 15, strides), View("", 0, row_major(extents)))
    flat = dequantise(codes, scales, (16, 5)).reshape(-1)
    expected = flat.as_strided(extents, strides, 15)
    with ExitStack() as stack:
        got = tensor_of(Reader(OpenFiles(stack)).values(stored, piece), torch.bfloat16)
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


def test_all_of_a_weight_is_what_transformers_reads(tmp_path):
    """transformers' own dequantisation, which knows whole blocks only."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scales = random_weight((256, 384), (128, 128))
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=torch.bfloat16)
    assert torch.equal(theirs.nan_to_num(7), dequantise(codes, scales, (128, 128)).nan_to_num(7))
    stored = in_file(tmp_path / "data", codes, scales, Fp8Blocks())
    view = View("", 0, row_major(stored.shape))
    with ExitStack() as stack:
        got = Reader(OpenFiles(stack)).values(stored, Piece(stored.shape, view, view))
    assert torch.equal(tensor_of(got, torch.bfloat16).nan_to_num(7), theirs.nan_to_num(7))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("shape", [(576, 200), (1, 1), (128, 129), (130, 128)])
def test_writing_is_what_torch_gives(shape, dtype):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 3, shape[1])
    values[: shape[0] // 2, : shape[1] // 2] = 0  # a block of zeros, where one is whole
    values = values.to(torch.bfloat16 if dtype == "BF16" else torch.float32)
    expected, scales = quantise(values, (128, 128))
    array = values.view(torch.uint8).numpy().view(numpy_dtype(dtype)).reshape(shape)
    codes, found = encode(array, Fp8Blocks(), where="here")
    assert same(tensor_of(codes, torch.float8_e4m3fn), expected)
    assert same(torch.from_numpy(found), scales)
    assert torch.isfinite(dequantise(expected, scales, (128, 128))).all()


def test_what_is_not_finite_is_not_quantised():
    array = np.ones((4, 4), np.float32)
    array[2, 3] = np.inf
    with pytest.raises(CheckpointError, match=r"infinite or undefined[\s\S]*model\.x"):
        encode(array, Fp8Blocks(), where="model.x")


# --- Folders --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return write_fp8(tmp_path_factory.mktemp("made") / "fp8")


@pytest.fixture(scope="module")
def megatron(fp8, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "megatron"
    return folder, import_ckpt(fp8, folder)


def test_an_import_reads_codes_and_scales_and_accounts_for_both(fp8, megatron):
    _, report = megatron
    tensors = load(fp8)
    assert report.tensors == len(tensors)
    copied = [name for name in tensors if name.endswith((".4.embed_tokens.weight", "shared_head.head.weight"))]
    read = sum(t.numel() * t.element_size() for name, t in tensors.items() if name not in copied)
    whole_blocks = report.moved.read - read
    assert 0 <= whole_blocks < read / 50  # scales of blocks that two pieces share are read twice


def test_an_export_is_plain_unless_asked_otherwise(fp8, megatron, tmp_path):
    for source in (fp8, None):
        out = tmp_path / str(bool(source))
        export_ckpt(megatron[0], out, source=source)
        expected, got = as_read(load(fp8)), load(out)
        assert got.keys() == expected.keys()
        assert all(same(got[name], expected[name]) for name in expected)
        config = json.loads((out / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["dtype"] == "bfloat16"
        assert verify(fp8, out).ok  # as it is read
        assert verify(fp8, megatron[0]).ok
        again = tmp_path / f"again-{bool(source)}"
        import_ckpt(out, again)
        assert verify(again, megatron[0]).ok


@pytest.mark.parametrize("like", [True, False])
@pytest.mark.parametrize("staging", [None, 3000])
def test_an_export_is_quantised_again(fp8, megatron, tmp_path, like, staging, monkeypatch):
    if staging:
        monkeypatch.setattr(transfers, "STAGING", staging)  # matrices in several bands
    source = {"source": fp8} if like else {}
    export_ckpt(megatron[0], tmp_path / "out", fp8=True, **source)
    block = BLOCK if like else (128, 128)
    got, plain = load(tmp_path / "out"), as_read(load(fp8))
    quantised = [name for name, tensor in load(fp8).items() if tensor.dtype == torch.float8_e4m3fn]
    assert sorted(n for n, t in got.items() if t.dtype == torch.float8_e4m3fn) == sorted(quantised)
    for name, tensor in plain.items():
        if name not in quantised:
            assert same(got[name], tensor), name
            continue
        codes, scales = quantise(tensor, block)
        assert same(got[name], codes), name
        assert same(got[name.removesuffix("weight") + "weight_scale_inv"], scales), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == list(block)
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert inspect(tmp_path / "out").parameters == inspect(fp8).parameters == sum(t.numel() for t in plain.values())


def test_quantising_twice_changes_nothing_more(fp8, megatron, tmp_path):
    """A block's largest value is 448 times its scale: from the second generation on all is equal to the bit."""
    folder = megatron[0]
    for generation in ("first", "second", "third"):
        export_ckpt(folder, tmp_path / generation, source=fp8, fp8=True)
        folder = tmp_path / f"{generation}-megatron"
        import_ckpt(tmp_path / generation, folder)
    codes = [t for t in load(fp8).items() if t[1].dtype == torch.float8_e4m3fn]
    first, second = load(tmp_path / "first"), tmp_path / "second"
    assert all(same(first[name], tensor) for name, tensor in codes)
    for file in sorted(second.glob("*.safetensors")):
        assert (tmp_path / "third" / file.name).read_bytes() == file.read_bytes()
    assert verify(second, tmp_path / "third").ok


def test_an_export_to_fp8_of_what_was_imported_plain(tmp_path):
    made = write_fp8(tmp_path / "fp8")
    plain = tmp_path / "plain"
    import_ckpt(plain, tmp_path / "megatron")
    for options in ({}, {"source": plain}):
        out = tmp_path / f"out{len(options)}"
        export_ckpt(tmp_path / "megatron", out, fp8=True, options=Options(dtype="bf16"), **options)
        found, expected = load(out), load(made)
        assert found.keys() == expected.keys()
        name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
        codes, scales = quantise(load(plain)[name].to(torch.bfloat16), (128, 128))
        assert same(found[name], codes)
        assert same(found[name + "_scale_inv"], scales)
        bias = "model.layers.1.mlp.gate.e_score_correction_bias"
        assert found[bias].dtype == torch.float32


def test_two_quantised_folders_are_compared_as_they_are_stored(fp8, tmp_path):
    out = tmp_path / "other"
    out.mkdir()
    for file in fp8.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    stored = open_hf(out).stored["model.layers.1.self_attn.o_proj.weight_scale_inv"]
    with open(stored.path, "r+b") as file:
        file.seek(stored.offset)
        file.write(np.float32(3.0).tobytes())
    with pytest.raises(VerificationError, match=r"layers\.1\.self_attn\.o_proj\.weight_scale_inv"):
        verify(fp8, out).raise_if_different()


def test_a_quantised_folder_is_described(fp8):
    found = inspect(fp8)
    quantised = sum(tensor.dtype == torch.float8_e4m3fn for tensor in load(fp8).values())
    assert found.quantised == f"{quantised} weights, fp8 in blocks of 16 x 12"
    assert found.family == "deepseek_v3"
    assert found.dtypes["F8_E4M3"] > found.dtypes["F32"] > 0


def test_a_plan_lists_a_weight_and_its_scales_as_one_group(fp8):
    plan = AutoBridge.from_hf_pretrained(fp8).plan(ParallelLayout(tp=2))
    metadata = {meta.name: meta for meta in plan.metadata()}
    tensors = load(fp8)
    assert metadata.keys() == tensors.keys()
    for name, tensor in tensors.items():
        meta = metadata[name]
        assert meta.shape == tuple(tensor.shape)
        assert meta.nbytes == tensor.numel() * tensor.element_size()
        if name.endswith("_scale_inv"):
            weight = metadata[name.removesuffix("_scale_inv")]
            assert (weight.dtype, meta.dtype, meta.group) == ("F8_E4M3", "F32", weight.group)
    assert plan.audit({name: tuple(t.shape) for name, t in tensors.items()}).elements == sum(
        prod(t.shape) for t in tensors.values()
    )


# --- Bad input ------------------------------------------------------------------------------------


def rewrite(fp8, folder, change):
    """The folder in one file, with its tensors changed."""
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = load(fp8)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((fp8 / "config.json").read_text())
    return folder


O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def without_scales(tensors):
    del tensors[O_PROJ + "_scale_inv"]


def without_weight(tensors):
    del tensors[O_PROJ]


def in_bfloat16(tensors):
    tensors[O_PROJ] = tensors[O_PROJ].to(torch.bfloat16)


def other_scales(tensors):
    tensors[O_PROJ + "_scale_inv"] = tensors[O_PROJ + "_scale_inv"][:-1].contiguous()


def narrow_scales(tensors):
    tensors[O_PROJ + "_scale_inv"] = tensors[O_PROJ + "_scale_inv"].to(torch.bfloat16)


def nothing_quantised(tensors):
    plain = as_read(tensors)
    tensors.clear()
    tensors.update(plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_scales, ["have no scales", O_PROJ, "weight_scale_inv"]),
        (without_weight, ["belong to no quantised weight", O_PROJ, "no such tensor"]),
        (in_bfloat16, ["belong to no quantised weight", O_PROJ, "BF16"]),
        (other_scales, ["do not fit", O_PROJ, "[4, 8]", "[3, 8]"]),
        (narrow_scales, ["do not fit", O_PROJ, "F32", "BF16"]),
        (nothing_quantised, ["none is", "quantization_config"]),
    ],
)
def test_a_folder_whose_scales_do_not_fit_is_refused(fp8, tmp_path, change, words):
    folder = rewrite(fp8, tmp_path / "broken", change)
    with pytest.raises(CheckpointError) as caught:
        import_ckpt(folder, tmp_path / "megatron")
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, ["gptq"]),
        ({"quant_method": "fp8"}, ["weight_block_size"]),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, ["weight_block_size"]),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}, ["fmt='e5m2'"]),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "zero_point": 1}, ["zero_point=1"]),
    ],
)
def test_another_quantisation_is_refused_by_its_name(fp8, said, words):
    config = json.loads((fp8 / "config.json").read_text()) | {"quantization_config": said}
    with pytest.raises(ConfigError) as caught:
        AutoBridge.from_hf_config(config)
    for word in words:
        assert word in str(caught.value)


def test_a_family_that_is_not_published_in_fp8_is_not_exported_so(tmp_path):
    from hf_folders import write_hf

    import_ckpt(write_hf(tmp_path / "hf", "llama"), tmp_path / "megatron")
    with pytest.raises(ConfigError, match=r"not known which weights of a llama[\s\S]*families/llama"):
        export_ckpt(tmp_path / "megatron", tmp_path / "out", fp8=True)
    assert not (tmp_path / "out").exists()


def test_whole_is_a_region_too():
    from bridge_core.checkpoint.encoded import region

    view = View("", 0, row_major((7, 5)))
    assert region((7, 5), (7, 5), view) == (whole((7, 5)), view)


def test_the_command_line_exports_to_fp8(fp8, megatron, tmp_path, capsys):
    from bridge_core.cli import main

    assert main(["export", str(megatron[0]), str(tmp_path / "out"), "--source", str(fp8), "--fp8"]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "fp8 in blocks of 16 x 12" in capsys.readouterr().out
    assert load(tmp_path / "out").keys() == load(fp8).keys()
