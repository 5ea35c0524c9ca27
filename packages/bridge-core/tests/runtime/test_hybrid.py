"""Real hybrid models on gloo ranks: Nemotron-H's weights in, out, streamed, checkpointed by mcore itself, and run.

Mamba's kernels need a GPU; here a mixer runs as `mamba_reference` defines it, on mcore's parameters and projections.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from runtime.hybrid_jobs import bfloat16_round_trip, keys_of, load_by_mcore, round_trip
from runtime.test_checkpoints_on_ranks import expected_parameters

from bridge_core import AutoBridge, ParallelLayout, export_ckpt, import_ckpt, verify
from bridge_core.checkpoint.dcp import read_dcp
from bridge_core.checkpoint.hf_folder import open_hf
from bridge_core.checkpoint.keys import extra_state_keys, places, stacked_shape, written_forms
from bridge_core.errors import ConfigError
from bridge_core.runtime.provider_hybrid import pattern_with_pipeline, stack_spec
from bridge_core.testing.hf_layouts import save_published
from bridge_core.testing.hf_models import make_model
from bridge_core.testing.mamba import mamba_layers
from bridge_core.topology.hybrid_pattern import parse_hybrid_pattern

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core.models.hybrid", reason="hybrid models need megatron-core 0.17")
pytest.importorskip("transformers", reason="the oracle is transformers")

TOKENS = torch.tensor([[3, 17, 91, 130, 5, 64, 64, 2, 77, 11, 40, 8]])
LAYOUTS = [
    {"tp": 2, "etp": 2},
    {"pp": 2},
    {"ep": 2, "dp": 2},
    {"tp": 2, "ep": 2, "etp": 1},
    {"tp": 2, "pp": 2, "etp": 1},
    {"pp": 2, "vpp": 2},
    {"pp": 2, "num_layers_in_first_pipeline_stage": 3},
    {"pp": 2, "pipeline_model_parallel_layout": "Ettttt|tttmL"},
]


def name_of(value) -> str:
    return str(value).replace(" ", "")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each model once: HF folder in the publisher's layout, imported checkpoint, transformers' logits."""
    found = {}

    def make(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            model = make_model(name)
            save_published(model, folder / "hf")
            import_ckpt(folder / "hf", folder / "megatron")
            with torch.no_grad():
                found[name] = folder / "hf", folder / "megatron", model(TOKENS).logits
        return found[name]

    return make


@pytest.mark.parametrize(
    ("name", "layout"),
    [*(("nemotron_h-latent", layout) for layout in LAYOUTS), ("nemotron_h", {"tp": 2, "ep": 2, "etp": 1})],
    ids=name_of,
)
def test_load_save_stream_and_run(rank_pool, made, tmp_path, name, layout):
    folder, _, logits = made(name)
    sizes = ParallelLayout(**layout)
    results = rank_pool.run(
        round_trip, str(folder), layout, str(tmp_path / "out"), TOKENS, ranks=range(sizes.world_size)
    )
    verify(folder, tmp_path / "out").raise_if_different()
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    expected = AutoBridge.from_hf_pretrained(folder).plan().metadata()
    assert sum(result["saved"] for result in results) == sum(meta.nbytes for meta in expected)
    placement = AutoBridge.from_hf_pretrained(folder).plan(sizes).placement
    chunks = [len(stage.decoder_layers) for stage in placement.stages]
    for result in results:
        assert {tuple(map(len, parse_hybrid_pattern(text).chunks)) for text in result["patterns"]} == {tuple(chunks)}
        assert result["order"] == [meta.name for meta in expected]
        assert result["loaded"] <= result["held"]
    compare_stream(results, folder)
    compare_logits([(result["tp"], result["logits"]) for result in results], logits, sizes)


def compare_stream(results, folder) -> None:
    from safetensors.torch import load_file

    expected = load_file(folder / "model.safetensors")
    for got in (result["stream"] for result in results):
        assert got.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(got[key].view(torch.int32), tensor.view(torch.int32)), key


def compare_logits(results, expected, layout: ParallelLayout) -> None:
    parts = {
        tp: logits for rank, (tp, logits) in enumerate(results) if logits is not None and layout.coords(rank).dp == 0
    }
    got = torch.cat([parts[tp] for tp in sorted(parts)], dim=-1)[..., : expected.shape[-1]]
    assert (got - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("nemotron_h-latent", layout) for layout in [*LAYOUTS[:4], LAYOUTS[5]]),
        ("nemotron_h", {"tp": 2, "pp": 2, "etp": 1}),
    ],
    ids=name_of,
)
def test_mcore_loads_an_imported_checkpoint_and_saves_it(rank_pool, made, tmp_path, name, layout):
    """By its own `dist_checkpointing` at default strictness; what it saves is exported to the very files."""
    folder, megatron, logits = made(name)
    sizes = ParallelLayout(**layout)
    saved = tmp_path / "saved"
    saved.mkdir()
    iteration = str(megatron / "iter_0000000")
    results = rank_pool.run(
        load_by_mcore, str(folder), iteration, layout, TOKENS, str(saved), ranks=range(sizes.world_size)
    )
    bridge, hf = AutoBridge.from_hf_pretrained(folder), open_hf(folder)
    for rank, (found, _, _) in enumerate(results):
        expected = expected_parameters(bridge, hf, sizes, rank, make_vocab_size_divisible_by=16)
        named = {(chunk, name.replace("conv1d_", "conv1d.")): value for (chunk, name), value in found.items()}
        assert named.keys() == expected.keys()
        for key, value in expected.items():
            assert np.array_equal(named[key].numpy().view(np.int32), value.view(np.int32)), key
    compare_logits([(tp, values) for _, values, tp in results], logits, sizes)
    export_ckpt(saved, tmp_path / "hf", source=folder)
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["nemotron_h", "nemotron_h-latent"])
def test_the_keys_of_an_import_are_those_of_mcore(rank_pool, made, name):
    folder, megatron, _ = made(name)
    theirs = {}
    for found in rank_pool.run(keys_of, str(folder), {"tp": 2, "pp": 2, "etp": 1}, ranks=range(4)):
        theirs |= found
    ours = read_dcp(megatron / "iter_0000000")
    aliases = {key for key in ours.tensors if key not in theirs and key.endswith("linear_fc1.layer_norm_weight")}
    shapes = {key: tuple(tensor.shape) for key, tensor in ours.tensors.items() if key not in aliases}
    vocabulary = {"embedding.word_embeddings.weight", "output_layer.weight"}  # padded on the ranks
    assert {key: shape for key, shape in theirs.items() if shape and key not in vocabulary} == {
        key: shape for key, shape in shapes.items() if key not in vocabulary
    }
    assert {key for key, shape in theirs.items() if shape is None} <= ours.objects.keys()
    assert "output_layer._extra_state/shard_0_1" in ours.objects


