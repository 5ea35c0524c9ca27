"""What rank processes do in tests of vision towers."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

# What mcore's layers ask without need: 0.19.2 for groups of weight rematerialisation, and gets None (tensor_parallel/
# layers.py); the host backend stands in for the buffer.
HARMLESS = ("gtp_weight_remat", "gtp_remat", "memory_buffer")


@contextmanager
def no_global_state():
    """Every `get_...` of mcore's `parallel_state` fails, also where it was imported to."""
    from megatron.core import parallel_state

    def refused(name):
        def ask(*args, **kwargs):
            raise AssertionError(f"parallel_state.{name} was asked")

        return ask

    asked = {
        value: refused(name)
        for name, value in vars(parallel_state).items()
        if name.startswith("get_") and not any(word in name for word in HARMLESS)
    }
    with ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("megatron.core")]:
            for name, value in list(vars(module).items()):
                if callable(value) and getattr(value, "__hash__", None) and value in asked:
                    stack.enter_context(patch.object(module, name, asked[value]))
        yield


def settings(*, tp=1, pp=1, **rest):
    return {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, **rest}


def canonical(tower, name):
    """A parameter's name as planned: with the layer's global number, and norms in the linear that follows."""
    head, _, tail = name.partition("decoder.layers.")
    if tail:
        local, _, tail = tail.partition(".")
        for beside, inside in (
            ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
            ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
        ):
            tail = tail.replace(beside, inside)
        name = f"{head}decoder.layers.{tower.decoder.layers[int(local)].layer_number - 1}.{tail}"
    return f"vision_model.{name}"


def run_tower(fields, weights, pixels, grids, cotangent, *, tp=1, pp=1, spec="host", rest=None):
    """Load a tower by name, run it through its stages and back.

    Returns:
        This rank's output (None but on the last stage), gradients by planned name, keys of its sharded state with
        their global shapes, and its tp rank.
    """
    import torch
    import torch.distributed as dist

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.rank_worker import groups
    from bridge_mimo.towers import tower_spec, vision_modality_spec
    from bridge_mimo.towers.submodules import TowerSubmodules

    with host_backend(), no_global_state():
        pg = groups(tp=tp, pp=pp)
        encoder = tower_spec(fields, settings(tp=tp, pp=pp, **(rest or {})), groups=pg, spec=spec)
        images = vision_modality_spec({"qwen_visual": encoder}, groups=pg)
        ends = {"is_first_stage": pg.pp.rank() == 0, "is_last_stage": pg.pp.rank() == pp - 1}
        submodules = TowerSubmodules.from_spec(images, **ends)
        tower = submodules.encoders["qwen_visual"]
        named = {canonical(tower, name): value for name, value in tower.named_parameters()}
        with torch.no_grad():
            for name, value in named.items():
                value.copy_(weights[pg.tp.rank()][name])
        stage, ranks = pg.pp.rank(), dist.get_process_group_ranks(pg.pp)
        received = None
        if stage:
            shape = torch.empty(3, dtype=torch.int64)
            dist.recv(shape, ranks[stage - 1])
            received = torch.empty(shape.tolist(), requires_grad=True)
            dist.recv(received.data, ranks[stage - 1])
        inputs = {"qwen_visual": {"pixel_values": None if stage else pixels, "grid_thw": grids}}
        output = submodules(encoder_inputs=inputs, hidden_states=received)
        if stage < pp - 1:
            dist.send(torch.tensor(output.shape), ranks[stage + 1])
            dist.send(output.detach(), ranks[stage + 1])
            back = torch.empty_like(output)
            dist.recv(back, ranks[stage + 1])
        else:
            back = cotangent
        output.backward(back)
        if received is not None:
            dist.send(received.grad, ranks[stage - 1])
        state = submodules.sharded_state_dict()
    shapes = {key: tuple(value.global_shape) for key, value in tensors(state)}
    gradients = {name: value.grad for name, value in named.items()}
    return output.detach() if stage == pp - 1 else None, gradients, shapes, pg.tp.rank()


def tensors(state):
    """Key and ShardedTensor of what a sharded state has of them."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return [(value.key, value) for value in state.values() if isinstance(value, ShardedTensor)]
