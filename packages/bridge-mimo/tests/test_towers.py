"""Vision towers against transformers' own: outputs and gradients, by planned names, cut over tp and pp."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core.models.mimo.comm", reason="stages of a tower need megatron-core 0.17")
pytest.importorskip("transformers")

import tower_jobs as jobs  # noqa: E402

from bridge_core import AutoBridge, ParallelLayout  # noqa: E402
from bridge_core.runtime.tensors import window  # noqa: E402

# Images of several sizes, one with fewer rows than the table of positions, and a video of three frames.
GRIDS = torch.tensor([[1, 4, 6], [1, 8, 2], [3, 4, 4], [1, 2, 2]])


class Reference:
    """A tiny HF model, what its tower gives, and the gradients that a fixed cotangent makes."""

    def __init__(self, name):
        from bridge_core.testing.hf_models import make_model

        model = make_model(name)
        self.config = model.config.to_dict()
        self.bridge = AutoBridge.from_hf_config(self.config)
        self.fields = self.bridge.fields
        tower = model.model.visual
        vision = model.config.vision_config
        draw = torch.Generator().manual_seed(3)
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self.pixels = torch.randn(int(GRIDS.prod(1).sum()), size, generator=draw)
        output = tower(self.pixels, grid_thw=GRIDS)
        wide = torch.cat((output.pooler_output, *(getattr(output, "deepstack_features", None) or ())), dim=-1)
        self.cotangent = torch.randn(wide.shape, generator=draw)
        wide.backward(self.cotangent)
        self.output = wide.detach()
        named = {f"model.visual.{name}": value for name, value in tower.named_parameters()}
        self.weights = {name: value.detach() for name, value in named.items()}
        self.gradients = {name: value.grad for name, value in named.items()}

    def shares(self, tensors, tp):
        """HF tensors of the tower, cut and named by the plan, for each tensor-parallel rank."""
        plan = self.bridge.plan(ParallelLayout(tp=tp))
        return [dict(self._share(tensors, shard) for shard in _vision(plan, rank)) for rank in range(tp)]

    def _share(self, tensors, shard):
        filled = torch.full(shard.shape, torch.nan)
        for piece in shard.pieces:
            source = tensors[piece.source.tensor].contiguous().view(-1)
            window(filled.view(-1), piece.shape, piece.target).copy_(window(source, piece.shape, piece.source))
        assert not filled.isnan().any()
        return shard.name, filled


def _vision(plan, rank):
    return [shard for shard in plan.local_shards(rank) if shard.name.startswith("vision_model.")]


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen3_5"])
def reference(request):
    return Reference(request.param)


RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS = {
    "one": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-local": {"tp": 2, "spec": "local", "rest": RECOMPUTED},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_tower_equals_transformers(rank_pool, reference, layout):
    tp, pp = layout.get("tp", 1), layout.get("pp", 1)
    uneven = reference.fields["vision_num_layers"] % pp
    rest = layout.get("rest", {}) | ({"num_layers_in_first_pipeline_stage": 2} if uneven else {})
    gradients = reference.shares(reference.gradients, tp)
    results = rank_pool.run(
        jobs.run_tower,
        reference.fields,
        reference.shares(reference.weights, tp),
        reference.pixels,
        GRIDS,
        reference.cotangent,
        ranks=range(tp * pp),
        **layout | {"rest": rest},
    )
    held = [set() for _ in range(tp)]
    keys = {}
    for output, found, shapes, rank in results:
        if output is not None:
            torch.testing.assert_close(output, reference.output, rtol=1e-5, atol=1e-5)
        assert not held[rank] & set(found)  # a stage holds what no other does
        held[rank] |= set(found)
        for name, gradient in found.items():
            assert torch.allclose(gradient, gradients[rank][name], rtol=1e-4, atol=2e-5), name
        keys |= shapes
    assert sum(output is not None for output, *_ in results) == tp
    assert held == [set(share) for share in gradients]  # and all together what the plan has
    _check_keys(keys, reference)


def _check_keys(keys, reference):
    """mcore's sharded state has every planned tensor, whole: layers stacked, nothing cut that is not, or cut twice."""
    layers = reference.fields["vision_num_layers"]
    wanted = {}
    for name, value in reference.shares(reference.weights, 1)[0].items():
        key, shape = name.replace("vision_model.", "encoders.qwen_visual."), tuple(value.shape)
        head, _, tail = key.partition(".layers.")
        if tail:
            key, shape = f"{head}.layers.{tail.partition('.')[2]}", (layers, *shape)
        wanted[key] = shape
    assert keys == wanted
