"""The description of factors, and the arithmetic that it stands on, on plain tensors."""

import pytest

from bridge_core.errors import LayoutError
from bridge_peft.placement import Linear, Part, check_cut, factors, fused_parts, missing_sum

torch = pytest.importorskip("torch")

from bridge_peft.layers.experts import by_expert, grouped_mm, rows_by_expert, splits_of  # noqa: E402 - after the skip


@pytest.mark.parametrize("mode", ["column", "row", "replicated"])
@pytest.mark.parametrize("experts", [0, 6])
@pytest.mark.parametrize("blocks", [1, 2])
def test_shares_of_the_factors_multiply_to_the_share_of_the_whole(mode, experts, blocks):
    """A rank's share of B times its share of A is its share of B A, cut as its share of W is."""
    blocks = blocks if mode == "column" else 1
    linear = Linear(mode, 12, 24, experts=experts, blocks=blocks)
    made = factors(linear, 3)
    a, b = (torch.randn(made[name].shape) for name in ("lora_A", "lora_B"))
    whole = b @ a
    for size in (1, 2, 3):
        for rank in range(size):
            own = [share(made[name], value, rank, size) for name, value in (("lora_A", a), ("lora_B", b))]
            dim = {"column": -2, "row": -1, "replicated": None}[mode]
            expected = whole if dim is None else cut(whole, dim, blocks, rank, size)
            torch.testing.assert_close(own[1] @ own[0], expected)
            for name, value in zip(("lora_A", "lora_B"), own, strict=True):
                assert made[name].local_shape(size) == tuple(value.shape)


def share(factor, value, rank, size):
    if factor.cut is None:
        return value
    return torch.cat([value.narrow(factor.cut, start, length) for start, length in factor.runs(rank, size)], factor.cut)


def cut(whole, dim, blocks, rank, size):
    """The share of a weight of which every block is cut by itself."""
    return torch.cat([block.chunk(size, dim)[rank] for block in whole.chunk(blocks, dim)], dim)


@pytest.mark.parametrize(
    ("mode", "sharing", "shared"),
    [
        ("column", "each", ""),
        ("row", "each", ""),
        ("column", "shared", "AB"),
        ("row", "shared", "AB"),
        ("column", "shared_outer", "A"),
        ("row", "shared_outer", "B"),
    ],
)
def test_what_experts_share(mode, sharing, shared):
    made = factors(Linear(mode, 12, 24, experts=4), 3, sharing=sharing)
    for letter, shape in (("A", (3, 12)), ("B", (24, 3))):
        factor = made[f"lora_{letter}"]
        assert factor.shared == (letter in shared)
        assert factor.shape == (shape if letter in shared else (4, *shape))
        assert factor.by_expert != factor.shared
        assert not (factor.shared and factor.cut is not None)


def test_parts_of_fused_layers():
    assert fused_parts("linear_qkv", 128, gated=True, query_groups=2, heads=4, head_size=16) == (
        Part("q", 64, 2),
        Part("k", 32, 2),
        Part("v", 32, 2),
    )
    assert fused_parts("linear_qkv", 192, gated=True, query_groups=2, heads=4, head_size=16) == ()
    assert fused_parts("linear_fc1", 64, gated=True) == (Part("gate", 32), Part("up", 32))
    assert fused_parts("linear_fc1", 64, gated=False) == ()
    made = factors(Linear("column", 8, 64, parts=fused_parts("linear_fc1", 64, gated=True)), 2, parts=("up",))
    assert {name: factor.shape for name, factor in made.items()} == {"lora_A_up": (2, 8), "lora_B_up": (32, 2)}


def test_a_layer_that_does_not_divide_is_refused():
    with pytest.raises(LayoutError, match="out_features"):
        check_cut("x", Linear("column", 12, 30, blocks=2), 4)
    with pytest.raises(LayoutError, match="query groups of k"):
        check_cut("x", Linear("column", 12, 64, parts=(Part("k", 32, 2),)), 4)


def test_sums_that_gradients_lack():
    column, row = Linear("column", 8, 8), Linear("row", 8, 8)
    options = {"communicates": True, "sequence_parallel": True}
    found = {m.mode: {n: missing_sum(m, f, **options) for n, f in factors(m, 2).items()} for m in (column, row)}
    assert found == {
        "column": {"lora_A": "sequence", "lora_B": "none"},
        "row": {"lora_A": "none", "lora_B": "sequence"},
    }
    options = {"communicates": False, "sequence_parallel": True}
    assert missing_sum(column, factors(column, 2)["lora_A"], **options) == "factor"
    experts = Linear("row", 8, 8, experts=4)
    assert missing_sum(experts, factors(experts, 2, sharing="shared")["lora_A"], **options) == "all"


def test_each_token_meets_its_experts_matrix_and_padding_gives_zeros():
    torch.manual_seed(0)
    x, weight = torch.randn(9, 5, requires_grad=True), torch.randn(4, 3, 5, requires_grad=True)
    splits = splits_of(torch.tensor([2, 0, 4, 1]), 9, where="x")
    output = by_expert(x, weight, splits)
    owners = [0, 0, 2, 2, 2, 2, 3]
    expected = torch.stack([weight[owner] @ token for token, owner in zip(x, owners, strict=False)])
    torch.testing.assert_close(output[:7], expected)
    assert not output[7:].any()
    output.sum().backward()
    assert not weight.grad[1].any(), "an expert without tokens has a gradient of zeros, not none"
    rows = rows_by_expert(torch.arange(8.0).view(4, 2), splits, 9, 1.0)
    torch.testing.assert_close(rows[:, 0], torch.tensor([0.0, 0, 4, 4, 4, 4, 6, 1, 1]))


def test_more_tokens_than_there_are_is_refused():
    with pytest.raises(LayoutError, match="at most 5"):
        splits_of([3, 3], 5, where="decoder.layers.0.mlp.experts.linear_fc1")


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped matrix product")
def test_the_grouped_kernel_gives_what_the_loop_gives():
    torch.manual_seed(0)
    splits = [3, 0, 5]
    found = []
    for function in (by_expert, grouped_mm):
        torch.manual_seed(0)
        x = torch.randn(10, 16, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(3, 8, 16, dtype=torch.bfloat16, requires_grad=True)
        output = function(x, weight, splits)
        output.backward(torch.randn(10, 8).to(torch.bfloat16))
        found.append((output.detach(), x.grad, weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
