"""What a `MimoModel` of live components computes: the logits of transformers, with images and without."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core.models.mimo.comm", reason="live components need megatron-core 0.17")
pytest.importorskip("transformers", reason="the oracle is transformers")

import llava_family  # noqa: E402
from forward_jobs import llava, logits  # noqa: E402

from bridge_core import verify  # noqa: E402
from bridge_core.testing.hf_layouts import save_published  # noqa: E402
from bridge_core.testing.hf_models import make_model, save_model  # noqa: E402
from bridge_mimo.checkpoint.convert import verify as mimo_verify  # noqa: E402

CASES = {
    "qwen3_vl": (6, {"language": {"tp": 2, "pp": 2, "dp": 1}, "images": {"tp": 2, "dp": 1}}),  # deepstack
    "qwen3_5": (4, {"language": {"tp": 2, "dp": 1}, "images": {"pp": 2}}),
    "qwen3_vl_moe": (4, {"images": {"tp": 2}, "language": {"ep": 2, "dp": 2}}),
    "qwen3_5 colocated": (4, {"language": {"tp": 4}, "images": {"tp": 2}}),
    "qwen3_vl colocated": (2, {"language": {"tp": 1}, "images": {"tp": 2}}),
    "qwen3_vl hf-tower": (3, {"language": {"dp": 1}, "images": {"tp": 2, "dp": 1}}),
}
TOKENS = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
GRIDS = torch.tensor([[1, 4, 4], [1, 2, 8]])
VOCABULARY = 131


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(rank_pool, tmp_path, case):
    ranks, layouts = CASES[case]
    model = make_model(case.split()[0], **TOKENS)
    folder = save_published(model, tmp_path / "hf")
    batches = [batch(model, images=True), batch(model, images=False)]
    together = case.endswith("colocated")
    options = {"colocated": together, "hf_towers": ("images",) if case.endswith("hf-tower") else ()}
    results = rank_pool.run(logits, str(folder), layouts, batches, **options, ranks=range(ranks))
    for number, theirs in enumerate(expected(model, batches)):
        outputs = [(tp, found[number]) for found, tp in results if found[number] is not None]
        tp = layouts["language"].get("tp", 1)
        assert {rank for rank, _ in outputs} == set(range(tp))
        replicas = [torch.cat([output for rank, output in outputs if rank == r]) for r in range(tp)]
        whole = torch.cat(replicas, dim=-1)[..., :VOCABULARY]
        if not together:  # every data-parallel replica has computed all of it
            theirs = theirs.repeat(len(whole) // len(theirs), 1, 1)
        torch.testing.assert_close(whole, theirs, rtol=0, atol=1e-4)


def batch(model, *, images):
    """Two texts of 14 tokens with an image of four tokens each, in different places; or with none."""
    tokens = (torch.arange(28) * 7 % 110).view(2, 14)
    if not images:
        positions = torch.arange(14).expand(3, 2, 14)
        return {"tokens": tokens, "inputs": None, "positions": positions}
    for row, first in enumerate((3, 8)):
        tokens[row, first] = TOKENS["vision_start_token_id"]
        tokens[row, first + 1 : first + 5] = TOKENS["image_token_id"]
        tokens[row, first + 5 : first + 6] = TOKENS["vision_end_token_id"]
    vision = model.config.vision_config
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(GRIDS.prod(1).sum()), size, generator=torch.Generator().manual_seed(5))
    kinds = (tokens == TOKENS["image_token_id"]).int()
    positions, _ = model.model.get_rope_index(tokens, mm_token_type_ids=kinds, image_grid_thw=GRIDS)
    assert len({tuple(axis.flatten().tolist()) for axis in positions}) == 3, "the axes differ"
    inputs = {"qwen_visual": {"pixel_values": pixels, "grid_thw": GRIDS}}
    return {"tokens": tokens, "inputs": inputs, "positions": positions}


def expected(model, batches):
    found = []
    for one in batches:
        images = (one["inputs"] or {}).get("qwen_visual", {})
        with torch.no_grad():
            output = model(
                input_ids=one["tokens"],
                position_ids=one["positions"],
                pixel_values=images.get("pixel_values"),
                image_grid_thw=images.get("grid_thw"),
                mm_token_type_ids=(one["tokens"] == TOKENS["image_token_id"]).int(),
            )
        found.append(output.logits)
    return found


def test_a_model_that_a_third_party_registered(rank_pool, tmp_path):
    """LLaVA: a CLIP tower and a projector on two ranks, Llama on two others; no code here knows it."""
    llava_family.register()
    model = llava_family.tiny_model()
    folder = save_model(model, tmp_path / "hf")
    image = model.config.image_token_index
    tokens = 10 + torch.arange(44).view(2, 22) * 7 % 110
    text = {"tokens": tokens.clone(), "inputs": None, "positions": torch.arange(22).expand(2, 22)}
    tokens[0, 3:19] = tokens[1, 1:17] = image
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    seen = text | {"tokens": tokens, "inputs": {"clip": {"pixel_values": pixels}}}
    layouts = {"language": {"tp": 2, "dp": 1}, "images": {"tp": 2, "dp": 1}}
    out, run = tmp_path / "out", tmp_path / "run"
    results = rank_pool.run(llava, str(folder), layouts, str(out), str(run), [seen, text], ranks=range(4))
    assert verify(folder, out).ok
    assert mimo_verify(folder, run).ok
    for number, one in enumerate((seen, text)):
        with torch.no_grad():
            theirs = model(one["tokens"], pixel_values=pixels if one["inputs"] else None).logits
        parts = [found[number] for found, tp in results if tp is not None]
        torch.testing.assert_close(torch.cat(parts, dim=-1)[..., :VOCABULARY], theirs, rtol=0, atol=1e-4)
