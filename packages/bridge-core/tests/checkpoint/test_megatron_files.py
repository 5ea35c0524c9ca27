"""Folders as megatron-core has them: it loads what is written here, what it saves is read, and nothing of it is run."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from bridge_core.checkpoint import items
from bridge_core.checkpoint.dcp import read_dcp
from bridge_core.checkpoint.megatron_files import (
    extra_state_object,
    megatron_side_files,
    read_common,
)
from bridge_core.errors import CheckpointError

torch = pytest.importorskip("torch", reason="torch is the oracle of its own format")

from dcp_folders import SPECS, TENSORS, assert_same_tensors, read_tensor, write  # noqa: E402

COMMON = {"iteration": 7, "checkpoint_version": 3.0, "content_metadata": {"a": [1, None]}}


def installed(distribution):
    """Major and minor version, without importing: megatron-core takes many seconds."""
    try:
        return tuple(map(int, version(distribution).split(".")[:2]))
    except PackageNotFoundError:
        return None


MCORE_VERSION = installed("megatron-core")
MCORE_HEAD = """
import argparse, io, json, sys
import torch, torch.distributed as dist
from bridge_core.checkpoint import items

def setup():
    torch.cuda.synchronize = lambda *args, **kwargs: None     # megatron-core assumes a GPU when it saves
    torch.cuda.current_device = lambda: "cpu"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

def sharded(data):
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
    whole = ShardedTensor.from_rank_offsets
    layers = data["layers.w"]
    return {
        "w": {"top": whole("dec.w", data["dec.w"][:2], (0, 0, 2)), "low": whole("dec.w", data["dec.w"][2:], (0, 1, 2))},
        "l0": whole("layers.w", layers[0], (0, 0, 2), prepend_axis_num=1),
        "l1": whole("layers.w", layers[1], (0, 1, 2), prepend_axis_num=1),
        "scalar": whole("scalar", data["scalar"]),
        "fp8": whole("fp8", data["fp8"]),
        "x0": ShardedObject("x._extra_state", None, (2,), (0,)),
        "x1": ShardedObject("x._extra_state", ["\\u00fc", 1], (2,), (1,)),
    }
"""
MCORE_SAVE = (
    MCORE_HEAD
    + """
def main(folder, data):
    setup()
    from megatron.core import dist_checkpointing
    state = sharded(torch.load(data, weights_only=True))
    args = argparse.Namespace(num_layers=4, inner=argparse.Namespace(tp=2))
    dist_checkpointing.save({**state, "iteration": 7, "args": args}, folder)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""
)
MCORE_LOAD = (
    MCORE_HEAD
    + """
def main(folder, data, out):
    setup()
    from megatron.core import dist_checkpointing
    right = torch.load(data, weights_only=True)
    state = sharded({key: torch.zeros_like(tensor) for key, tensor in right.items()})
    state["x1"].data = None
    loaded = dist_checkpointing.load(state, folder)
    _, missing, unexpected = dist_checkpointing.load(
        sharded({key: torch.zeros_like(tensor) for key, tensor in right.items()}), folder, strict="return_all")
    whole = {
        "dec.w": torch.cat([loaded["w"]["top"], loaded["w"]["low"]]),
        "layers.w": torch.stack([loaded["l0"], loaded["l1"]]),
        "scalar": loaded["scalar"],
        "fp8": loaded["fp8"],
    }
    objects = [loaded["x0"], loaded["x1"]]
    for key in ("w", "l0", "l1", "scalar", "fp8", "x0", "x1"):
        del loaded[key]
    torch.save([whole, objects, loaded, sorted(missing), sorted(unexpected)], out)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""
)
MCORE_TENSORS = {key: tensor for key, tensor in TENSORS.items() if key != "empty"}
MCORE_SPECS = {key: spec for key, spec in SPECS.items() if key != "empty"}


@pytest.fixture
def run_mcore(tmp_path):
    if MCORE_VERSION is None:
        pytest.skip("megatron-core is the oracle")
    torch.save(MCORE_TENSORS, tmp_path / "data.pt")

    def run(program, folder, *arguments):
        script = tmp_path / "script.py"  # its writer starts processes, which import this file again
        script.write_text(program)
        command = [sys.executable, str(script), str(folder), str(tmp_path / "data.pt"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


@pytest.mark.slow
def test_we_read_what_megatron_core_saves(run_mcore, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    run_mcore(MCORE_SAVE, folder)
    found = read_dcp(folder)
    assert_same_tensors({key: read_tensor(found, key) for key in found.tensors}, MCORE_TENSORS)
    assert {"x._extra_state/shard_0_2", "x._extra_state/shard_1_2"} <= found.objects.keys()
    extra = found.read_object_bytes("x._extra_state/shard_1_2")
    assert items.load_object(extra, where="x") == [["ü", 1]]
    for source in (folder, found):
        common = read_common(source)
        assert common["iteration"] == 7
        assert common["args"].NAME == "argparse.Namespace"
        assert common["args"].fields["num_layers"] == 4
        assert common["args"].fields["inner"].fields == {"tp": 2}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["side files", "common state object"])
def test_megatron_core_loads_what_we_write(variant, run_mcore, tmp_path):
    """With default strictness; and with the strictest, nothing is missing or unexpected."""
    folder = tmp_path / "ours"
    objects = {
        "x._extra_state/shard_0_2": extra_state_object(),
        "x._extra_state/shard_1_2": items.save_object([["ü", 1]]),
    }
    files = megatron_side_files(COMMON)
    if variant == "common state object":
        if MCORE_VERSION and MCORE_VERSION < (0, 17):
            pytest.skip("megatron-core before 0.17 reads common.pt only")
        del files["common.pt"]
        objects["common_state/shard_0_1"] = items.save_object([COMMON])  # as 0.19 writes it
    write(folder, specs=MCORE_SPECS, objects=objects, tensors=MCORE_TENSORS, files=2)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    run_mcore(MCORE_LOAD, folder, tmp_path / "out.pt")
    whole, extra, common, missing, unexpected = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_same_tensors(whole, MCORE_TENSORS)
    assert extra == [None, ["ü", 1]]
    assert common == COMMON
    assert (missing, unexpected) == ([], [])
    assert read_common(folder) == COMMON


def test_side_files_are_plain(tmp_path):
    files = megatron_side_files(COMMON)
    assert json.loads(files["metadata.json"])["sharded_backend"] == "torch_dist"
    (tmp_path / "common.pt").write_bytes(files["common.pt"])
    assert torch.load(tmp_path / "common.pt", weights_only=True) == COMMON
    with pytest.raises(CheckpointError, match=r"(?s)plain values.*common\.pt.*PosixPath"):
        megatron_side_files({"path": Path("/x")})


def test_missing_or_odd_common_state_is_said(tmp_path):
    write(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"no common state(?s:.*)common_state/shard_0_1"):
        read_common(tmp_path / "ours")
    (tmp_path / "ours" / "common.pt").write_bytes(items.save_object([1]))
    with pytest.raises(CheckpointError, match=r"not a dict(?s:.*)list"):
        read_common(tmp_path / "ours")


def test_hostile_common_state_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    torch.save({"iteration": 1, "args": Hostile()}, tmp_path / "common.pt")
    assert read_common(tmp_path)["iteration"] == 1
    assert not (tmp_path / "marker").exists()
