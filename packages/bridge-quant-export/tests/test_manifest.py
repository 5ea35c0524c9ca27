"""What an export will write, by arithmetic: at sizes that no machine here holds."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from threading import Barrier

import pytest

from bridge_core import AutoBridge, ParallelLayout
from bridge_core.checkpoint.output import write_folder
from bridge_quant_export.configs import modelopt
from bridge_quant_export.errors import FormatError
from bridge_quant_export.formats import format_of
from bridge_quant_export.manifest import Instance, hf_instances, make_manifest, quantisable

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 8192,
    "intermediate_size": 16384,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 108,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts": 512,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def formats_of(plan, name):
    """Every linear layer but router and head in one format."""
    left = ("router", "output_layer")
    entries = [e for e in plan.entries if quantisable(e) and not any(word in e.name for word in left)]
    return {Instance(e.name, *where): format_of(name) for e in entries for where in e.instances()}


def dtypes_of(plan):
    return dict.fromkeys(plan.hf_tensors, "BF16")


SUPER = Path(__file__).parents[2] / "bridge-core" / "tests" / "published" / "nemotron-3-super-120b-a12b.json"
# As Nemotron-3 Super, with the proportions of Ultra: 108 layers over 9 stages of 12.
ULTRA = json.loads(SUPER.read_text()) | {
    "hidden_size": 8192,
    "hybrid_override_pattern": "MEMEMEMEM*E" * 9 + "MEMEMEMEM",
    "num_hidden_layers": 108,
    "intermediate_size": 5120,
    "mamba_num_heads": 256,
    "moe_intermediate_size": 5120,
    "moe_latent_size": 2048,
    "moe_shared_expert_intermediate_size": 10240,
    "num_attention_heads": 64,
    "n_routed_experts": 512,
}


def test_a_hybrid_of_108_layers_and_512_experts_on_72_ranks():
    """PP9 x TP1 x EP8: every expert of every layer once, in the manifest and over the ranks."""
    plan = AutoBridge.from_hf_config(ULTRA).plan(ParallelLayout(tp=1, pp=9, ep=8))
    moe = [layer for layer, kind in enumerate(ULTRA["hybrid_override_pattern"]) if kind == "E"]
    found = make_manifest(plan, formats_of(plan, "nvfp4"), writer="modelopt", dtypes=dtypes_of(plan))
    experts = {
        f"{at}.mixer.experts.{expert}.{which}_proj"
        for at in [*(f"backbone.layers.{layer}" for layer in moe), "mtp.layers.1"]
        for expert in range(512)
        for which in ("up", "down")
    }
    assert {name for name in found.layers.quantized if ".experts." in name} == experts
    for name in experts:
        rows, columns = (5120, 2048) if name.endswith("up_proj") else (2048, 5120)
        assert found.shapes[f"{name}.weight"] == (rows, columns // 2)
        assert found.shapes[f"{name}.weight_scale"] == (rows, columns // 16)
        assert found.shapes[f"{name}.weight_scale_2"] == found.shapes[f"{name}.input_scale"] == ()
        assert found.dtypes[f"{name}.input_scale"] == "F32"
    # Over the ranks: the experts of a stage lie on its eight ranks, each on one.
    held = Counter(
        (shard.entry, shard.layer, shard.expert)
        for rank in range(plan.layout.world_size)
        for shard in plan.iter_local_shards(rank)
        if "{expert}" in shard.entry
    )
    assert plan.layout.world_size == 72
    assert set(held.values()) == {1}
    assert len(held) == len(experts)
    # What a rank packs at a time is one shard, and none is larger than the largest weight of a layer.
    weights = [prod(shape) for name, shape in plan.hf_tensors.items() if re.match(r"(backbone|mtp)\.layers\.", name)]
    shards = (shard for rank in range(72) for shard in plan.iter_local_shards(rank) if shard.entry.startswith(LAYERS))
    assert max(prod(shard.shape) for shard in shards) == max(weights)
    inline, beside = modelopt.compose(found.layers, producer_version="0.47.0")
    assert beside["quantization"]["quant_algo"] == inline["quant_algo"] == "NVFP4"
    routers = {f"backbone.layers.{layer}.mixer.gate" for layer in moe}
    assert routers | {"lm_head", "backbone.embeddings"} <= set(inline["ignore"])
    assert not experts & set(inline["ignore"])


LAYERS = ("decoder.layers", "mtp.layers")


def test_its_configurations_are_written_once_after_all_ranks_are_done(tmp_path):
    """72 workers of one folder, as threads: one prepares, all fill, and then one of them finishes it."""
    size, events = 72, []
    barrier, failures = Barrier(size, timeout=60), [None] * size

    class Thread:
        def __init__(self, rank):
            self.rank, self.size = rank, size

        def together(self, step):
            try:
                step()
            except Exception as error:
                failures[self.rank] = error
            barrier.wait()
            assert not any(failures), failures

    def run(rank):
        write_folder(
            tmp_path / "out",
            0,
            Thread(rank),
            lambda folder: events.append("prepare"),
            lambda folder, rank, size: (time.sleep(rank % 7 / 1000), events.append("fill"))[0],
            lambda folder: (events.append("finish"), (folder / "config.json").write_text("{}"))[0],
            overwrite=False,
        )

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(run, range(size)))
    assert events == ["prepare", *["fill"] * size, "finish"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["config.json"]


@pytest.mark.parametrize("writer", ["modelopt", "compressed-tensors"])
def test_the_manifest_is_that_of_every_layout(writer):
    small = CONFIG | {"num_hidden_layers": 4, "num_experts": 8}
    bridge = AutoBridge.from_hf_config(small)
    made = []
    for sizes in ({}, {"tp": 2, "pp": 2}, {"pp": 2, "ep": 4, "dp": 4}, {"tp": 4, "ep": 2, "etp": 2}):
        plan = bridge.plan(ParallelLayout(**sizes), make_vocab_size_divisible_by=128)
        found = make_manifest(plan, formats_of(plan, "fp8"), writer=writer, dtypes=dtypes_of(plan))
        made.append((list(found.shapes.items()), list(found.dtypes.items()), found.layers))
    assert all(other == made[0] for other in made)
    assert found.shapes["model.embed_tokens.weight"] == (151936, 8192)


def test_tensors_of_an_instance_are_named_once():
    plan = AutoBridge.from_hf_config(CONFIG | {"num_hidden_layers": 2, "num_experts": 4}).plan()
    names = [name for _, name, _ in hf_instances(plan)]
    assert names == list(plan.hf_tensors)


def test_formats_that_nobody_reads_are_refused_before_anything_else():
    plan = AutoBridge.from_hf_config(CONFIG | {"num_hidden_layers": 2, "num_experts": 4}).plan()
    with pytest.raises(FormatError, match="no reader takes INT4 in the modelopt format") as caught:
        make_manifest(plan, formats_of(plan, "int4"), writer="modelopt", dtypes=dtypes_of(plan))
    assert "compressed-tensors" in str(caught.value.fix)


def test_a_weight_that_no_block_fits_is_named():
    plan = AutoBridge.from_hf_config(CONFIG | {"num_hidden_layers": 2, "num_experts": 4, "hidden_size": 8200}).plan()
    with pytest.raises(FormatError, match="into blocks") as caught:
        make_manifest(plan, formats_of(plan, "nvfp4"), writer="modelopt", dtypes=dtypes_of(plan))
    assert "proj.weight" in str(caught.value.where)


def test_mixed_precision_names_each_layer():
    plan = AutoBridge.from_hf_config(CONFIG | {"num_hidden_layers": 2, "num_experts": 4}).plan()
    formats = {
        instance: format_of("nvfp4" if "experts" in instance.entry else "fp8") for instance in formats_of(plan, "fp8")
    }
    found = make_manifest(plan, formats, writer="modelopt", dtypes=dtypes_of(plan))
    _, beside = modelopt.compose(found.layers, producer_version="0.47.0")
    layers = beside["quantization"]["quantized_layers"]
    assert layers["model.layers.1.mlp.experts.3.up_proj"] == {"quant_algo": "NVFP4", "group_size": 16}
    assert layers["model.layers.1.self_attn.q_proj"] == {"quant_algo": "FP8"}
    assert len(layers) == 2 * (4 + 4 * 3)
