"""torch_dist folders: torch and megatron-core read what is written here, and the other way round."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge_core.checkpoint import items
from bridge_core.checkpoint.dcp import read_dcp
from bridge_core.checkpoint.dcp_layout import plan_dcp, write_frames, write_metadata
from bridge_core.checkpoint.megatron_files import (
    common_state_object,
    extra_state_object,
    megatron_side_files,
    read_common,
)
from bridge_core.errors import CheckpointError, OutputError, UnsafeCheckpointError

torch = pytest.importorskip("torch", reason="torch is the oracle of its own format")

import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint import FileSystemReader, metadata  # noqa: E402
from torch.distributed.checkpoint.filesystem import _StorageInfo  # noqa: E402

BF16 = torch.arange(24, dtype=torch.float32).to(torch.bfloat16).reshape(4, 6)
TENSORS = {
    "dec.w": BF16,
    "layers.w": torch.arange(6, dtype=torch.int64).reshape(2, 3) - 3,
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
    "fp8": torch.arange(40, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(2, 4, 5),
}
SPECS = {
    "dec.w": ("BF16", (4, 6), [((0, 0), (2, 6)), ((2, 0), (2, 2)), ((2, 2), (2, 4))]),
    "layers.w": ("I64", (2, 3), [((1, 0), (1, 3)), ((0, 0), (1, 3))]),
    "scalar": ("F32", (), [((), ())]),
    "empty": ("F32", (0, 3), [((0, 0), (0, 3))]),
    "fp8": ("F8_E4M3", (2, 4, 5), [((0, 0, 0), (2, 4, 5))]),
}
OBJECTS = {"x._extra_state/shard_0_2": extra_state_object(), "x._extra_state/shard_1_2": items.save_object(["ü", 1])}
COMMON = {"iteration": 7, "checkpoint_version": 3.0, "content_metadata": {"a": [1, None]}}


def raw_bytes(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def box_of(tensor, offsets, sizes):
    return tensor[tuple(slice(low, low + size) for low, size in zip(offsets, sizes, strict=True))]


def write(folder, specs=SPECS, objects=OBJECTS, tensors=TENSORS, **options):
    """Write a whole folder; tensor data goes into the gaps by plain file writes."""
    layout = plan_dcp(specs, objects, **options)
    folder.mkdir(exist_ok=True)
    write_frames(folder, layout)
    for chunk in layout.placed():
        with open(folder / chunk.file, "r+b") as file:
            file.seek(chunk.data_offset)
            file.write(raw_bytes(box_of(tensors[chunk.key], chunk.offsets, chunk.sizes)))
    write_metadata(folder, layout)
    return layout


def read_tensor(found, key):
    """A tensor put together from its chunks by torch, at the places that were located."""
    entry = found.tensors[key]
    dtype = TENSORS[key].dtype
    whole = torch.empty(entry.shape, dtype=dtype)
    for offsets, sizes, file, offset, length in entry.chunks:
        data = (found.path / file).read_bytes()
        item = items.locate_tensor(lambda o, n, data=data: data[o : o + n], offset, length, where=file)
        assert (item.dtype, item.contiguous, item.shape) == (entry.dtype, True, sizes)
        raw = data[offset + item.data_offset :][: item.nbytes]
        if raw:
            part = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).reshape(sizes)
            box_of(whole, offsets, sizes).copy_(part)
    return whole


def assert_same_tensors(read, expected=TENSORS):
    assert read.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (read[key].dtype, read[key].shape) == (tensor.dtype, tensor.shape)
        assert raw_bytes(read[key]) == raw_bytes(tensor)


# ---------------------------------------------------------------- torch reads ours


@pytest.mark.parametrize("files", [1, 2, 5])
def test_torch_loads_what_we_write(files, tmp_path):
    write(tmp_path / "ours", files=files)
    into = {key: torch.ones_like(tensor) for key, tensor in TENSORS.items()}
    dcp.load(into, checkpoint_id=tmp_path / "ours", no_dist=True)
    assert_same_tensors(into)


def graph(value):
    """Everything that a metadata object consists of, as plain values."""
    if dataclasses.is_dataclass(value):
        return type(value).__name__, {
            field.name: graph(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {(key if isinstance(key, str) else str(graph(key))): graph(item) for key, item in value.items()}
    if isinstance(value, list):
        return [graph(item) for item in value]
    return type(value).__name__, str(value)


def test_our_metadata_means_what_torchs_means(tmp_path):
    """The same objects, but for what names the run (ids, paths, where in the file) and torch's paths of nested keys."""
    whole = {key: (dtype, shape, [((0,) * len(shape), shape)]) for key, (dtype, shape, _) in SPECS.items()}
    write(tmp_path / "ours", specs=whole, objects={"note": items.save_object("hi")})
    dcp.save({**TENSORS, "note": "hi"}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    ours, theirs = (FileSystemReader(tmp_path / name).read_metadata() for name in ("ours", "theirs"))
    assert type(ours) is metadata.Metadata
    assert graph(ours.state_dict_metadata) == graph(theirs.state_dict_metadata)
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    for index, info in ours.storage_data.items():
        assert type(info) is _StorageInfo
        assert vars(info).keys() == vars(theirs.storage_data[index]).keys()
    assert {type(key.offset) for key in ours.storage_data} == {torch.Size, type(None)}
    assert graph(ours.storage_meta)[0] == graph(theirs.storage_meta)[0]
    # What DCP writes for itself can be pickled again and read here.
    (tmp_path / "ours" / ".metadata").write_bytes(pickle.dumps(ours))
    assert read_dcp(tmp_path / "ours").tensors["dec.w"].shape == (4, 6)


def test_index_hints_point_at_their_chunks(tmp_path):
    write(tmp_path / "ours")
    read = FileSystemReader(tmp_path / "ours").read_metadata()
    for index in read.storage_data:
        entry = read.state_dict_metadata[index.fqn]
        if index.offset is not None:
            assert entry.chunks[index.index].offsets == index.offset


# ---------------------------------------------------------------- we read torch's


def test_we_read_what_torch_writes(tmp_path):
    dcp.save({**TENSORS, "note": {"deep": [1, "hi"]}}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    found = read_dcp(tmp_path / "theirs")
    assert_same_tensors({key: read_tensor(found, key) for key in found.tensors})
    (key,) = [key for key in found.objects if key.startswith("note.deep")][:1]
    assert items.load_object(found.read_object_bytes(key), where=key) in ([1, "hi"], 1)


def test_we_read_what_we_wrote(tmp_path):
    layout = write(tmp_path / "ours", files=3)
    found = read_dcp(tmp_path / "ours")
    assert found.tensors == layout.tensors
    assert found.objects == layout.objects
    assert_same_tensors({key: read_tensor(found, key) for key in found.tensors})
    assert items.load_object(found.read_object_bytes("x._extra_state/shard_1_2"), where="x") == ["ü", 1]
    with pytest.raises(CheckpointError, match=r"no such object(?s:.*)absent"):
        found.read_object_bytes("absent")


# ---------------------------------------------------------------- damaged folders


def tamper(folder, change):
    path = folder / ".metadata"
    read = pickle.loads(path.read_bytes())
    change(read)
    path.write_bytes(pickle.dumps(read))


def index_of(read, key):
    return next(index for index in read.storage_data if index.fqn == key)


def set_info(key, **fields):
    return lambda read: vars(read.storage_data[index_of(read, key)]).update(fields)


def drop_item(read):
    del read.storage_data[index_of(read, "dec.w")]


def drop_entry(read):
    del read.state_dict_metadata["scalar"]


def drop_chunk(read):
    gone = read.state_dict_metadata["dec.w"].chunks.pop()
    del read.storage_data[metadata.MetadataIndex("dec.w", gone.offsets)]


def overlap(read):
    read.state_dict_metadata["dec.w"].chunks[1].sizes = torch.Size([2, 3])


def outgrow(read):
    read.state_dict_metadata["dec.w"].size = torch.Size([4, 5])


def complex_dtype(read):
    read.state_dict_metadata["scalar"].properties.dtype = torch.complex64


def odd_entry(read):
    read.state_dict_metadata["scalar"] = 3


def odd_size(read):
    read.state_dict_metadata["scalar"].size = [1.5]


OUTSIDE = ["../x.distcp", "/etc/passwd", "a/../../x.distcp", "..\\x", "C:\\x", "c:x", ""]
DAMAGES = [
    *(
        pytest.param(set_info("scalar", relative_path=p), UnsafeCheckpointError, "outside", id=f"path {p}")
        for p in OUTSIDE
    ),
    pytest.param(set_info("scalar", relative_path="none.distcp"), CheckpointError, "is missing", id="no file"),
    pytest.param(set_info("scalar", length=1 << 40), CheckpointError, "cut short", id="too long"),
    pytest.param(set_info("scalar", offset=-1), CheckpointError, "unknown form", id="negative"),
    pytest.param(set_info("scalar", transform_descriptors=["zstd"]), CheckpointError, "transformed", id="zstd"),
    pytest.param(drop_item, CheckpointError, "entry without an item", id="no item"),
    pytest.param(drop_entry, CheckpointError, "items without an entry", id="no entry"),
    pytest.param(drop_chunk, CheckpointError, "do not cover", id="hole"),
    pytest.param(overlap, CheckpointError, "overlap", id="overlap"),
    pytest.param(outgrow, CheckpointError, "leaves its tensor", id="outgrown"),
    pytest.param(complex_dtype, CheckpointError, "safetensors counterpart", id="complex"),
    pytest.param(odd_entry, CheckpointError, "unknown form", id="odd entry"),
    pytest.param(odd_size, CheckpointError, "unknown form", id="odd size"),
]


@pytest.mark.parametrize(("change", "error", "message"), DAMAGES)
def test_damaged_folders_are_refused(change, error, message, tmp_path):
    write(tmp_path / "ours")
    tamper(tmp_path / "ours", change)
    with pytest.raises(error, match=message) as caught:
        read_dcp(tmp_path / "ours")
    assert str(tmp_path) in str(caught.value.where)


def test_truncated_files_are_refused(tmp_path):
    layout = write(tmp_path / "ours", files=2)
    name, size = max(layout.files.items(), key=lambda pair: pair[1])
    os.truncate(tmp_path / "ours" / name, size - 1)
    with pytest.raises(CheckpointError, match=rf"cut short(?s:.*){name}") as caught:
        read_dcp(tmp_path / "ours")
    assert caught.value.fix


@pytest.mark.parametrize("end", [0, 1, 100, -1])
def test_truncated_metadata_is_refused(end, tmp_path):
    write(tmp_path / "ours")
    path = tmp_path / "ours" / ".metadata"
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(CheckpointError, match="well-formed"):
        read_dcp(tmp_path / "ours")


@pytest.mark.parametrize(
    "value", [None, {}, {"state_dict_metadata": {}}, torch.float32, metadata.BytesStorageMetadata()]
)
def test_metadata_of_another_kind_is_refused(value, tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(CheckpointError, match="no table of contents"):
        read_dcp(tmp_path)


def test_a_folder_without_metadata_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match="not a torch_dist checkpoint") as caught:
        read_dcp(tmp_path)
    assert "iter_" in caught.value.fix


def test_hostile_metadata_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    write(tmp_path / "ours")
    tamper(tmp_path / "ours", lambda read: setattr(read, "planner_data", Hostile()))
    with pytest.raises(UnsafeCheckpointError, match=r"mkdir"):
        read_dcp(tmp_path / "ours")
    assert not (tmp_path / "marker").exists()


# ---------------------------------------------------------------- layouts


@st.composite
def layouts(draw):
    specs = {}
    for number in range(draw(st.integers(0, 4))):
        rows = draw(st.integers(0, 6))
        cuts = sorted({0, rows, *draw(st.lists(st.integers(0, rows), max_size=3))})
        boxes = [((low, 0), (high - low, 3)) for low, high in pairwise(cuts)]
        specs[f"t{number}"] = (draw(st.sampled_from(["F32", "BF16", "U8"])), (rows, 3), boxes)
    objects = {f"o{number}": items.save_object(number) for number in range(draw(st.integers(0, 3)))}
    return specs, objects, draw(st.integers(1, 5))


@given(layouts())
def test_items_of_a_layout_are_apart_and_aligned(case):
    specs, objects, files = case
    layout = plan_dcp(specs, objects, files=files)
    spans = [chunk[2:] for tensor in layout.tensors.values() for chunk in tensor.chunks] + list(layout.objects.values())
    assert len(spans) == sum(len(boxes) for _, _, boxes in specs.values()) + len(objects)
    for name, size in layout.files.items():
        ends = sorted((offset, offset + length) for file, offset, length in spans if file == name)
        assert all(stop <= start < stop + 64 for (_, stop), (start, _) in pairwise(ends))
        assert ends[0][0] == 0
        assert ends[-1][1] == size
    assert all(chunk.data_offset % 64 == 0 for chunk in layout.placed())
    gaps = dict(layout.files)
    for name, parts in layout.frames().items():
        gaps[name] -= sum(len(part) for _, part in parts)
    data = sum(chunk.nbytes for chunk in layout.placed())
    assert data <= sum(gaps.values()) < data + 64 * max(1, len(spans))


def test_chunks_go_where_they_are_assigned():
    def last_chunks_elsewhere(key, number):
        return 2 if key == "dec.w" and number == 2 else 1

    layout = plan_dcp(SPECS, OBJECTS, files=3, assign=last_chunks_elsewhere)
    assert set(layout.files) == {"__1_0.distcp", "__2_0.distcp"}
    assert [chunk.file for chunk in layout.tensors["dec.w"].chunks] == ["__1_0.distcp"] * 2 + ["__2_0.distcp"]
    with pytest.raises(CheckpointError, match=r"(?s)not there.*dec\.w.*0 to 1.*got: +2"):
        plan_dcp(SPECS, OBJECTS, files=2, assign=last_chunks_elsewhere)


def test_files_get_about_equal_bytes():
    rows = {"w": ("F32", (64, 1000), [((row, 0), (1, 1000)) for row in range(64)])}
    sizes = plan_dcp(rows, {}, files=4).files.values()
    assert len(sizes) == 4
    assert max(sizes) <= 1.1 * min(sizes)


def test_writers_of_parts_make_the_same_files(tmp_path):
    """Each process computes the layout for itself and writes its own file of it."""
    whole = write(tmp_path / "whole", files=3)
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in whole.files:
        write_frames(parts, plan_dcp(SPECS, OBJECTS, files=3), files=[name])
        assert [path.name for path in parts.iterdir() if path.name > name] == []
    for chunk in whole.placed():
        with open(parts / chunk.file, "r+b") as file:
            file.seek(chunk.data_offset)
            file.write(raw_bytes(box_of(TENSORS[chunk.key], chunk.offsets, chunk.sizes)))
    for name in whole.files:
        assert (parts / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_layouts_that_do_not_tile_are_refused():
    with pytest.raises(CheckpointError, match=r"do not cover(?s:.*)w"):
        plan_dcp({"w": ("F32", (4, 6), [((0, 0), (2, 6))])}, {})
    with pytest.raises(CheckpointError, match="both a tensor and an object"):
        plan_dcp({"w": ("F32", (), [((), ())])}, {"w": b""})


def test_a_disk_that_refuses_is_an_output_error(tmp_path):
    layout = plan_dcp(SPECS, OBJECTS)
    with pytest.raises(OutputError, match=r"cannot write(?s:.*)absent"):
        write_frames(tmp_path / "absent", layout)
    with pytest.raises(OutputError, match=r"cannot write(?s:.*)absent"):
        write_metadata(tmp_path / "absent", layout)


def test_metadata_appears_in_one_step(tmp_path):
    write(tmp_path / "ours")
    assert sorted(path.suffix for path in (tmp_path / "ours").iterdir()) == ["", ".distcp"]


# ---------------------------------------------------------------- megatron-core


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
        objects |= dict([common_state_object(COMMON)])
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
