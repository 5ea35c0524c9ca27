"""Several processes share a conversion and fail together; what failed or was killed never looks finished."""

import json
import os
import subprocess
import sys

import fault_jobs
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from hf_cases import peft_adapter  # noqa: E402 - after the skips

from bridge_core.testing.hf_models import make_model, save_model  # noqa: E402
from bridge_peft import export_adapter_ckpt, import_adapter_ckpt  # noqa: E402
from bridge_peft.cli import main  # noqa: E402


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_model(make_model("qwen3"), tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def adapter(dense, tmp_path_factory):
    return peft_adapter(dense, tmp_path_factory.mktemp("adapter"), target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture(scope="module")
def run(adapter, dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    import_adapter_ckpt(adapter, folder, dense)
    return folder


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)


def files(folder):
    """Bytes of all files in a folder, by name."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_two_workers_write_what_one_does(dense, adapter, run, tmp_path):
    done = torchrun("-m", "bridge_peft.cli", "import", adapter, tmp_path / "run", "--hf-model", dense)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("imported") == 1
    assert files(tmp_path / "run") == files(run)
    done = torchrun("-m", "bridge_peft.cli", "export", tmp_path / "run", tmp_path / "hf", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"] == 8
    export_adapter_ckpt(run, tmp_path / "alone")
    assert files(tmp_path / "hf") == files(tmp_path / "alone")


@pytest.mark.slow
def test_a_killed_worker_leaves_nothing_that_looks_finished(dense, run, tmp_path):
    """The other one may be stopped too early to clean up; a later run is not in its way."""
    out = tmp_path / "out"
    done = torchrun(fault_jobs.__file__, 1, "kill", "export", run, out, "--hf-model", dense)
    assert done.returncode != 0
    assert not out.exists()
    assert "exported" not in done.stdout
    export_adapter_ckpt(run, out, dense)
    assert files(out).keys() == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("fault", ["mount", "disk"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("verb", ["export", "import"])
def test_one_failing_worker_fails_them_all(rank_pool, dense, adapter, run, tmp_path, verb, rank, fault):
    source = {"export": run, "import": adapter}[verb]
    job = (verb, fault, rank, str(source), str(tmp_path / "out"), str(dense))
    texts = rank_pool.run(fault_jobs.convert, *job, ranks=[0, 1])
    check_texts(texts, rank, fault)
    assert list(tmp_path.iterdir()) == []


def check_texts(texts, rank, fault):
    """The failing process raises its own error, all others say whose it is."""
    assert ("no such folder" if fault == "mount" else "No space left on device") in texts[rank]
    assert f"rank {rank} failed" in texts[1 - rank]


@pytest.mark.parametrize(("verb", "rank"), [("save", 0), ("checkpoint", 0), ("checkpoint", 1)])
@pytest.mark.parametrize("fault", ["mount", "disk"])
def test_one_failing_rank_of_a_model_fails_them_all(rank_pool, dense, tmp_path, verb, rank, fault):
    """An HF adapter is written by one rank, a checkpoint by all of them."""
    job = (verb, fault, rank, str(dense), str(tmp_path / "out"), {"tp": 2})
    texts = rank_pool.run(fault_jobs.save, *job, ranks=[0, 1])
    check_texts(texts, rank, fault)
    left = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert left == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_give_its_share_fails_them_all(rank_pool, dense, tmp_path, rank):
    """It is told before the sum in which the others would wait for it, and named once."""
    job = ("save", "memory", rank, str(dense), str(tmp_path / "out"), {"tp": 2})
    texts = rank_pool.run(fault_jobs.save, *job, ranks=[0, 1])
    assert texts[rank] == "no memory left"
    assert f"{rank} failed: MemoryError: no memory left" in texts[1 - rank]
    assert texts[1 - rank].count("failed") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_is_told_by_one_of_all_workers(tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", str(rank))
    assert main(["export", str(tmp_path / "absent"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("bridge-peft: no such checkpoint folder") == (rank == 0)
    assert list(tmp_path.iterdir()) == []
