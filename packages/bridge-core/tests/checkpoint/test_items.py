"""Items are `torch.save` archives: torch reads what is written here, and what torch writes is found here."""

import collections
import io
import os
import subprocess
import sys
import zipfile
from math import prod

import numpy as np
import pytest

from bridge_core import dtypes
from bridge_core.checkpoint import items, torch_names
from bridge_core.checkpoint.pickles import Inert
from bridge_core.checkpoint.zips import Archive, build_archive
from bridge_core.errors import CheckpointError, UnsafeCheckpointError

torch = pytest.importorskip("torch", reason="torch is the oracle of its own format")

SHAPES = [(), (3,), (2, 3), (2, 0, 3), (0,), (7, 300, 1), (5, 4, 3, 2), (1, 1, 1, 1, 1, 300, 70)]
KINDS = [pytest.param(row, id=row.name) for row in dtypes._TABLE]


def tensor_of(row, shape):
    """A tensor of distinct bytes, as far as the type has them."""
    nbytes = prod(shape) * row.itemsize
    raw = torch.arange(nbytes) % (2 if row.name == "BOOL" else 251)
    return raw.to(torch.uint8).view(getattr(torch, row.torch)).reshape(shape)


def saved(value, **options):
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def locate(data, **options):
    return items.locate_tensor(
        lambda offset, nbytes: data[offset : offset + nbytes], 0, len(data), where="a.distcp", **options
    )


