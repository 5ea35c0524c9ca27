"""What rank processes do in tests of encoders inside `MimoModel`, and of towers that are not Qwen's."""

from __future__ import annotations


def _filled(module, weights, rename=lambda name: name):
    """Copy weights into a module's parameters by name; every one must be there."""
    import torch

    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(weights[rename(name)])
    return module


def _language(fields, pg, tp):
    """The spec of a `GPTModel` and its configuration."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.spec_utils import ModuleSpec

    from bridge_core.runtime.layer_specs import block_spec
    from bridge_core.runtime.provider import Provider

    provider = Provider(fields, spec="host")
    provider.apply_overrides({"tensor_model_parallel_size": tp, "sequence_parallel": tp > 1})
    config = provider.finalize()
    params = {
        "config": config,
        "transformer_layer_spec": block_spec("host", config, pp_rank=0, vp_stage=None),
        "vocab_size": provider.padded_vocab,
        "max_sequence_length": fields["seq_length"],
        "position_embedding_type": "rope",
        "rotary_base": fields["rotary_base"],
        "share_embeddings_and_output_weights": fields["share_embeddings_and_output_weights"],
        "scatter_embedding_sequence_parallel": False,
        "pg_collection": pg,
    }
    return ModuleSpec(module=GPTModel, params=params)


def run_mimo(fields, weights, tokens, pixels, grids, *, tp=1):
    """Logits [B, S, V / tp] of a colocated `MimoModel` with deepstack: of tokens with images, and of the last alone.

    Returns also the gradient that reaches the tower's first bias, and this rank's number.
    """
    import torch
    from megatron.core.models.mimo import MimoModelConfig

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.rank_worker import groups
    from bridge_mimo.towers import DeepstackMimoModel, tower_spec, vision_modality_spec

    with host_backend():
        pg = groups(tp=tp)
        tower = tower_spec(fields, {"tensor_model_parallel_size": tp}, groups=pg, spec="host")
        config = MimoModelConfig(
            language_model_spec=_language(fields, pg, tp),
            modality_submodules_spec={"images": vision_modality_spec({"qwen_visual": tower}, groups=pg)},
            special_token_ids={"images": fields["image_token_id"]},
        )
        fed = len(fields["vision_deepstack_layers"])
        model = DeepstackMimoModel(config, tp_group=pg.tp, deepstack={"images": fed})
        share = weights[pg.tp.rank()]
        _filled(model.language_model, share)
        encoder = _filled(model.modality_submodules["images"].encoders["qwen_visual"], share, "vision_model.{}".format)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        inputs = {"images": {"qwen_visual": {"pixel_values": pixels, "grid_thw": grids}}}
        logits, _ = model(tokens, positions, modality_inputs=inputs)
        logits.square().sum().backward()
        text = tokens.clamp(min=fields["image_token_id"] + 1)
        alone, _ = model(text, positions)
    gradient = encoder.deepstack_merger_list["0"].norm.bias.grad
    return logits.detach(), alone.detach(), gradient, pg.tp.rank()


def run_llava(fields, vision, weights, pixels, *, tp):
    """Embeddings that a CLIP tower and a projector give, as one modality; and the names of what is not trained."""
    import torch

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.rank_worker import groups
    from bridge_mimo.towers import clip_tower_spec, projector_spec, vision_modality_spec
    from bridge_mimo.towers.submodules import TowerSubmodules

    with host_backend():
        pg = groups(tp=tp)
        settings = {"tensor_model_parallel_size": tp}
        sizes = (fields["vision_hidden_size"], fields["hidden_size"], fields["hidden_size"])
        spec = vision_modality_spec(
            {"clip": clip_tower_spec(vision, settings, groups=pg, spec="host")},
            groups=pg,
            input_projections=[projector_spec(sizes, settings, groups=pg, spec="host")],
        )
        submodules = TowerSubmodules.from_spec(spec)
        share = weights[pg.tp.rank()]
        _filled(submodules.encoders["clip"], share, "vision_model.tower.{}".format)
        _filled(submodules.input_projections[0], share, "vision_model.projector.{}".format)
        with torch.no_grad():
            output = submodules(encoder_inputs={"clip": {"pixel_values": pixels}})
        frozen = {name for name, value in submodules.named_parameters() if not value.requires_grad}
        held = {name for name, _ in submodules.named_parameters()}
        keys = {value.key for value in _tensors(submodules.sharded_state_dict())}
    return output, frozen, held, keys


def _tensors(state):
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return [value for value in state.values() if isinstance(value, ShardedTensor)]


def run_replicated(config, weights, inputs, *, tp=1, **options):
    """What an HF tower gives as it is, and its parameters' names."""
    import torch
    from megatron.core.transformer.spec_utils import build_module

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.rank_worker import groups
    from bridge_mimo.towers import replicated_tower_spec

    with host_backend():
        pg = groups(tp=tp)
        spec = replicated_tower_spec(config, {"tensor_model_parallel_size": tp}, groups=pg, **options)
        tower = _filled(build_module(spec), weights, lambda name: name.removeprefix("hf."))
        with torch.no_grad():
            output = tower(**inputs)
        state = tower.sharded_state_dict(metadata={"dp_cp_group": pg.dp_cp})
    held = {name: tuple(value.shape) for name, value in tower.named_parameters()}
    # One of all ranks saves a tensor: the others are replicas of it.
    return output, held, {value.key: value.replica_id for value in _tensors(state)}


def wrong_pixels(fields, pixels, grids):
    """A tower that is given pixels of other grids; raises."""
    from megatron.core.transformer.spec_utils import build_module

    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.rank_worker import groups
    from bridge_mimo.towers import tower_spec

    with host_backend():
        build_module(tower_spec(fields, groups=groups(), spec="host"))(pixels, grids)
