"""A conversion that is killed at any moment leaves nothing that looks finished, or the finished thing."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time

import killed
import numpy as np
import pytest
from hf_folders import write_folder
from simulation import CONFIGS, make_plan

from bridge_core.checkpoint.verify import verify
from bridge_core.topology import ParallelLayout

MOMENTS = 20

# About 200 MB in float32: long runs for the kernel, and short ones (q, k, v of small heads) for the other paths.
CONFIG = CONFIGS["llama"] | {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 8000,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint on both sides."""
    root = tmp_path_factory.mktemp("kill")
    random_numbers = np.random.default_rng(0)
    shapes = make_plan(CONFIG, ParallelLayout()).hf_tensors
    tensors = {name: random_numbers.random(shape, dtype=np.float32) for name, shape in shapes.items()}
    write_folder(root / "hf", CONFIG, tensors, files=3)
    killed.convert("import", str(root / "hf"), str(root / "megatron"))
    yield {"import": root / "hf", "export": root / "megatron"}
    shutil.rmtree(root)


def start(direction, source, output):
    """A process that is about to begin, and the pipe through which it says when it is done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed", "ml_dtypes"])
    here, there = context.Pipe()
    process = context.Process(target=killed.begin, args=(there, direction, str(source), str(output)))
    process.start()
    there.close()
    assert here.recv() == "ready"
    return process, here


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path, folders, direction):
    """At 20 moments of the run; every other time there is an older folder to replace."""
    source, output = folders[direction], tmp_path / "out" / "folder"
    output.parent.mkdir()
    process, pipe = start(direction, source, output)
    began = time.perf_counter()
    assert pipe.recv() == "done"
    seconds = time.perf_counter() - began
    process.join()
    chosen = random.Random(direction)
    unfinished = 0
    for number in range(MOMENTS):
        shutil.rmtree(output, ignore_errors=True)
        if number % 2:
            output.mkdir()
            (output / "old.txt").write_text("old")
        process, _ = start(direction, source, output)
        time.sleep(chosen.uniform(0, 1.1 * seconds))
        process.kill()
        process.join()
        if output.exists() and not (output / "old.txt").exists():
            assert verify(folders["import"], output).ok
        unfinished += any(output.parent.glob(".*.partial"))
    assert unfinished, "no run was killed in the middle of its work"
    killed.convert(direction, str(source), str(output))
    assert verify(folders["import"], output).ok
    assert sorted(path.name for path in output.parent.iterdir()) == ["folder"]