def raw_bytes(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("row", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_reads_our_item_and_we_find_torchs(row, shape):
    tensor = tensor_of(row, shape)
    theirs = saved(tensor)
    item = items.tensor_item(row.name, shape)
    ours = item.head + raw_bytes(tensor) + item.tail
    assert len(ours) == item.length
    assert item.data_offset % 64 == 0
    loaded = torch.load(io.BytesIO(ours), weights_only=True, mmap=False)
    assert (loaded.dtype, loaded.shape, loaded.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert raw_bytes(loaded) == raw_bytes(tensor)
    for data in (ours, theirs):
        found = locate(data)
        assert (found.dtype, found.shape, found.strides) == (row.name, shape, tensor.stride())
        assert found.contiguous
        assert data[found.data_offset :][: found.nbytes] == raw_bytes(tensor)


@pytest.mark.parametrize("row", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_head_is_torchs_to_the_byte(row, shape):
    theirs = saved(tensor_of(row, shape))
    if b".storage_alignment" not in theirs:
        pytest.skip("this torch writes an older order of records")
    assert theirs.startswith(items.tensor_item(row.name, shape).head)


def test_zipfile_lists_our_item():
    item = items.tensor_item("F32", (2, 3))
    with zipfile.ZipFile(io.BytesIO(item.head + bytes(24) + item.tail)) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        assert sizes["archive/data/0"] == 24
        assert archive.read("archive/version") == b"3\n"
        assert archive.getinfo("archive/data/0").CRC == 0


def test_templates_are_made_once():
    assert items.tensor_item("F32", (2, 3)) is items.tensor_item("F32", (2, 3))


def test_an_unknown_dtype_is_named():
    with pytest.raises(CheckpointError, match=r"(?s)not supported.*BF16.*got: +F4"):
        items.tensor_item("F4", (2,))


@pytest.mark.parametrize("nbytes", [0xFFFFFFFF - 700, 0xFFFFFFFE, 0xFFFFFFFF, 1 << 32, 5_000_000_001])
def test_items_around_four_gibibytes(nbytes, tmp_path):
    """Where 32-bit fields of a zip overflow; the files are sparse."""
    skip_data = getattr(torch.serialization, "skip_data", None)
    if skip_data is None:
        pytest.skip("torch.serialization.skip_data came with torch 2.6")
    with skip_data():
        torch.save(torch.empty(nbytes, dtype=torch.uint8), tmp_path / "archive.pt")
    item = items.tensor_item("U8", (nbytes,))
    with open(tmp_path / "archive.pt", "rb") as file:
        size = os.fstat(file.fileno()).st_size
        found = items.locate_tensor(lambda o, n: os.pread(file.fileno(), n, o), 0, size, where="x")
        assert (found.shape, found.data_offset, found.nbytes) == ((nbytes,), item.data_offset, nbytes)
        assert file.read(item.data_offset) == item.head
    with open(tmp_path / "ours.pt", "wb") as file:
        file.write(item.head)
        file.seek(nbytes - 1, os.SEEK_CUR)
        file.write(b"\x07" + item.tail)
    loaded = torch.load(tmp_path / "ours.pt", mmap=True, weights_only=True)
    assert (loaded.shape, loaded[-1].item()) == ((nbytes,), 7)


def views():
    base = torch.arange(120, dtype=torch.int32).reshape(4, 5, 6)
    return {
        "slice": base[1:3],
        "transposed": base.permute(2, 0, 1),
        "column": base[:, 2, 1::2],
        "one element": base[3, 4, 5],
        "expanded": base[:1].expand(4, 5, 6),
        "empty slice": base[4:],
        "axis of one": base[2:3, :, :],
    }


@pytest.mark.parametrize("name", views())
def test_views_are_reported_truthfully(name):
    view = views()[name]
    data = saved(view)
    found = locate(data)
    assert (found.shape, found.strides) == (tuple(view.shape), view.stride())
    assert (found.storage_offset, found.storage_nbytes) == (view.storage_offset(), 480)
    assert found.contiguous == view.is_contiguous()
    storage = np.frombuffer(data, np.int32, 120, found.data_offset - 4 * found.storage_offset)
    strides = [4 * stride for stride in found.strides]
    read = np.lib.stride_tricks.as_strided(storage[found.storage_offset :], found.shape, strides)
    assert read.tolist() == view.tolist()


def test_parameters_are_tensors_too():
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    marked = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    marked.sequence_parallel = True
    attributed = torch.arange(6.0).reshape(2, 3)
    attributed.partition_dim = 0
    for value in (parameter, marked, attributed):
        data = saved(value)
        found = locate(data)
        assert (found.dtype, found.shape) == ("F32", (2, 3))
        assert data[found.data_offset :][: found.nbytes] == raw_bytes(value)


def old_archive(tensor, *, folder="archive/", byteorder=None):
    """What torch before 2.1 wrote: no byte order, no alignment record; from the same pickle."""
    data_pickle = zipfile.ZipFile(io.BytesIO(saved(tensor))).read("archive/data.pkl")
    records = [(folder + "data.pkl", data_pickle)]
    records += [(folder + "byteorder", byteorder)] if byteorder else []
    records += [(folder + "data/0", raw_bytes(tensor)), (folder + "version", b"3\n")]
    return b"".join(part for part in build_archive(records) if isinstance(part, bytes))


def test_archives_of_older_torch_versions():
    tensor = torch.arange(6, dtype=torch.bfloat16)
    for data in (old_archive(tensor), old_archive(tensor, folder="weights/")):
        assert torch.equal(torch.load(io.BytesIO(data), weights_only=True), tensor)
        found = locate(data)
        assert data[found.data_offset :][: found.nbytes] == raw_bytes(tensor)


def test_other_byte_order_is_refused():
    with pytest.raises(CheckpointError, match="big-endian"):
        locate(old_archive(torch.arange(6.0), byteorder=b"big"))


def test_the_format_from_before_archives_is_refused():
    with pytest.raises(CheckpointError, match=r"before torch 1\.6"):
        locate(saved(torch.arange(6.0), _use_new_zipfile_serialization=False))


def test_compressed_archives_are_refused():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1000))
    with pytest.raises(CheckpointError, match="compressed"):
        locate(stream.getvalue())


@pytest.mark.parametrize("value", [[1, 2], {"a": torch.ones(2)}, None], ids=["list", "dict", "none"])
def test_an_object_is_not_a_tensor(value):
    with pytest.raises(CheckpointError, match="something else"):
        locate(saved(value))


def test_tensors_that_are_not_their_bytes_are_refused():
    with pytest.raises(CheckpointError, match="negative bit"):
        locate(saved(torch.view_as_complex(torch.ones(2, 2)).conj().imag))
    with pytest.raises(CheckpointError, match=r"not supported(?s:.*)torch\.ComplexFloatStorage"):
        locate(saved(torch.ones(2, dtype=torch.complex64)))


def test_a_hostile_item_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    data = saved(Hostile())
    with pytest.raises(UnsafeCheckpointError, match=r"(?s)a\.distcp, item at byte 0.*mkdir"):
        locate(data)
    assert isinstance(items.load_object(data, where="x"), Inert)
    assert not (tmp_path / "marker").exists()


def test_a_truncated_item_names_file_and_offset():
    data = saved(torch.arange(300.0))
    for end in (0, 10, 700, 1000, len(data) // 2, len(data) - 1):
        short = b"x" * 64 + data[:end]
        for claimed in (len(data), end):
            with pytest.raises(CheckpointError, match=r"a\.distcp, (archive|item) at byte 64") as caught:
                items.locate_tensor(lambda o, n, s=short: s[o : o + n], 64, claimed, where="a.distcp")
            assert caught.value.fix


def test_a_damaged_item_raises_checkpoint_errors_only():
    data = saved(torch.arange(6.0))
    good = locate(data)
    start, stop = good.data_offset, good.data_offset + good.nbytes
    for position in [*range(start), *range(stop, len(data))]:
        damaged = bytearray(data)
        damaged[position] ^= 0x41
        try:
            found = locate(bytes(damaged))
        except CheckpointError:
            continue
        assert found.data_offset + found.nbytes <= len(data)


class CountedReads:
    def __init__(self, data):
        self.data = data
        self.spans = []

    def __call__(self, offset, nbytes):
        self.spans.append((offset, nbytes))
        return self.data[offset : offset + nbytes]


def test_an_item_like_an_earlier_one_costs_one_read():
    first, second = saved(torch.arange(6.0)), saved(torch.arange(6.0) + 1)
    other = saved(torch.arange(6, dtype=torch.int32))
    read = CountedReads(first + second + other)
    known = {}
    found = [
        items.locate_tensor(read, offset, len(first), where="x", known=known)
        for offset in (0, len(first), 2 * len(first))
    ]
    assert found[0] == found[1]
    assert [item.dtype for item in found] == ["F32", "F32", "I32"]
    assert len([span for span in read.spans if len(first) <= span[0] < 2 * len(first)]) == 1


def test_data_is_never_read():
    read = CountedReads(saved(torch.zeros(1 << 20)))
    found = items.locate_tensor(read, 0, len(read.data), where="x")
    assert sum(nbytes for _, nbytes in read.spans) < 8192
    assert found.nbytes == 4 << 20


PLAIN = {"iteration": 7, "nested": [None, True, 1.5, ("a", {"b": -1})], "ü": 1 << 40}


def test_plain_objects_travel_both_ways():
    assert torch.load(io.BytesIO(items.save_object(PLAIN)), weights_only=True) == PLAIN
    assert items.load_object(saved(PLAIN), where="x") == PLAIN
    assert items.load_object(items.save_object(PLAIN), where="x") == PLAIN


def test_an_object_item_is_what_torch_writes():
    ours, theirs = items.save_object(PLAIN), saved(PLAIN)
    if b".storage_alignment" not in theirs:
        pytest.skip("this torch writes an older order of records")
    start = theirs.index(b"archive/.data/serialization_id") - 30
    directory = ours.index(b"PK\x01\x02")
    assert ours[:directory] == theirs[:start]


def test_objects_with_tensors_are_read_as_data():
    value = items.load_object(saved({"rng": torch.arange(3), "o": collections.OrderedDict(a=1)}), where="x")
    assert value["o"] == {"a": 1}
    assert value["rng"].NAME == "torch._utils._rebuild_tensor_v2"
    assert value["rng"].args[0].numel == 3


def test_records_can_be_read_by_name():
    data = saved(torch.arange(3))
    archive = Archive(lambda o, n: data[o : o + n], 0, len(data), where="x")
    assert archive.read("version") == b"3\n"
    with pytest.raises(CheckpointError, match="no record 'data/1'"):
        archive.read("data/1")


def test_torchs_names_cover_the_table():
    assert {torch_names.dtype_of_global(f"torch.{row.torch}", where="x") for row in dtypes._TABLE} == {*dtypes._TABLE}
    for row in dtypes._TABLE:
        if row.storage != torch_names.UNTYPED:
            assert torch_names.dtype_of_global(f"torch.{row.storage}", where="x") is row
            assert getattr(torch, row.storage).dtype is getattr(torch, row.torch)


@pytest.mark.parametrize("row", KINDS)
def test_numpy_has_the_same_types(row):
    found = dtypes.numpy_dtype(row.name)
    assert found.itemsize == row.itemsize == getattr(torch, row.torch).itemsize
    values = tensor_of(row, (6,))
    read = np.frombuffer(raw_bytes(values), found)
    if row.name not in ("F8_E4M3", "F8_E5M2", "BF16"):
        assert read.tobytes() == values.numpy().tobytes()
    assert np.array_equal(read.astype(np.float64), values.to(torch.float64).numpy(), equal_nan=True)


def test_torch_is_not_imported():
    modules = "torch_names, items, dcp, dcp_layout, megatron_files, pickles, zips"
    program = (
        f"import sys; from bridge_core.checkpoint import {modules}; items.tensor_item('BF16', (2,)); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'megatron', 'ml_dtypes')))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