def test_the_keys_of_two_depths_of_prediction_are_those_of_mcore(rank_pool, made, tmp_path):
    """No weights: the model that mcore builds from the configuration, against the keys of the plan."""
    folder, _, _ = made("nemotron_h-latent")
    config = json.loads((folder / "config.json").read_text()) | {
        "num_nextn_predict_layers": 2,
        "mtp_layers_block_type": ["full_attention", "linear_attention", "moe"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = {}
    for found in rank_pool.run(keys_of, str(tmp_path), {"pp": 2}, ranks=range(2)):
        theirs |= found
    entries = AutoBridge.from_hf_config(config).plan(make_vocab_size_divisible_by=16).entries
    forms = written_forms(entries)
    ours = {
        place.key: stacked_shape(place)
        for entry in entries
        for layer, expert in entry.instances()
        for place in places(entry, forms[entry.block], layer, expert)
    }
    assert {key: shape for key, shape in theirs.items() if shape} == ours
    assert {key for key, shape in theirs.items() if shape is None} <= set(extra_state_keys(entries, forms))
    assert "mtp.layers.1.mtp_model_layer.layers.1.mixer.conv1d.bias.C" in ours


def test_mamba_layers_leave_megatron_as_it_was():
    from megatron.core.ssm import mamba_context_parallel, mamba_mixer

    if mamba_mixer.HAVE_MAMBA_SSM:
        pytest.skip("mamba-ssm is installed: there is nothing to stand in for")
    before = dict(vars(mamba_mixer)), dict(vars(mamba_context_parallel))

    def fail():
        with mamba_layers():
            assert mamba_mixer.HAVE_MAMBA_SSM
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert (dict(vars(mamba_mixer)), dict(vars(mamba_context_parallel))) == before


@pytest.mark.parametrize(
    ("text", "layout", "depths", "expected"),
    [
        ("M*E-/*E", {}, 1, "M*E-/*E"),
        ("M*E-/*E", {"pp": 2}, None, "M*|E-"),
        ("M*E-/*E", {"pp": 2, "vpp": 2}, 2, "M|*|E|-/*E/*E"),
        ("M*E-", {"pp": 2, "num_layers_in_last_pipeline_stage": 1}, None, "M*E|-"),
        ("M*E-", {"pp": 2, "pipeline_model_parallel_layout": "Etttt|L"}, None, "M*E-|"),
    ],
)
def test_a_provider_spells_the_pipeline_out(text, layout, depths, expected):
    assert pattern_with_pipeline(text, ParallelLayout(**layout), depths) == expected


def test_a_trainer_may_spell_the_pipeline_out_itself(made):
    folder, _, _ = made("nemotron_h")
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider(spec="host")
    provider.pipeline_model_parallel_size = 2
    provider.hybrid_layer_pattern = "ME|M|*-|EM*/*E"
    assert provider.layout.vpp == 2
    assert provider.layout.pipeline_model_parallel_layout == "Ett|t|tt|tttmL"
    assert pattern_with_pipeline(provider.hybrid_layer_pattern, provider.layout, 1) == "ME|M|*-|EM*/*E"
    with pytest.raises(ConfigError, match=r"last pipeline stage[\s\S]*Ettm\|L[\s\S]*mtp_num_layers to None"):
        pattern_with_pipeline("M*/*E", ParallelLayout(pp=2, pipeline_model_parallel_layout="Ettm|L"), 1)


def test_a_hybrid_model_of_mcores_local_modules_is_refused():
    with pytest.raises(ConfigError, match=r"hybrid models[\s\S]*te or host[\s\S]*local[\s\S]*spec='host'"):
        stack_spec("local", None)


def test_what_mcore_keeps_in_float32_is_never_cast(rank_pool, made, tmp_path):
    """On disk in bfloat16 as published; live and saved in float32, with the same values. The expert bias always is."""
    from safetensors.torch import load_file, save_file

    folder, _, _ = made("nemotron_h")
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = {
        key: tensor if key.endswith("e_score_correction_bias") else tensor.bfloat16()
        for key, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors")
    live = rank_pool.run(bfloat16_round_trip, str(source), {"tp": 2, "etp": 2}, str(tmp_path / "out"), ranks=[0, 1])[0]
    wide = {name for name, dtype in live.items() if dtype == "torch.float32"}
    assert {name.rpartition(".")[2] for name in wide} == {"A_log", "D", "expert_bias"}
    back = load_file(tmp_path / "out/model.safetensors")
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        float32 = key.endswith((".A_log", ".D", "e_score_correction_bias"))
        assert back[key].dtype == (torch.float32 if float32 else torch.bfloat16), key
        assert torch.equal(back[key], tensor.to(back[key].dtype)), key
    # Offline nothing is cast: the bytes are the source's.
    import_ckpt(source, tmp_path / "megatron")
    export_ckpt(tmp_path / "megatron", tmp_path / "offline", source=source)
    assert (tmp_path / "offline/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
