"""Adapters on ModelOpt-quantised layers: in any order, started from the residual, saved with ModelOpt's state."""

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("modelopt")
torch = pytest.importorskip("torch")

import quant_jobs  # noqa: E402 - after the skips
from lora_jobs import DENSE, MOE, Case, assemble  # noqa: E402

RANK = 8
LOCAL_DENSE = Case(DENSE, lora={"r": RANK}, spec="local")
LOCAL_MOE = Case(MOE, lora={"r": RANK}, spec="local")
SVD = {"r": RANK, "lora_alpha": 24, "lora_init_method": "svdquant"}


@pytest.mark.parametrize("form", ["INT8", "FP8"])
@pytest.mark.parametrize("case", [LOCAL_DENSE, LOCAL_MOE], ids=["dense", "moe"])
def test_quantising_before_or_after_makes_no_difference(rank_pool, case, form):
    ((one, two),) = rank_pool.run(quant_jobs.either_order, case, form, ranks=[0])
    assert one["trained"] == two["trained"]
    assert one["quantizers"] == two["quantizers"] > 0
    assert one["in_adapters"] == two["in_adapters"] == 0
    for name in ("start", "logits"):
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)
    for name, gradient in one["gradients"].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(two["gradients"][name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["INT8", "FP8"])
@pytest.mark.parametrize("fields", [DENSE, MOE], ids=["dense", "moe"])
def test_svdquant_leaves_the_tail_of_the_singular_values(rank_pool, fields, form):
    """Per linear and per expert: what is left is what the Eckart-Young theorem says must be left."""
    (found,) = rank_pool.run(quant_jobs.residuals, Case(fields, lora=SVD, spec="local"), form, RANK, ranks=[0])
    assert found["warned"] == []
    assert len(found["weights"]) == (8 if fields is DENSE else 2 * (2 + 2 + 2 * 4))
    for name, entry in found["weights"].items():
        tail = entry["values"][RANK:].square().sum()
        assert entry["all"] > 0, name
        torch.testing.assert_close(entry["left"], tail, rtol=1e-3, atol=0)
        assert entry["left"] < 0.9 * entry["all"], name
    error = [(found[name] - found["exact"]).norm() for name in ("better", "rough")]
    assert error[0] < error[1]


def test_svdquant_on_two_ranks_gives_the_product_of_one(rank_pool, tmp_path):
    """Signs of singular vectors are free, so products are compared."""
    (single,) = rank_pool.run(
        quant_jobs.residuals, Case(DENSE, lora=SVD, spec="local", save=str(tmp_path)), "INT8", RANK, ranks=[0]
    )
    case = Case(DENSE, {"tp": 2}, SVD, spec="local", load=str(tmp_path))
    several = rank_pool.run(quant_jobs.residuals, case, "INT8", RANK, ranks=[0, 1])
    one, two = assemble([single["factors"]]), assemble([answer["factors"] for answer in several])
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith("lora_A"):
            other = name.removesuffix("A") + "B"
            torch.testing.assert_close(two[other] @ two[name], one[other] @ one[name], rtol=1e-3, atol=1e-6)


def test_svdquant_without_a_quantizer_is_zeros_and_one_warning(rank_pool):
    (found,) = rank_pool.run(quant_jobs.residuals, Case(DENSE, lora=SVD, spec="local"), None, RANK, ranks=[0])
    assert len(found["warned"]) == 1
    assert "decoder.layers.0.self_attention.linear_proj" in found["warned"][0]
    torch.testing.assert_close(found["better"], found["exact"], rtol=0, atol=0)


@pytest.mark.parametrize(("form", "fields"), [("INT8_SMOOTHQUANT", DENSE), ("FP8", MOE)], ids=["smoothed", "moe"])
def test_svdquant_weight_takes_what_modelopts_svdquant_takes(rank_pool, form, fields):
    """The leading part of each (smoothed) weight, by ModelOpt's own decomposition; the rest has its own ranges."""
    from modelopt.torch.quantization.model_calib import svd

    lora = SVD | {"lora_init_method": "svdquant_weight"}
    (found,) = rank_pool.run(quant_jobs.taken_out, Case(fields, lora=lora, spec="local"), form, ranks=[0])
    assert len(found["weights"]) == (8 if fields is DENSE else 2 * (2 + 2 + 2 * 4))
    for entry in found["weights"].values():
        us, vt = svd(entry["before"], RANK)
        torch.testing.assert_close(entry["product"], us @ vt, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(entry["after"], entry["before"] - entry["product"], rtol=0, atol=1e-6)
        torch.testing.assert_close(entry["range"].flatten(), ranges(entry["after"], entry["range"]))
        assert entry["scaled"] == ("SMOOTH" in form)
    error = [(found[name] - found["exact"]).norm() for name in ("better", "rough")]
    assert error[0] < error[1]


def ranges(weight, like):
    return weight.abs().max().view(1) if like.numel() == 1 else weight.abs().amax(dim=1)


@pytest.mark.parametrize("form", ["INT8", "FP8"])
def test_svdquant_weight_has_the_ranges_of_one_rank_on_two(rank_pool, tmp_path, form):
    lora = SVD | {"lora_init_method": "svdquant_weight"}
    (one,) = rank_pool.run(
        quant_jobs.taken_out, Case(DENSE, lora=lora, spec="local", save=str(tmp_path)), form, ranks=[0]
    )
    case = Case(DENSE, {"tp": 2}, lora, spec="local", load=str(tmp_path))
    two = rank_pool.run(quant_jobs.taken_out, case, form, ranks=[0, 1])
    for path, entry in one["weights"].items():
        shares = [answer["weights"][path]["range"] for answer in two]
        row = path.endswith(("linear_proj", "linear_fc2"))
        if form == "FP8" or row:  # a range of the whole, or of rows that ranks hold in parts
            for share in shares:
                torch.testing.assert_close(share, entry["range"])
        else:
            assert sorted(torch.cat(shares).flatten().tolist()) == pytest.approx(
                sorted(entry["range"].flatten().tolist())
            )


@pytest.mark.parametrize(("method", "form"), [("svdquant_weight", None), ("pissa", "INT8"), ("olora", "INT8")])
def test_methods_say_whether_they_want_a_quantised_base(rank_pool, method, form):
    case = Case(DENSE, lora={"r": RANK, "lora_init_method": method}, spec="local")
    (text,) = rank_pool.run(quant_jobs.refused, case, form, ranks=[0])
    assert ("quantise the model first" if form is None else "svdquant_weight") in text


@pytest.mark.parametrize("adapter_first", [False, True])
@pytest.mark.parametrize(("case", "form"), [(LOCAL_DENSE, "INT8"), (LOCAL_MOE, "FP8")], ids=["dense", "moe"])
def test_saved_and_restored_with_modelopts_state(rank_pool, tmp_path, case, form, adapter_first):
    case = Case(case.fields, lora=SVD, spec="local")
    (found,) = rank_pool.run(quant_jobs.restored, case, form, str(tmp_path), adapter_first=adapter_first, ranks=[0])
    assert found["found"] == found["expected"]
    assert found["expected"][1] < found["expected"][0] < found["before"][0]


def test_merging_into_a_quantised_weight_is_refused_and_streamed_right(rank_pool):
    (found,) = rank_pool.run(quant_jobs.merged, LOCAL_DENSE, "INT8", ranks=[0])
    assert "quantised once more" in str(found["error"])
    assert "merged_weights" in str(found["error"])
    assert found["same"]
    assert found["stream"].keys() == found["expected"].keys()
    for name, value in found["expected"].items():
        torch.testing.assert_close(found["stream"][name], value, rtol=0, atol=0)
