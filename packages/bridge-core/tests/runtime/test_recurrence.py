"""The plain versions of a gated delta net's kernels, against those that transformers has for the same nets."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the kernels are plain PyTorch")
modeling = pytest.importorskip(
    "transformers.models.qwen3_next.modeling_qwen3_next", reason="the oracle is transformers"
)

from bridge_core.errors import ConfigError  # noqa: E402 - after the skips
from bridge_core.runtime.host.recurrence import causal_conv1d, l2norm  # noqa: E402 - after the skips

CHANNELS, WIDTH = 6, 4


@pytest.fixture
def net():
    """The convolution of a transformers model: its channels, one by one, from left to right."""
    torch.manual_seed(0)
    return torch.nn.Conv1d(CHANNELS, CHANNELS, WIDTH, groups=CHANNELS, padding=WIDTH - 1, bias=True)


@pytest.mark.parametrize("positions", [1, 3, 4, 9])
@pytest.mark.parametrize("biased", [False, True])
def test_the_convolution_is_that_of_transformers(net, positions, biased):
    x = torch.randn(2, positions, CHANNELS)
    if not biased:
        net.bias.data.zero_()
    expected = torch.nn.functional.silu(net(x.transpose(1, 2))[:, :, :positions]).transpose(1, 2)
    weight = net.weight.squeeze(1)
    found, state = causal_conv1d(x, weight, net.bias if biased else None, activation="silu", initial_state=None)
    assert state is None
    torch.testing.assert_close(found, expected)
    plain, _ = causal_conv1d(x, weight, net.bias if biased else None)
    torch.testing.assert_close(torch.nn.functional.silu(plain), expected)


def test_a_position_sees_those_before_it_only(net):
    x = torch.randn(1, 8, CHANNELS)
    later = x.clone()
    later[:, 5:] += 1
    one, _ = causal_conv1d(x, net.weight.squeeze(1))
    other, _ = causal_conv1d(later, net.weight.squeeze(1))
    assert torch.equal(one[:, :5], other[:, :5])
    assert not torch.isclose(one[:, 5:], other[:, 5:]).any()


def test_packed_sequences_are_refused(net):
    with pytest.raises(ConfigError, match=r"packed sequences[\s\S]*2 sequences"):
        causal_conv1d(torch.randn(1, 8, CHANNELS), net.weight.squeeze(1), cu_seqlens=torch.tensor([0, 3, 8]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_transformers(dtype):
    x = torch.randn(2, 3, 5, 7).to(dtype)
    found = l2norm(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, modeling.l2norm(x.float(), dim=-1, eps=1e-6).to(dtype))
