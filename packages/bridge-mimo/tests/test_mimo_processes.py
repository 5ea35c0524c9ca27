"""Runs that share nothing but folders: the command under torchrun, and ranks that start anew for every step."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="real ranks need torch")
pytest.importorskip("megatron.core.models.mimo.comm", reason="live components need megatron-core 0.17")
pytest.importorskip("transformers", reason="tiny models are transformers'")

from live_mimo_jobs import load_checkpoint, relay_checkpoint

from bridge_core.testing.hf_layouts import save_published
from bridge_core.testing.hf_models import make_model
from bridge_core.testing.ranks import RankPool
from bridge_mimo.checkpoint.convert import verify

pytestmark = pytest.mark.slow


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command += ["-m", "bridge_mimo.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_a_checkpoint_goes_from_run_to_run(tmp_path):
    """HF -> checkpoint by two workers -> ranks in its layouts -> ranks in others -> HF by two workers, to the bit."""
    hf = save_published(make_model("qwen3_5"), tmp_path / "hf")
    given = ("--component", "language=tp=2,dp=1", "--component", "images=dp=1")
    done = torchrun("import", hf, tmp_path / "run", *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("imported") == 1
    assert verify(hf, tmp_path / "run").ok

    with RankPool(3, timeout_s=300) as first:  # knows the checkpoint alone
        layouts = first.run(relay_checkpoint, str(tmp_path / "run"), str(tmp_path / "trained"))
    assert layouts == ["language: tp=2 dp=1, images: tp=1 dp=1"] * 3
    elsewhere = {"images": {"tp": 2, "dp": 1}, "language": {"pp": 2, "dp": 1}}
    with RankPool(4, timeout_s=300) as second:
        second.run(load_checkpoint, str(hf), elsewhere, str(tmp_path / "trained"), str(tmp_path / "live"))
    assert (tmp_path / "live" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()

    done = torchrun("export", tmp_path / "trained", tmp_path / "back", "--source", hf, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["from_source"]) == 15
    share = sum(report["moved"][path] for path in ("kernel", "gathered", "staged"))
    assert 0.3 < share / report["nbytes"] < 0.7
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
