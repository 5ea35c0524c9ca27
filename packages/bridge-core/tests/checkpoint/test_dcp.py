"""torch_dist folders: torch reads what is written here, and the other way round; damaged folders are refused."""

import dataclasses
import os
import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge_core.checkpoint import items
from bridge_core.checkpoint.dcp import read_dcp
from bridge_core.checkpoint.dcp_layout import plan_dcp, write_frames, write_metadata
from bridge_core.errors import CheckpointError, OutputError, UnsafeCheckpointError

torch = pytest.importorskip("torch", reason="torch is the oracle of its own format")

import torch.distributed.checkpoint as dcp  # noqa: E402
from dcp_folders import OBJECTS, SPECS, TENSORS, assert_same_tensors, box_of, raw_bytes, read_tensor, write  # noqa: E402
from torch.distributed.checkpoint import FileSystemReader, metadata  # noqa: E402
from torch.distributed.checkpoint.filesystem import _StorageInfo  # noqa: E402

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
    pytest.param(drop_chunk, CheckpointError, "elements are covered", id="hole"),
    pytest.param(overlap, CheckpointError, "overlap", id="overlap"),
    pytest.param(outgrow, CheckpointError, "leaves the tensor", id="outgrown"),
    pytest.param(complex_dtype, CheckpointError, "not supported", id="complex"),
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
    with pytest.raises(CheckpointError, match=r"do not tile it(?s:.*)w"):
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
