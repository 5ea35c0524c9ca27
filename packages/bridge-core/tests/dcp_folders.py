"""A small torch_dist folder, written by plain file writes and read back by place, for tests of several modules."""

import torch

from bridge_core.checkpoint import items
from bridge_core.checkpoint.dcp_layout import plan_dcp, write_frames, write_metadata
from bridge_core.checkpoint.megatron_files import extra_state_object

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
