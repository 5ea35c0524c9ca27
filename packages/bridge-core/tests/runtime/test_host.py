"""The CPU host backend: real GPT models with the production parameter layout, on real ranks.

All models run in the rank processes (`helpers.run_gpt`); the weights travel through mcore's own
`dist_checkpointing` with default strictness, so every test of a layout is a test of the sharded state too.
"""

import pytest

pytest.importorskip("megatron.core")
torch = pytest.importorskip("torch")

from runtime.helpers import (  # noqa: E402 - after the skips
    BIASED,
    BIASED_MOE,
    DENSE,
    LATENT,
    MIXED,
    MOE,
    Case,
    run_gpt,
    run_poisoned,
    run_twins,
    shard_table,
)

MODELS = {
    "dense": DENSE,
    "biased": BIASED,
    "moe": MOE,
    "biased-moe": BIASED_MOE,
    "mixed": MIXED,
    "latent": LATENT,
}
# Transformer Engine's names, written out from TransformerLayer, SelfAttention, MLP and TEGroupedMLP with the
# modules of megatron/core/extensions/transformer_engine.py (0.16.1 and 0.19.2).
ATTENTION = [
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
]
DENSE_LAYER = [
    *ATTENTION,
    "mlp.linear_fc1.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc2.weight",
]
MOE_LAYER = [
    *ATTENTION,
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.experts.linear_fc1.weight0",
    "mlp.experts.linear_fc1.weight1",
    "mlp.experts.linear_fc1.weight2",
    "mlp.experts.linear_fc1.weight3",
    "mlp.experts.linear_fc2.weight0",
    "mlp.experts.linear_fc2.weight1",
    "mlp.experts.linear_fc2.weight2",
    "mlp.experts.linear_fc2.weight3",
]
SHARED = ["mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight"]
BIASED_LAYER = [
    "self_attention.linear_proj.weight",
    "self_attention.linear_proj.bias",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.layer_norm_bias",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc1.bias",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.layer_norm_bias",
    "mlp.linear_fc2.weight",
    "mlp.linear_fc2.bias",
]
BIASED_MOE_LAYER = [
    *MOE_LAYER,
    "self_attention.linear_proj.bias",
    "self_attention.linear_qkv.bias",
    "mlp.router.bias",
    *(f"mlp.experts.linear_{fc}.bias{expert}" for fc in ("fc1", "fc2") for expert in range(4)),
]
LATENT_LAYER = [
    "input_layernorm.weight",
    "self_attention.linear_proj.weight",
    "self_attention.linear_q_down_proj.weight",
    "self_attention.linear_q_up_proj.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.linear_kv_down_proj.weight",
    "self_attention.linear_kv_up_proj.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc2.weight",
]
LAYERS = {
    "dense": [DENSE_LAYER] * 4,
    "biased": [BIASED_LAYER] * 4,
    "moe": [MOE_LAYER] * 4,
    "biased-moe": [BIASED_MOE_LAYER] * 4,
    "mixed": [DENSE_LAYER, MOE_LAYER + SHARED, MOE_LAYER + SHARED, DENSE_LAYER],
    "latent": [LATENT_LAYER] * 4,
}


