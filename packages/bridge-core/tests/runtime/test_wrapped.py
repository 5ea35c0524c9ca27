"""Models as trainers hold them: in mcore's DDP and Float16Module, and replicated over context-parallel ranks.

mcore's DDP asks for nothing of a GPU but a device to put its buffers on; the host backend answers that with the CPU.
Attention over context-parallel ranks needs Transformer Engine, which needs a GPU: mcore's own attention refuses a
configuration with it (megatron-core 0.19.2, transformer/dot_product_attention.py, `DotProductAttention.__init__`).
Parameters know nothing of it but their replicas: so these models are built with context-parallel groups, loaded, saved,
streamed and described, and not run.
"""

from __future__ import annotations

import pytest
from runtime.wrapped_jobs import everything

from bridge_core import ParallelLayout
from bridge_core.testing.hf_models import make_model, save_model

torch = pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core", reason="real models need megatron-core")
pytest.importorskip("transformers", reason="the oracle is transformers")

CASES = [
    ("qwen3", {"tp": 2, "dp": 2}, "ddp", "fp32"),
    ("qwen3_moe", {"ep": 2, "dp": 2}, "distributed optimizer", "bf16"),
    ("llama-tied", {"pp": 2, "dp": 2}, "distributed optimizer", "fp32"),
    ("mixtral", {"tp": 2, "pp": 2, "vpp": 2}, "Float16Module", "bf16"),
    ("qwen3", {"pp": 2, "dp": 2}, "Float16Module in ddp", "bf16"),
    ("qwen3", {"cp": 2}, "none", "fp32"),
    ("qwen3_moe", {"cp": 2, "ep": 2}, "none", "fp32"),
    ("qwen3", {"tp": 2, "cp": 2}, "ddp", "bf16"),
]
# Where a Megatron checkpoint is saved and loaded too: mcore starts a process for each, which takes seconds.
MEGATRON = ("Float16Module in ddp", "none")
CLASSES = {"none": "GPTModel", "Float16Module": "Float16Module"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """HF folder of each model in each dtype, made once, with its tensors."""
    from safetensors.torch import load_file

    made = {}

    def make(name, dtype):
        if (name, dtype) not in made:
            model = make_model(name)
            model = model.bfloat16() if dtype == "bf16" else model
            folder = save_model(model, tmp_path_factory.mktemp(name) / "hf", max_shard_size="150KB")
            tensors = {}
            for file in folder.glob("*.safetensors"):
                tensors |= load_file(file)
            made[name, dtype] = folder, tensors
        return made[name, dtype]

    return make


@pytest.mark.parametrize(("name", "layout", "wrapper", "dtype"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_load_describe_stream_and_save(device_ranks, folders, tmp_path, name, layout, wrapper, dtype):
    folder, expected = folders(name, dtype)
    ranks = range(ParallelLayout(**layout).world_size)
    options = {"megatron": wrapper in MEGATRON and name == "qwen3"}
    results = device_ranks.run(everything, str(folder), layout, wrapper, dtype, str(tmp_path), ranks=ranks, **options)
    for file in sorted(folder.glob("*.safetensors*")):
        for way in ("hf", "owned"):
            assert (tmp_path / way / file.name).read_bytes() == file.read_bytes(), file.name
    total = sum(tensor.nbytes for tensor in expected.values())
    for way in ("saved", "owned"):
        assert sum(result[way].bytes_written for result in results) == total
    covered = dict.fromkeys(expected, 0)
    for result in results:
        assert result["class"] == CLASSES.get(wrapper, "DistributedDataParallel")
        assert result["cp"] == layout.get("cp", 1)
        assert result["loaded"].bytes_read <= result["held"]
        assert set(result["entries"]) <= expected.keys()
        for kind in ("stream", "again"):
            compare(result[kind], expected)
        check_shards(result["shards"], expected, covered)
    assert covered == {name: tensor.numel() for name, tensor in expected.items()}
    if layout.get("cp", 1) > 1:  # replicas over cp share the work of writing
        assert all(result["saved"].bytes_written < total for result in results)


def compare(got, expected) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def check_shards(shards, expected, covered) -> None:
    """Every view has the checkpoint's bits; first copies are counted."""
    for name, box, tensor, replica in shards:
        if box is not None:
            region = tuple(slice(start, start + size) for start, size in zip(*box, strict=True))
            assert torch.equal(tensor.reshape(box.shape), expected[name][region]), name
        covered[name] += tensor.numel() if replica == 0 else 0
