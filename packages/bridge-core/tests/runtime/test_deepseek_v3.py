"""DeepSeek-V3 on live ranks: real mcore models with latent attention, a prediction layer and an fp32 expert bias.

mcore's prediction layer cannot be compared with transformers, which does not hold it: its weights are, to the bit.
"""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip(
    "megatron.core.models.hybrid",
    reason="megatron-core 0.16 builds prediction layers and latent attention by its global state alone",
)
transformers = pytest.importorskip("transformers", reason="the oracle is transformers")

from fp8_folders import BLOCK, as_read, load, quantise, same, write_fp8  # noqa: E402 - after the skips
from runtime.deepseek_jobs import expert_bias_after, fp8_round_trip  # noqa: E402
from runtime.live_jobs import round_trip  # noqa: E402

from bridge_core import AutoBridge, ParallelLayout, export_ckpt, import_ckpt, verify  # noqa: E402
from bridge_core.checkpoint.convert import Options  # noqa: E402
from bridge_core.dtypes import dtype_of  # noqa: E402
from bridge_core.testing.hf_layouts import save_published  # noqa: E402
from bridge_core.testing.hf_models import make_model  # noqa: E402
from bridge_core.testing.mcore_jobs import load_and_run  # noqa: E402

TOKENS = torch.tensor([[3, 17, 91, 130, 5, 64, 64, 2, 77, 11, 40, 8]])
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
MODELS = {
    "v3": ("deepseek_v3", {}, True),
    "yarn": ("deepseek_v3", {"rope_parameters": YARN, "routed_scaling_factor": 1.7}, False),
    "moonlight": ("deepseek_v3-moonlight", {}, False),
}
CASES = [
    ("v3", {}),
    ("v3", {"tp": 2}),
    ("v3", {"pp": 2}),
    ("v3", {"ep": 2, "dp": 2}),
    ("v3", {"tp": 2, "pp": 2, "num_layers_in_first_pipeline_stage": 3}),
    ("v3", {"tp": 2, "ep": 2, "etp": 1}),
    ("yarn", {"tp": 2}),
    ("moonlight", {}),
    ("moonlight", {"tp": 2}),
    ("moonlight", {"pp": 2, "ep": 2, "dp": 2}),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each model once: HF folder in the publisher's layout, imported checkpoint, transformers' logits."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model_name, changes, mtp = MODELS[name]
            model = make_model(model_name, **changes)
            save_published(model, folder / "hf", mtp=mtp)
            import_ckpt(folder / "hf", folder / "megatron")
            with torch.no_grad():
                made[name] = (folder / "hf", folder / "megatron", model(TOKENS).logits)
        return made[name]

    return make


def world(layout) -> range:
    return range(ParallelLayout(**layout).world_size)


@pytest.mark.parametrize(("name", "layout"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_load_run_save_and_stream(rank_pool, made, tmp_path, name, layout):
    folder, _, logits = made(name)
    out = tmp_path / "out"
    results = rank_pool.run(round_trip, str(folder), layout, "host", str(out), TOKENS, ranks=world(layout))
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    expected = load(folder)
    for streamed in (result["stream"] for result in results):
        assert streamed.keys() == expected.keys()
        assert all(same(streamed[key], tensor) for key, tensor in expected.items())
    assert set().union(*(result["parts"] for result in results)) == expected.keys()
    assert ("model.layers.4.eh_proj.weight" in expected) == (name == "v3")
    parts = {
        result["tp"]: result["logits"]
        for rank, result in enumerate(results)
        if result["logits"] is not None and ParallelLayout(**layout).coords(rank).dp == 0
    }
    got = torch.cat([parts[rank] for rank in sorted(parts)], dim=-1)[..., : logits.shape[-1]]
    assert (got - logits).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("v3", {"tp": 2, "pp": 2}),
        ("v3", {"tp": 2, "ep": 2, "etp": 1}),
        ("yarn", {"ep": 2, "dp": 2}),
        ("moonlight", {"tp": 2}),
        ("moonlight", {"pp": 2}),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_mcore_loads_an_import_and_what_it_saves_is_exported(rank_pool, made, tmp_path, name, layout):
    """mcore's own `dist_checkpointing`, at its default strictness, there and back."""
    hf, megatron, logits = made(name)
    bridge = AutoBridge.from_hf_pretrained(hf)
    saved = tmp_path / "saved"
    saved.mkdir()
    results = rank_pool.run(
        load_and_run,
        bridge.fields,
        layout,
        str(megatron / "iter_0000000"),
        TOKENS,
        spec="host",
        save_to=str(saved),
        ranks=world(layout),
    )
    parts = {
        tp: part
        for rank, (_, part, tp) in enumerate(results)
        if part is not None and ParallelLayout(**layout).coords(rank).dp == 0
    }
    got = torch.cat([parts[rank] for rank in sorted(parts)], dim=-1)[..., : logits.shape[-1]]
    assert (got - logits).abs().max() <= 1e-4
    export_ckpt(saved, tmp_path / "hf", source=hf)
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def test_without_mtp_the_model_is_smaller_and_says_so(made, tmp_path):
    hf, _, _ = made("v3")
    report = import_ckpt(hf, tmp_path / "megatron", ignore=["model.layers.4.*"])
    assert all(name.startswith("model.layers.4.") for name in report.ignored)
    assert len(report.ignored) > 30
    export_ckpt(tmp_path / "megatron", tmp_path / "hf")
    expected = {name: tensor for name, tensor in load(hf).items() if not name.startswith("model.layers.4.")}
    got = load(tmp_path / "hf")
    assert got.keys() == expected.keys()
    assert all(same(got[name], tensor) for name, tensor in expected.items())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return write_fp8(tmp_path_factory.mktemp("made") / "fp8")


@pytest.mark.parametrize(
    "layout",
    [{"tp": 2}, {"tp": 4, "ep": 2, "etp": 1}, {"tp": 2, "pp": 2}, {"ep": 2, "dp": 2}],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_fp8_into_live_ranks_and_out_again(rank_pool, fp8, tmp_path, layout):
    """Loaded, every rank has read its own blocks; saved and streamed, the codes and scales are those of the whole."""
    tensors = load(fp8)
    plain = as_read(tensors)
    expected = {}  # in the blocks of the folder
    for name, tensor in plain.items():
        expected[name] = tensor
        if tensors[name].dtype == torch.float8_e4m3fn:
            expected[name], expected[name + "_scale_inv"] = quantise(tensor, BLOCK)
    for node in (False, True):
        out = tmp_path / f"out-{node}"
        results = rank_pool.run(fp8_round_trip, str(fp8), layout, str(out), node, ranks=world(layout))
        got = load(out)
        assert got.keys() == expected.keys()
        assert all(same(got[name], tensor) for name, tensor in expected.items()), [
            name for name, tensor in expected.items() if not same(got[name], tensor)
        ]
        config = json.loads((out / "config.json").read_text())
        assert config["quantization_config"] == json.loads((fp8 / "config.json").read_text())["quantization_config"]
        assert sum(result["written"] for result in results) == sum(t.nbytes for t in expected.values())
        for result in results:
            assert [meta.name for meta in result["planned"]] == [name for name, _ in result["stream"]]
            assert [meta.name for meta in result["metadata"]] == [name for name, _ in result["stream"]]
            assert {name for name, _ in result["stream"]} == expected.keys()
            for meta, (name, data) in zip(result["metadata"], result["stream"], strict=True):
                assert torch.equal(data, expected[name].contiguous().view(torch.uint8)), name
                assert (meta.shape, meta.nbytes) == (tuple(expected[name].shape), expected[name].nbytes)
                assert dtype_of(meta.dtype).torch == str(expected[name].dtype).removeprefix("torch.")
        if not node:
            # Never more than the codes that it holds, and the scales of blocks that it has a part of.
            for result in results:
                assert result["codes"] < result["read"] < 1.2 * result["codes"] + result["plain"]


def test_the_expert_bias_stays_in_float32(rank_pool, fp8):
    for dtypes, equal in rank_pool.run(expert_bias_after, str(fp8), ranks=[0]):
        assert dtypes == {"F32"}
        assert equal


def test_a_verified_import_of_fp8_is_that_of_the_plain_folder(fp8, tmp_path):
    import_ckpt(fp8, tmp_path / "megatron")
    export_ckpt(tmp_path / "megatron", tmp_path / "plain")
    assert verify(tmp_path / "plain", fp8).ok


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_an_expert_bias_keeps_the_dtype_that_it_is_published_in(made, tmp_path, stored):
    """Moonlight publishes it in bfloat16, DeepSeek-V3 in float32; neither is cast, whatever is asked for."""
    from safetensors.torch import save_file

    hf, _, _ = made("moonlight")
    tensors = {
        name: tensor.to(stored if name.endswith("correction_bias") else torch.bfloat16)
        for name, tensor in load(hf).items()
    }
    source = tmp_path / "hf"
    source.mkdir()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text((hf / "config.json").read_text())
    import_ckpt(source, tmp_path / "megatron", options=Options(dtype="fp32"))
    export_ckpt(tmp_path / "megatron", tmp_path / "out", options=Options(dtype="bf16"))
    found = load(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensor) for name, tensor in tensors.items())
