"""The promise of an offline import, kept by megatron-core itself: its models load the result at any layout.

Loading goes through mcore's `dist_checkpointing.load` at its default strictness. What is compared: every
parameter of every rank with the plan's pieces, bit for bit; the logits with transformers'.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from bridge_core import AutoBridge, ParallelLayout, export_ckpt, import_ckpt
from bridge_core.checkpoint.hf_folder import open_hf
from bridge_core.testing.hf_models import make_model, save_model
from bridge_core.testing.mcore_jobs import load_and_run

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the oracle is transformers")

TOKENS = torch.tensor([[3, 17, 91, 130, 5, 64, 64, 2, 77, 11, 40, 8]])

LAYOUTS = [
    {"tp": 2},
    {"pp": 2},
    {"tp": 2, "pp": 2},
    {"pp": 2, "vpp": 2},
    {"pp": 2, "num_layers_in_first_pipeline_stage": 1},
]
EXPERT_LAYOUTS = [{"ep": 2, "dp": 2}, {"tp": 2, "ep": 2, "etp": 1, "dp": 1}, {"tp": 2, "ep": 2, "etp": 2, "dp": 2}]
CASES = [
    *(("llama", layout, "host") for layout in LAYOUTS),
    ("llama-tied", {"pp": 2}, "host"),
    ("llama-tied", {"tp": 2}, "local"),
    ("qwen2", {"tp": 2}, "host"),
    ("qwen2", {"tp": 4}, "local"),
    ("qwen3", {"tp": 2}, "local"),
    ("qwen3", {"tp": 4}, "host"),
    *(("qwen3_moe", layout, "host") for layout in [*LAYOUTS, *EXPERT_LAYOUTS]),
    *(("qwen3_moe", layout, "local") for layout in EXPERT_LAYOUTS),
    ("qwen3_moe-mixed", {"tp": 2}, "host"),
    ("qwen3_moe-mixed", {"pp": 2, "ep": 2, "dp": 2}, "local"),
    ("mixtral", {"tp": 2, "ep": 2, "etp": 1}, "host"),
    ("mixtral", {"ep": 4, "dp": 4}, "local"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each model once: HF folder, imported checkpoint, transformers' logits."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = make_model(name)
            save_model(model, folder / "hf", max_shard_size="300KB")
            import_ckpt(folder / "hf", folder / "megatron")
            with torch.no_grad():
                logits = model(TOKENS).logits
            made[name] = (folder / "hf", folder / "megatron", logits)
        return made[name]

    return make


def parallel_layout(layout: dict) -> ParallelLayout:
    return ParallelLayout(**layout)


def expected_parameters(bridge: AutoBridge, hf, layout: ParallelLayout, rank: int, **options) -> dict:
    """What the plan says this rank holds, cut out of the HF tensors."""
    flat = {
        name: np.fromfile(tensor.path, np.float32, tensor.nbytes // 4, offset=tensor.offset)
        for name, tensor in hf.tensors.items()
    }
    found = {}
    for shard in bridge.plan(layout, **options).local_shards(rank):
        local = np.zeros(int(np.prod(shard.shape)), np.float32)
        for piece in shard.pieces:
            source = flat[piece.source.tensor][piece.source.offset :]
            target = local[piece.target.offset :]
            strides = [[4 * s for s in view.strides] for view in (piece.source, piece.target)]
            view = np.lib.stride_tricks.as_strided
            view(target, piece.shape, strides[1])[...] = view(source, piece.shape, strides[0])
        found[shard.chunk, shard.param] = local.reshape(shard.shape)
    return found


def assert_equal_parameters(found: dict, expected: dict, *, spec: str) -> None:
    """Every parameter of the model is a shard of the plan, and the other way round."""
    if spec == "local":
        found = {(chunk, canonical(name, expected)): value for (chunk, name), value in found.items()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert np.array_equal(found[key].numpy().view(np.int32), value.view(np.int32)), key


def canonical(name: str, expected: dict) -> str:
    """mcore's local parameter names to the canonical ones, written out by hand."""
    for pattern, replacement in (
        (r"input_layernorm\.", "self_attention.linear_qkv.layer_norm_"),
        (r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight", r"mlp.experts.\2.weight\1"),
    ):
        name = re.sub(pattern, replacement, name)
    names = {param for _, param in expected}
    # In a dense layer the norm belongs to linear_fc1, in a layer with experts it stands alone.
    return name if name in names else name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")


@pytest.mark.parametrize(("name", "layout", "spec"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_mcore_loads_an_imported_checkpoint(device_ranks, made, name, layout, spec):
    hf_path, megatron, logits = made(name)
    bridge = AutoBridge.from_hf_pretrained(hf_path)
    wanted = parallel_layout(layout)
    results = device_ranks.run(
        load_and_run,
        bridge.fields,
        layout,
        str(megatron / "iter_0000000"),
        TOKENS,
        spec=spec,
        ranks=range(wanted.world_size),
    )
    hf = open_hf(hf_path)
    for rank, (params, _, _) in enumerate(results):
        assert_equal_parameters(params, expected_parameters(bridge, hf, wanted, rank), spec=spec)
    compare_logits(results, logits, wanted)


def compare_logits(results, expected, layout: ParallelLayout) -> None:
    """The vocabulary-parallel logits of the last stage, put together, equal transformers'."""
    parts = {}
    for rank, (_, logits, tp_rank) in enumerate(results):
        if logits is not None and layout.coords(rank).dp == 0 and layout.coords(rank).cp == 0:
            parts[tp_rank] = logits
    got = torch.cat([parts[tp_rank] for tp_rank in sorted(parts)], dim=-1)[..., : expected.shape[-1]]
    assert (got - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "layout", "spec"),
    [
        ("llama", {"tp": 2, "pp": 2}, "host"),
        ("llama-tied", {"pp": 2}, "local"),
        ("qwen2", {"tp": 4}, "local"),
        ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1}, "host"),
        ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 2, "dp": 2}, "local"),
        ("qwen3_moe", {"pp": 2, "ep": 2, "dp": 2}, "host"),
        ("qwen3_moe-mixed", {"pp": 2, "ep": 2, "dp": 2}, "host"),
        ("mixtral", {"pp": 2, "vpp": 2}, "host"),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_what_mcore_saved_at_any_layout_is_exported_to_the_original(device_ranks, made, tmp_path, name, layout, spec):
    """mcore loads at one layout and saves; the export equals the model that was imported, file for file."""
    hf_path, megatron, _ = made(name)
    bridge = AutoBridge.from_hf_pretrained(hf_path)
    saved = tmp_path / "saved"
    saved.mkdir()
    device_ranks.run(
        load_and_run,
        bridge.fields,
        layout,
        str(megatron / "iter_0000000"),
        TOKENS,
        spec=spec,
        save_to=str(saved),
        ranks=range(parallel_layout(layout).world_size),
    )
    export_ckpt(saved, tmp_path / "hf", source=hf_path)
    for file in sorted(hf_path.glob("*.safetensors*")):
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes(), file.name
