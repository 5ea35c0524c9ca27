"""Sources in fp8 blocks with scales: dequantised on the way into components, prediction layers too."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the oracle of the codec is torch's")
pytest.importorskip("transformers", reason="tiny models are transformers'")

import live_mimo_jobs as jobs  # noqa: E402
from fp8_folders import as_read, load, write_fp8  # noqa: E402

from bridge_mimo import ComponentLayout as C  # noqa: E402
from bridge_mimo import MegatronMIMOBridge  # noqa: E402

LAYOUTS = {"language": {"tp": 2, "dp": 1}, "images": {"dp": 1}}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The language model's linears and those of the prediction layer are in fp8, the tower is not."""
    folder = write_fp8(tmp_path_factory.mktemp("fp8") / "hf", "qwen3_5")
    codes = {name for name, tensor in load(folder).items() if tensor.dtype == torch.float8_e4m3fn}
    assert {name.split(".")[0] for name in codes} == {"model", "mtp"}
    return folder


def same_values(found, wanted):
    """Equal to the bit; where the family keeps fp32, the values are those of the file."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].float(), tensor.float()), name


def test_offline_there_and_back(published, tmp_path):
    stored = load(published)
    bridge = MegatronMIMOBridge.from_hf_pretrained(published, parallelism={"language": C(tp=2), "images": C()})
    plan = bridge.plan()
    plan.audit({name: tensor.shape for name, tensor in as_read(stored).items()})
    assert any(meta.dtype == "F8_E4M3" for meta in plan.metadata())
    bridge.import_ckpt(published, tmp_path / "m")
    bridge.export_ckpt(tmp_path / "m", tmp_path / "plain")
    same_values(load(tmp_path / "plain"), as_read(stored))
    bridge.export_ckpt(tmp_path / "m", tmp_path / "fp8", fp8=True)
    same_values(as_read(load(tmp_path / "fp8")), as_read(stored))


@pytest.mark.parametrize("fp8", [False, True])
def test_live_components(rank_pool, published, tmp_path, fp8):
    pytest.importorskip("megatron.core.models.mimo.comm", reason="live components need megatron-core 0.17")
    wanted = as_read(load(published))
    reports = rank_pool.run(jobs.from_fp8, str(published), LAYOUTS, str(tmp_path), fp8=fp8, ranks=range(3))
    assert all(report.bytes_read for report, _, _ in reports)
    out = load(tmp_path / "hf")
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in out.values()) is fp8
    same_values(as_read(out) if fp8 else out, wanted)
    for _, codes, stream in reports:
        assert bool(codes) is fp8
        same_values(stream, {name: tensor for name, tensor in wanted.items() if not name.startswith("mtp.")})
    # The checkpoint has prediction layers as well, plain: it exports without the folder that they came from.
    alone = MegatronMIMOBridge.from_hf_config(MegatronMIMOBridge.from_hf_pretrained(published).config)
    alone.export_ckpt(tmp_path / "run", tmp_path / "exported")
    same_values(load(tmp_path / "exported"), wanted)
