"""`bridge-core` under torchrun: two workers share a conversion, and fail together."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import broken_worker
import pytest
from hf_folders import write_hf

from bridge_core.checkpoint.verify import verify

pytestmark = pytest.mark.slow


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)


def test_two_workers_share_a_conversion(tmp_path):
    pytest.importorskip("torch")
    hf = write_hf(tmp_path / "hf", "qwen3_moe", files=2)
    done = torchrun("-m", "bridge_core.cli", "import", hf, tmp_path / "megatron")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("imported") == 1
    assert verify(hf, tmp_path / "megatron").ok
    done = torchrun(
        "-m", "bridge_core.cli", "export", tmp_path / "megatron", tmp_path / "back", "--source", hf, "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    share = sum(report["moved"][path] for path in ("kernel", "gathered", "staged"))
    assert 0.3 < share / report["nbytes"] < 0.7
    assert verify(hf, tmp_path / "back").ok


@pytest.mark.parametrize(
    ("rank", "fault", "words"),
    [
        (0, "disk", "No space left on device"),
        (1, "disk", "rank 1 failed: a file could not be read or written"),
        (1, "mount", "rank 1 failed: no such folder"),
        (1, "kill", ""),
    ],
)
def test_one_failing_worker_ends_all_of_them(tmp_path, rank, fault, words):
    pytest.importorskip("torch")
    hf = write_hf(tmp_path / "hf")
    out = tmp_path / "out"
    out.mkdir()
    done = torchrun(broken_worker.__file__, rank, fault, "import", hf, out / "megatron")
    assert done.returncode != 0
    assert not (out / "megatron").exists()
    if fault != "kill":  # torchrun stops the others when one is killed: they may have no time to clean up
        assert list(out.iterdir()) == []
        assert words in done.stderr
        assert done.stderr.count("bridge-core: ") == 1
    assert "imported" not in done.stdout


def test_bad_input_is_told_once_by_two_workers(tmp_path):
    pytest.importorskip("torch")
    done = torchrun("-m", "bridge_core.cli", "import", tmp_path / "absent", tmp_path / "megatron")
    assert done.returncode != 0
    assert done.stderr.count("bridge-core: no such folder") == 1
    assert list(tmp_path.iterdir()) == []
