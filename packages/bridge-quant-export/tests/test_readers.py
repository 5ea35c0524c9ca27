"""What would be written against what loaders require, which was written down from their sources."""

import pytest
from quant_cases import PAIRS

from bridge_quant_export.errors import FormatError
from bridge_quant_export.formats import FORMATS, format_of
from bridge_quant_export.formats.format import WRITERS, TensorSpec
from bridge_quant_export.readers import READERS, check_mixture, check_writable, readers_of
from bridge_quant_export.readers.reader import misfits

READ = [(reader, writer, name) for reader, found in READERS.items() for writer, name in found.reads]


@pytest.mark.parametrize("reader", READERS)
def test_every_format_is_read_or_refused_for_a_reason(reader):
    found = READERS[reader]
    everything = {(writer, name) for writer in WRITERS for name in FORMATS}
    assert found.reads.keys() | found.refuses.keys() == everything
    assert not found.reads.keys() & found.refuses.keys()
    assert all(len(reason) > 20 for reason in found.refuses.values())
    assert all("@" in needs.source or "0.20.0" in needs.source for needs in found.reads.values())


@pytest.mark.parametrize(("reader", "writer", "name"), READ)
def test_tensors_are_what_the_loader_requires(reader, writer, name):
    needs = READERS[reader].reads[writer, name]
    for group in (128, 64) if name in ("int4", "int4_awq", "w4a8_awq") else (None,):
        format = format_of(name, group)
        for shape in ((512, 768), (128, 2048)):
            assert misfits(needs, format.tensors(writer, shape), shape, format.group_size) == []


@pytest.mark.parametrize(("reader", "writer", "name"), READ)
def test_what_differs_is_told(reader, writer, name):
    needs, shape = READERS[reader].reads[writer, name], (512, 768)
    format = format_of(name)
    specs = format.tensors(writer, shape)
    for at, spec in enumerate(specs):
        others = [*specs[:at], *specs[at + 1 :]]
        assert misfits(needs, others, shape, format.group_size) == [f"{spec.suffix} is missing"]
        wrong = [*others, TensorSpec(spec.suffix, "F64", (*spec.shape, 3))]
        assert len(misfits(needs, wrong, shape, format.group_size)) == 2
    extra = [*specs, TensorSpec("weight_zero_point", "I8", (1,))]
    assert misfits(needs, extra, shape, format.group_size) == ["weight_zero_point is not known"]


def test_pre_quant_scales_have_the_dtype_of_the_model():
    format, shape = format_of("w4a8_awq"), (512, 768)
    needs = READERS["TensorRT-LLM"].reads["modelopt", "w4a8_awq"]
    assert misfits(needs, format.tensors("modelopt", shape, "F16"), shape, 128) == []
    assert misfits(needs, format.tensors("modelopt", shape, "F32"), shape, 128) == [
        "pre_quant_scale is F32, not BF16 or F16"
    ]


@pytest.mark.parametrize(("name", "writer"), PAIRS)
def test_writers_write_what_is_read(name, writer):
    format = format_of(name)
    if readers_of(writer, format):
        check_writable(writer, format)
        return
    with pytest.raises(FormatError, match=f"no reader takes .* {writer}") as caught:
        check_writable(writer, format)
    for reader in READERS:
        assert f"{reader}: " in str(caught.value)


def test_which_formats_each_writer_writes():
    written = {writer: {name for name in FORMATS if readers_of(writer, FORMATS[name])} for writer in WRITERS}
    assert written["modelopt"] == {
        *("fp8", "fp8_channel", "fp8_block", "nvfp4", "w4a16_nvfp4", "mxfp8"),
        *("w4a8_mxfp4_fp8", "int4_awq", "w4a8_awq", "int8_weight_only"),
    }
    assert written["compressed-tensors"] == {
        *("fp8", "fp8_channel", "fp8_block", "nvfp4", "w4a16_nvfp4", "mxfp4", "w4a16_mxfp4", "mxfp8"),
        *("int4", "int8", "int8_weight_only"),
    }
    # SmoothQuant has a home in neither while its scales are not folded into the layer before.
    assert set(FORMATS) - written["modelopt"] - written["compressed-tensors"] == {"int8_smoothquant"}


def test_mixtures():
    check_mixture("modelopt", [FORMATS["fp8"], FORMATS["nvfp4"], FORMATS["w4a16_nvfp4"]])
    check_mixture("modelopt", [FORMATS["fp8"], FORMATS["w4a8_awq"]])  # TensorRT-LLM
    check_mixture("compressed-tensors", [FORMATS["int4"], FORMATS["fp8_block"]])
    with pytest.raises(FormatError, match="no reader takes this mixture") as caught:
        check_mixture("modelopt", [FORMATS["mxfp8"], FORMATS["nvfp4"]])
    assert "vLLM: fp8, nvfp4, w4a16_nvfp4" in str(caught.value)
