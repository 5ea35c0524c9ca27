"""Quantisers of a checkpoint as ModelOpt saves those of grouped experts, which it cannot build without a GPU."""

from __future__ import annotations

import io

import pytest
import torch

from bridge_core.checkpoint.dcp import read_dcp
from bridge_core.checkpoint.keys import Place
from bridge_core.errors import BridgeError
from bridge_core.geometry import Box
from bridge_quant_export.saved.quantisers import _Saved

checkpoint = pytest.importorskip("torch.distributed.checkpoint")

MODULE, EXPERTS, SHAPE = "decoder.layers.3.mlp.experts.experts.linear_fc1", 4, (256, 128)
FP8 = {"_num_bits": (4, 3), "_axis": None, "_block_sizes": None, "_dynamic": False, "_disabled": False}
INT4 = FP8 | {"_num_bits": 4, "_block_sizes": {-1: 128, "type": "static"}}
OFF = FP8 | {"_disabled": True}


def save(folder, state):
    """Lists stay objects, as megatron-core saves them."""
    planner = checkpoint.DefaultSavePlanner(flatten_state_dict=False)
    checkpoint.save(state, checkpoint_id=folder, no_dist=True, planner=planner)


def write(folder, settings, tensors):
    """A torch_dist folder with the state of one module, under the keys of ModelOpt 0.47 for stacked experts."""
    buffer = io.BytesIO()
    torch.save({"modelopt_quantizer_state": settings, "modelopt_real_quantizer_state": None}, buffer)
    state = [torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)]
    objects = {f"{MODULE}._extra_state/shard_{expert}_{EXPERTS}": state for expert in range(EXPERTS)}
    found = {f"{MODULE}.{name}": tensor for name, tensor in tensors.items()}
    save(folder, {**objects, **found})
    return _Saved(read_dcp(folder))


def place(expert):
    return Place(f"{MODULE}.weight", (expert,), (EXPERTS,), Box((0, 0), SHAPE))


@pytest.mark.filterwarnings("ignore")
def test_experts_with_a_quantiser_each(tmp_path):
    # This rank had two of the four experts; ranges are stacked by their global numbers.
    settings = {"weight_quantizer.0": FP8, "weight_quantizer.1": FP8, "input_quantizer": FP8, "output_quantizer": OFF}
    ranges = torch.tensor([1.0, 2.0, 3.0, 4.0])
    saved = write(tmp_path, settings, {"weight_quantizer._amax": ranges, "input_quantizer._amax": torch.tensor([7.0])})
    for expert in range(EXPERTS):
        state = saved.layer(place(expert), SHAPE, gated=True)
        assert state is not None
        assert state.format.name == "fp8"
        assert state.calibration.weight is not None
        assert state.calibration.input is not None
        assert state.calibration.weight.item() == expert + 1
        assert state.calibration.input.item() == 7


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nested", [True, False])
def test_a_weight_that_is_quantised_twice(tmp_path, nested):
    inside = "weight_quantizer.0." if nested else "weight_quantizer."
    settings = {f"{inside}0": INT4, f"{inside}1": FP8, "input_quantizer": FP8}
    scale = torch.rand(SHAPE[1]) + 0.5
    first = torch.rand(EXPERTS, SHAPE[0], 1) + 0.1
    tensors = {
        "weight_quantizer.0._amax": first,
        "weight_quantizer.1._amax": torch.arange(1.0, 1 + EXPERTS),
        "input_quantizer._amax": torch.tensor([7.0]),
        "input_quantizer._pre_quant_scale": scale,
    }
    state = write(tmp_path, settings, tensors).layer(place(2), SHAPE, gated=False)
    assert state is not None
    assert state.format.name == "w4a8_awq"
    known = state.calibration
    assert torch.equal(known.weight, first[2])
    assert known.weight_2.item() == 3
    assert torch.equal(known.pre_quant_scale, scale)


@pytest.mark.filterwarnings("ignore")
def test_what_is_switched_off_or_no_state_is_unquantised_or_refused(tmp_path):
    saved = write(tmp_path / "off", {"weight_quantizer": OFF, "input_quantizer": OFF}, {"other": torch.zeros(1)})
    assert saved.layer(place(0), SHAPE, gated=False) is None
    other = Place("decoder.layers.0.mlp.linear_fc2.weight", (), (), Box((0, 0), SHAPE))
    assert saved.layer(other, SHAPE, gated=False) is None
    broken = {f"{MODULE}._extra_state/shard_0_{EXPERTS}": [torch.ones(9, dtype=torch.uint8)], "x": torch.zeros(1)}
    save(tmp_path / "broken", broken)
    with pytest.raises(BridgeError, match="cannot be read"):
        _Saved(read_dcp(tmp_path / "broken")).layer(place(0), SHAPE, gated=False)


@pytest.mark.filterwarnings("ignore")
def test_ranges_without_settings_are_not_taken_for_an_unquantised_layer(tmp_path):
    save(tmp_path / "bare", {f"{MODULE}.weight_quantizer._amax": torch.ones(EXPERTS), "other": torch.zeros(1)})
    with pytest.raises(BridgeError, match="settings of its quantisers are missing"):
        _Saved(read_dcp(tmp_path / "bare")).layer(place(0), SHAPE, gated=False)
    attention = "decoder.layers.3.self_attention.core_attention"
    save(tmp_path / "kv", {f"{attention}.k_bmm_quantizer._amax": torch.ones(1), "other": torch.zeros(1)})
    with pytest.raises(BridgeError, match="settings of its quantisers are missing"):
        _Saved(read_dcp(tmp_path / "kv")).kv(attention, place(0))
