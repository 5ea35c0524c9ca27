"""Shards of real Megatron models, quantised by ModelOpt on two ranks, are the parts of the packed whole."""

import pytest
import torch
from quant_cases import same_bytes
from quant_jobs import quantise_and_pack

from bridge_core.families import family_for
from bridge_core.geometry import Box
from bridge_quant_export.formats import format_of
from bridge_quant_export.formats.format import Calibration
from bridge_quant_export.formats.packing import pack, unpack

pytest.importorskip("megatron.core", reason="needs the extra bridge-core[mcore]")
pytest.importorskip("modelopt.torch.quantization", reason="needs the extra bridge-quant-export[modelopt]")

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


@pytest.mark.slow
@pytest.mark.parametrize(("config", "name"), [("FP8_DEFAULT_CFG", "fp8"), ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "int4")])
def test_shards_of_a_megatron_model(rank_pool, config, name):
    fields = family_for(CONFIG).to_megatron(CONFIG)
    first, second = rank_pool.run(quantise_and_pack, fields, {"tp": 2}, config, timeout_s=240)
    assert first.keys() == second.keys()
    assert len(first) >= 8  # two layers of four
    format = format_of(name)
    for layer, (found, dim, _, _) in first.items():
        assert found == second[layer][0] == name
        shards = [rank[layer][2] for rank in (first, second)]
        whole = torch.cat(shards, dim=dim)
        parts = [rank[layer][3] for rank in (first, second)]
        amax = None
        if name == "fp8":
            # One number for the tensor: that ModelOpt made the ranks agree on it is what makes shards fit together.
            assert same_bytes(parts[0]["weight_scale"], parts[1]["weight_scale"]), layer
            assert same_bytes(parts[0]["input_scale"], parts[1]["input_scale"]), layer
            amax = whole.abs().max()
        else:
            amax = whole.abs().view(whole.shape[0], -1, 128).amax(-1)
        known = Calibration(weight=amax, input=parts[0]["input_scale"] * 448 if name == "fp8" else None)
        expected = pack(whole, known, format=format, writer="modelopt")
        for number, part in enumerate(parts):
            start, shape = [0, 0], list(shards[number].shape)
            start[dim] = number * shape[dim]
            box = Box(tuple(start), tuple(shape))
            format.check_cut("modelopt", tuple(whole.shape), box)
            for tensor in format.stored("modelopt"):
                at = tensor.box(box)
                span = tuple(slice(begin, begin + size) for begin, size in zip(at.start, at.shape, strict=True))
                if tensor.suffix == "input_scale":
                    torch.testing.assert_close(part["input_scale"], expected["input_scale"])
                else:
                    assert same_bytes(part[tensor.suffix], expected[tensor.suffix][span]), (layer, tensor.suffix)
        assert not torch.equal(unpack(parts[0], format=format, writer="modelopt"), shards[0])
