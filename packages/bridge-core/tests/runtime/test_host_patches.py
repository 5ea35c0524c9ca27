"""What the CPU host backend changes in torch and mcore, and that it takes all of it back."""

import subprocess
import sys

import pytest

pytest.importorskip("megatron.core")
torch = pytest.importorskip("torch")

from bridge_core.runtime.host import (  # noqa: E402 - after the skips
    cpu_friendly,
    cuda_free,
    host_backend,
    host_layer_spec,
)


def patched():
    """Every attribute of the table as it is now; a missing one is recorded too."""
    values = {}
    for patch in cuda_free.PATCHES:
        owner, name = cuda_free._owner(patch.where)
        values[patch.where] = "no owner" if owner is None else vars(owner).get(name, "missing")
    return values


def test_every_patch_is_taken_back_also_after_an_error():
    before = patched()
    inside = {}

    def fail():
        with host_backend(force=True) as active:
            assert active
            with host_backend():
                pass
            inside.update(patched())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    changed = [where for where in before if before[where] is not inside[where]]
    assert len(changed) >= 15
    assert patched() == before


def test_with_cuda_nothing_is_changed_unless_forced(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = patched()
    with host_backend() as active:
        assert not active
        assert patched() == before
    with host_backend(force=True) as active:
        assert active
        assert not torch.cuda.is_available()
    assert patched() == before


def test_every_patch_has_a_reason_and_hits_something_in_this_version():
    absent = {where for where, value in patched().items() if value == "no owner"}
    later = tuple(f"megatron.core.{place}" for place in ("transformer.mla_qk_norm_config:", "ssm.gated_delta_net."))
    later += ("megatron.core.models.hybrid.",)  # 0.17; the others 0.19
    assert all(where.startswith(later) for where in absent)
    assert all(patch.reason for patch in cuda_free.PATCHES)


def test_importing_the_backend_imports_and_patches_nothing():
    code = (
        "import sys, bridge_core.runtime.host.cuda_free, bridge_core.runtime.host.specs, bridge_core.runtime.groups\n"
        "import bridge_core.testing.ranks\n"
        "assert not {'torch', 'megatron', 'megatron.core', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("queries", "window"), [(6, (2, 0)), (5, (1, 2)), (4, (0, 0))])
def test_the_window_mask_is_mcores(queries, window):
    keys = queries + 2
    allowed = torch.ones(queries, keys, dtype=torch.bool)
    mcore = ~allowed.triu(keys - queries - window[0]).tril(keys - queries + window[1])
    assert torch.equal(cuda_free._window_mask(queries, keys, window), mcore)


def test_seeded_streams_of_random_numbers_are_separate_and_go_on():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    with host_backend(force=True):
        tracker = CudaRNGStatesTracker()
        tracker.add("one", 1)
        torch.manual_seed(0)
        outside = torch.rand(2)
        torch.manual_seed(0)
        with tracker.fork("one"):
            first = torch.rand(2)
        with tracker.fork("one"):
            second = torch.rand(2)
        with tracker.fork("unseeded"):
            plain = torch.rand(2)
    assert torch.equal(plain, outside), "forks leave the default generator alone"
    expected = torch.rand(4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat([first, second]), expected)


def test_cpu_friendly_names_only_what_the_installed_mcore_knows():
    from megatron.core.transformer.transformer_config import TransformerConfig

    overrides = cpu_friendly({"num_moe_experts": 4, "tensor_model_parallel_size": 2})
    assert overrides.keys() <= TransformerConfig.__dataclass_fields__.keys()
    assert overrides["use_cpu_initialization"] is True
    assert overrides["sequence_parallel"] is True
    assert overrides["moe_token_dispatcher_type"] == "allgather"
    assert cpu_friendly({"num_moe_experts": 4, "moe_token_dispatcher_type": "flex"})["moe_token_dispatcher_type"] == (
        "alltoall"
    )
    assert "sequence_parallel" not in cpu_friendly({"tensor_model_parallel_size": 2})


def test_a_layer_spec_is_mcores_production_structure_with_cpu_modules():
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.transformer_config import TransformerConfig

    from bridge_core.runtime.host import linears

    before = dict(vars(gpt_layer_specs))
    fields = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 2, "qk_layernorm": True}
    config = TransformerConfig(**fields | cpu_friendly(fields))
    dense, experts = (host_layer_spec(config, moe=moe).submodules for moe in (False, None))
    attention = dense.self_attention.submodules
    assert attention.linear_qkv is linears.HostLayerNormColumnParallelLinear
    assert attention.q_layernorm is linears.HostNorm
    assert dense.pre_mlp_layernorm is not linears.HostNorm, "the dense layer's norm is inside linear_fc1"
    assert experts.pre_mlp_layernorm is linears.HostNorm
    assert dict(vars(gpt_layer_specs)) == before