@pytest.fixture(scope="module")
def reference(rank_pool, tmp_path_factory):
    """Per model: what one rank computes, and the checkpoint that it saved; each made once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            (result,) = rank_pool.run(run_gpt, Case(MODELS[name], save=str(folder), backward=True), ranks=[0])
            made[name] = (result, str(folder))
        return made[name]

    return make


def same(logits, expected, *, atol):
    assert any(value is not None for value in logits)
    for value in logits:
        if value is not None:
            torch.testing.assert_close(value, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_have_transformer_engines_names(reference, name):
    outside = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"]
    outside += ["decoder.final_layernorm.bias"] if name == "biased" else []
    inside = [f"decoder.layers.{index}.{key}" for index, layer in enumerate(LAYERS[name]) for key in layer]
    assert sorted(reference(name)[0]["names"]) == sorted(outside + inside)


@pytest.mark.parametrize("name", MODELS)
def test_backward_reaches_every_parameter(reference, name):
    assert reference(name)[0]["without_gradient"] == []


# Latent attention: mcore's own attention core takes no `k_channels`. Biased experts: its sequential experts
# change a view in place.
@pytest.mark.parametrize("name", ["dense", "biased", "moe", "mixed"])
def test_host_and_local_spec_give_the_same_logits(rank_pool, name):
    ((host, local),) = rank_pool.run(run_twins, Case(MODELS[name]), ranks=[0])
    assert host.std() > 0.1
    torch.testing.assert_close(host, local, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dense", "biased"])
def test_a_host_checkpoint_loads_into_the_local_spec(rank_pool, reference, name):
    result, folder = reference(name)
    case = Case(MODELS[name], {"tp": 2}, spec="local", load=folder, mask=True)
    same([r["logits"] for r in rank_pool.run(run_gpt, case, ranks=[0, 1])], result["logits"], atol=1e-5)


LAYOUTS = {
    "tp2": ({"tp": 2}, 2),
    "pp2": ({"pp": 2}, 2),
    "pp2-vpp2": ({"pp": 2, "vpp": 2}, 2),
    "tp2-pp2": ({"tp": 2, "pp": 2}, 4),
}
EXPERT_LAYOUTS = {
    "ep2": ({"dp": 2, "ep": 2}, 2),
    "tp2-ep2-etp1": ({"tp": 2, "ep": 2, "etp": 1}, 2),
    "tp2-ep4-etp1": ({"tp": 2, "dp": 2, "ep": 4, "etp": 1}, 4),
    "tp2-ep2-etp2": ({"tp": 2, "dp": 2, "ep": 2}, 4),
    "pp2-ep2": ({"pp": 2, "dp": 2, "ep": 2}, 4),
}
CASES = [(name, layout) for name in ("dense", "biased", "moe", "mixed", "latent") for layout in LAYOUTS]
CASES += [("moe", layout) for layout in EXPERT_LAYOUTS]
CASES += [("mixed", "tp2-ep4-etp1"), ("biased-moe", "tp2-ep2-etp1"), ("biased-moe", "pp2-ep2")]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_layout_computes_what_one_rank_computes(rank_pool, reference, name, layout):
    result, folder = reference(name)
    sizes, ranks = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    answers = rank_pool.run(run_gpt, Case(MODELS[name], sizes, load=folder), ranks=range(ranks))
    same([answer["logits"] for answer in answers], result["logits"], atol=1e-5)


# Latent attention without sequence parallelism has wrong gradients under TP in mcore itself: the positional
# part of the keys is not summed over TP ranks.
@pytest.mark.parametrize(
    ("kwargs", "name"),
    [(DENSE, "dense"), (BIASED, "biased"), (MOE, "moe"), (LATENT | {"sequence_parallel": True}, "latent")],
    ids=["dense", "biased", "moe", "latent"],
)
def test_gradients_of_tensor_parallel_shards_are_those_of_one_rank(rank_pool, reference, kwargs, name):
    result, folder = reference(name)
    case = Case(kwargs, {"tp": 2}, load=folder, backward=True)
    for answer in rank_pool.run(run_gpt, case, ranks=[0, 1]):
        assert answer["squares"].keys() == result["squares"].keys()
        assert answer["squares"] == pytest.approx(result["squares"], rel=1e-4)


@pytest.mark.parametrize("sizes", [{"dp": 2, "ep": 2}, {"tp": 2, "ep": 2, "etp": 1}], ids=["ep2", "tp2-ep2"])
def test_the_all_to_all_dispatcher_works_too(rank_pool, reference, sizes):
    result, folder = reference("moe")
    case = Case(MOE | {"moe_token_dispatcher_type": "alltoall"}, sizes, load=folder)
    same([r["logits"] for r in rank_pool.run(run_gpt, case, ranks=[0, 1])], result["logits"], atol=1e-5)


OTHERS = {
    "auxiliary-loss": MOE | {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01},
    "expert-bias": MOE | {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "sinks-and-window": DENSE
    | {"softmax_type": "learnable", "window_size": (4, 0), "window_attn_skip_freq": 2, "qk_layernorm": False},
    "zero-centred-norm": DENSE | {"layernorm_zero_centered_gamma": True},
    "sequential-experts": MOE | {"moe_grouped_gemm": False},
    "dropout-and-recomputation": DENSE
    | {
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_features_train(rank_pool, name):
    for answer in rank_pool.run(run_gpt, Case(OTHERS[name], {"tp": 2, "etp": 1}, backward=True), ranks=[0, 1]):
        assert answer["without_gradient"] == []
        assert torch.isfinite(answer["logits"]).all()


# What mcore reads of its global state in spite of the groups that it is given. In 0.19 the column- and
# row-parallel linears ask for weight-rematerialisation groups; without a global state they get None, which
# means "not used". In 0.16.1 nothing is read. (The loss, `model(..., labels=...)`, is another matter: 0.16.1
# takes its tensor-parallel group from the global state.)
READS = {
    "tensor_parallel.layers: get_gtp_weight_remat_group",
    "tensor_parallel.layers: get_expert_gtp_weight_remat_group",
}


@pytest.mark.parametrize(
    ("kwargs", "sizes", "ranks"),
    [
        (DENSE, {"tp": 2}, 2),
        (MIXED, {"tp": 2, "ep": 2, "etp": 1}, 2),
        (MIXED, {"pp": 2, "vpp": 2}, 2),
        (LATENT, {"tp": 2, "pp": 2}, 4),
    ],
    ids=["dense-tp2", "mixed-tp2-ep2", "mixed-pp2-vpp2", "latent-tp2-pp2"],
)
def test_no_global_parallel_state_is_read(rank_pool, tmp_path, kwargs, sizes, ranks):
    allowed = frozenset(read.partition(": ")[2] for read in READS)
    case = Case(kwargs, sizes, save=str(tmp_path), backward="pp" not in sizes)
    for reads in rank_pool.run(run_poisoned, case, allowed, ranks=range(ranks)):
        assert set(reads) <= READS


# Sharded state: the keys that a Transformer Engine model asks for.


@pytest.mark.parametrize("sizes", [{}, {"tp": 2, "ep": 2, "etp": 1}, {"dp": 2, "ep": 2}, {"tp": 2}], ids=str)
def test_grouped_experts_save_what_mcores_sequential_experts_save(rank_pool, sizes):
    """mcore promises that its grouped and sequential experts are interchangeable: the oracle for keys and offsets."""
    ranks = range(sizes.get("tp", 1) * sizes.get("dp", 1))
    grouped = rank_pool.run(shard_table, Case(MOE, sizes), ranks=ranks)
    sequential = rank_pool.run(shard_table, Case(MOE | {"moe_grouped_gemm": False}, sizes), ranks=ranks)
    for ours, theirs in zip(grouped, sequential, strict=True):
        assert sorted(ours.values()) == sorted(theirs.values())


def test_keys_and_shapes_of_a_mixture_of_experts(rank_pool):
    (table,) = rank_pool.run(shard_table, Case(MOE), ranks=[0])
    tensors = {(key, shape) for kind, key, shape, _, _ in table.values() if kind == "tensor"}
    assert tensors == {
        ("embedding.word_embeddings.weight", (96, 64)),
        ("decoder.layers.self_attention.linear_proj.weight", (4, 64, 128)),
        ("decoder.layers.self_attention.linear_qkv.weight", (4, 256, 64)),
        ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", (4, 64)),
        ("decoder.layers.self_attention.q_layernorm.weight", (4, 16)),
        ("decoder.layers.self_attention.k_layernorm.weight", (4, 16)),
        ("decoder.layers.pre_mlp_layernorm.weight", (4, 64)),
        ("decoder.layers.mlp.router.weight", (4, 4, 64)),
        ("decoder.layers.mlp.experts.experts.linear_fc1.weight", (4, 4, 96, 64)),
        ("decoder.layers.mlp.experts.experts.linear_fc2.weight", (4, 4, 64, 48)),
        ("decoder.final_layernorm.weight", (64,)),
        ("output_layer.weight", (96, 64)),
    }
    # Every Transformer Engine module but the attention core has an extra state, norms included
    # (TransformerEngine 2.x: transformer_engine/pytorch/ops/op.py, `get_extra_state`).
    objects = {(key, shape) for kind, key, shape, _, _ in table.values() if kind == "object"}
    assert objects == {
        ("decoder.layers.self_attention.linear_proj._extra_state", (4,)),
        ("decoder.layers.self_attention.linear_qkv._extra_state", (4,)),
        ("decoder.layers.self_attention.q_layernorm._extra_state", (4,)),
        ("decoder.layers.self_attention.k_layernorm._extra_state", (4,)),
        ("decoder.layers.pre_mlp_layernorm._extra_state", (4,)),
        ("decoder.layers.mlp.experts.experts.linear_fc1._extra_state", (4, 4)),
        ("decoder.layers.mlp.experts.experts.linear_fc2._extra_state", (4, 4)),
        ("decoder.final_layernorm._extra_state", (1,)),
    }


@pytest.mark.parametrize(
    ("kwargs", "sizes", "ranks"),
    [(MOE, {"tp": 2, "dp": 2, "ep": 2, "etp": 1}, 4), (LATENT, {"tp": 2, "dp": 2}, 4), (MIXED, {"dp": 4, "ep": 2}, 4)],
    ids=["moe", "latent", "mixed"],
)
def test_exactly_one_rank_saves_each_shard(rank_pool, kwargs, sizes, ranks):
    tables = rank_pool.run(shard_table, Case(kwargs, sizes), ranks=range(ranks))
    everything = {entry[1:4] for table in tables for entry in table.values()}
    savers = [entry[1:4] for table in tables for entry in table.values() if entry[4] == (0, 0, 0)]
    assert len(savers) == len(set(savers))
    assert set(savers) == everything


def test_multi_token_prediction_layers_have_transformer_engines_names(rank_pool):
    # mcore decides by its global state which stage holds them: this one needs it initialised.
    case = Case(MOE | {"mtp_num_layers": 1}, {"tp": 2, "etp": 1}, global_state=True)
    for table in rank_pool.run(shard_table, case, ranks=[0, 1]):
        names = {name.partition("#")[0] for name, entry in table.items() if entry[0] == "tensor"}
        found = {name.removeprefix("mtp.layers.0.") for name in names if name.startswith("mtp.")}
        # 0.16.1 calls the layer `transformer_layer`, 0.19.2 `mtp_model_layer`.
        inner = next(name for name in ("transformer_layer", "mtp_model_layer") if f"{name}.mlp.router.weight" in found)
        outer = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight"}
        assert found == outer | {f"{inner}.{key}" for key in MOE_LAYER}
