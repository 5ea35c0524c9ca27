"""Jobs for the pool of ranks: quantise real Megatron models with ModelOpt and pack this rank's shards."""

import copy
from contextlib import contextmanager


@contextmanager
def global_state(layout):
    """ModelOpt asks Megatron's global state for groups (0.47, quantization/plugins/megatron.py, `_setup`)."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(layout["tp"])
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def quantise_and_pack(fields, layout, config):
    """Every quantised linear layer of a model of random weights: format, local weight and its packed shard. Collective.

    The weights of all ranks are cut from the same whole, so that ranks agree on what they hold.
    """
    import modelopt.torch.quantization as mtq
    import torch

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build, forward
    from bridge_quant_export.formats.packing import pack
    from bridge_quant_export.state import read_layer

    with host_backend(), global_state(layout):
        _, pg, (model,) = build(fields, layout, spec="local")
        with torch.no_grad():
            for number, (_, value) in enumerate(sorted(model.named_parameters())):
                generator = torch.Generator().manual_seed(100 * number + pg.tp.rank())
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05 + (value.dim() == 1))
        tokens = torch.arange(24).view(1, 24) % 97
        mtq.quantize(model, copy.deepcopy(getattr(mtq, config)), lambda model: forward([model], pg, tokens))
        found = {}
        for name, layer in model.named_modules():
            state = read_layer(layer, where=name)
            if state is None:
                continue
            whole = list(layer.weight.shape)
            dim = 1 if any("RowParallel" in kind.__name__ for kind in type(layer).__mro__) else 0
            whole[dim] *= pg.tp.size()
            packed = pack(
                layer.weight, state.calibration, format=state.format, writer="modelopt", whole=tuple(whole), where=name
            )
            found[name] = (state.format.name, dim, layer.weight.detach().clone(), packed)
    return found
