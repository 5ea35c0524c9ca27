"""Transformer Engine's layers, recognised by their classes' names: stand-ins with its parameters and calls.

Written after transformer_engine.pytorch (2.x: `Linear`, `LayerNormLinear`, `GroupedLinear`) and
megatron/core/extensions/transformer_engine.py, 0.19.2: `in_features` and `out_features` are this rank's,
experts are `weight0`, `weight1`, ..., an unused bias is an empty tensor, calls return (output, bias or None).
"""

from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.core")
torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402 - after the skips
from torch.nn import functional as F  # noqa: E402, N812

from bridge_peft import LoraConfig, apply_lora, merged_weights  # noqa: E402

CONFIG = SimpleNamespace(
    normalization="RMSNorm",
    layernorm_epsilon=1e-5,
    layernorm_zero_centered_gamma=True,
    gated_linear_unit=False,
    sequence_parallel=False,
    params_dtype=torch.float32,
)


class Linear(nn.Module):
    def __init__(self, in_features, out_features, parallel_mode=None):
        super().__init__()
        self.config, self.in_features, self.out_features = CONFIG, in_features, out_features
        self.parallel_mode = parallel_mode
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = torch.empty(0)

    def forward(self, x):
        return F.linear(x, self.weight), None


class TELinear(Linear):
    pass


class TEColumnParallelLinear(TELinear):
    pass


class TERowParallelLinear(TELinear):
    pass


class LayerNormLinear(Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.layer_norm_weight = nn.Parameter(torch.randn(self.in_features) * 0.1)

    def forward(self, x):
        return F.linear(F.rms_norm(x, (self.in_features,), self.layer_norm_weight + 1, 1e-5), self.weight), None


class TELayerNormColumnParallelLinear(LayerNormLinear):
    pass


class GroupedLinear(nn.Module):
    def __init__(self, num_gemms, in_features, out_features):
        super().__init__()
        self.config, self.num_gemms, self.use_bias = CONFIG, num_gemms, False
        self.in_features, self.out_features = in_features, out_features
        for index in range(num_gemms):
            self.register_parameter(f"weight{index}", nn.Parameter(torch.randn(out_features, in_features)))

    def forward(self, x, m_splits):
        runs = x.split(m_splits)
        return torch.cat([F.linear(run, getattr(self, f"weight{i}")) for i, run in enumerate(runs)]), None


class TEGroupedLinear(GroupedLinear):
    pass


class TEColumnParallelGroupedLinear(TEGroupedLinear):
    pass


class TERowParallelGroupedLinear(TEGroupedLinear):
    pass


class Alone:
    """A group of one rank."""

    def rank(self):
        return 0

    def size(self):
        return 1


def model():
    torch.manual_seed(0)
    layer = nn.Module()
    layer.layer_number = 6
    layer.self_attention, layer.mlp, experts = nn.Module(), nn.Module(), nn.Module()
    layer.self_attention.linear_qkv = TELayerNormColumnParallelLinear(8, 24, "column")
    layer.self_attention.linear_proj = TERowParallelLinear(8, 8, "row")
    layer.self_attention.linear_q_down_proj = TELinear(8, 6)
    layer.mlp.linear_fc1 = TEColumnParallelLinear(8, 16, "column")
    # Quantised classes are made at run time, from the layer's own class.
    layer.mlp.linear_fc1.__class__ = type("QuantTELinear", (TEColumnParallelLinear,), {})
    experts.num_local_experts = 3
    experts.linear_fc1 = TEColumnParallelGroupedLinear(3, 8, 16)
    experts.linear_fc2 = TERowParallelGroupedLinear(3, 16, 8)
    layer.mlp.experts = experts
    chunk = nn.Module()
    chunk.config = CONFIG
    chunk.decoder = nn.Module()
    chunk.decoder.layers = nn.ModuleList([layer])
    return chunk, layer


def call(layer):
    torch.manual_seed(1)
    x, tokens, inner = torch.randn(4, 2, 8), torch.randn(7, 8), torch.randn(7, 16)
    attention, mlp = layer.self_attention, layer.mlp
    splits = [4, 0, 3]
    return [
        attention.linear_qkv(x),
        attention.linear_proj(x),
        attention.linear_q_down_proj(x),
        mlp.linear_fc1(x),
        mlp.experts.linear_fc1(tokens, splits),
        mlp.experts.linear_fc2(inner, m_splits=splits),
    ]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_every_layer_computes_with_the_adapted_weight(options):
    chunk, layer = model()
    groups = SimpleNamespace(**dict.fromkeys(("tp", "ep", "expt_tp", "pp", "dp_cp", "expt_dp"), Alone()))
    before = call(layer)
    report = apply_lora(chunk, LoraConfig(r=2, lora_alpha=6, **options), groups)
    assert {(entry.name.removeprefix("decoder.layers.5."), entry.mode) for entry in report.adapted} == {
        ("self_attention.linear_qkv", "column"),
        ("self_attention.linear_proj", "row"),
        ("self_attention.linear_q_down_proj", "replicated"),
        ("mlp.linear_fc1", "column"),
        ("mlp.experts.linear_fc1", "column"),
        ("mlp.experts.linear_fc2", "row"),
    }
    for (one, _), (other, _) in zip(call(layer), before, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            if ".adapter." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted = call(layer)
    twin, twin_layer = model()
    merged = dict(merged_weights(chunk))
    twin.load_state_dict(merged, strict=True)
    for (one, _), (other, _), (base, _) in zip(adapted, call(twin_layer), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert (one - base).abs().max() > 0.1
