"""Jobs for the pool: options of the live verbs, each with what it is to do; and calls that are refused."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import Any

from runtime.helpers import errors_of


def _load(path: str, layout: dict[str, Any], **changes: Any):
    """A bridge, the groups and the loaded chunks; call inside `host_backend`."""
    from bridge_core import AutoBridge
    from bridge_core.testing.mcore_jobs import build

    bridge = AutoBridge.from_hf_pretrained(path)
    _, pg, chunks = build(bridge.fields | changes, layout, spec="host", vocab_divisible_by=16)
    bridge.load_hf_weights(chunks)
    return bridge, pg, chunks


def load_in_threads(path: str, layout: dict[str, Any], meeting: dict[int, int]):
    """Load with each number of threads, to the values of the default: the report, reads, reading threads, own or not.

    Args:
        meeting: number of threads -> how many of them wait for one another at their first read.
    """
    import torch

    from bridge_core.runtime import load
    from bridge_core.runtime.host import host_backend

    original, readers, found = load.read_into, [], {}

    def noted(*arguments: Any) -> None:
        me = threading.get_ident()
        if me not in readers:
            barrier.wait(timeout=30)
        readers.append(me)
        original(*arguments)

    with host_backend():
        bridge, _, chunks = _load(path, layout)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        expected = [parameter.detach().clone() for parameter in parameters]
        load.read_into = noted
        try:
            for threads, others in meeting.items():
                readers.clear()
                barrier = threading.Barrier(others)
                for parameter in parameters:
                    parameter.data.fill_(float("nan"))
                report = bridge.load_hf_weights(chunks, threads=threads)
                assert all(torch.equal(*pair) for pair in zip(parameters, expected, strict=True))
                found[threads] = report, len(readers), len(set(readers)), threading.get_ident() in readers
        finally:
            load.read_into = original
    return found


@contextmanager
def _noting_disk():
    """Yields what this process does for good: names of what it has synced, and of what it has renamed to."""
    notes: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        notes.append(("synced", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def renamed(source: Any, target: Any, **options: Any) -> None:
        rename(source, target, **options)
        notes.append(("renamed", os.path.basename(target)))

    os.fsync, os.rename = synced, renamed
    try:
        yield notes
    finally:
        os.fsync, os.rename = fsync, rename


def save(path: str, layout: dict[str, Any], out: str, *, by_config: bool = False, **options: Any):
    """Load and save; what was synced and renamed meanwhile, or the error's text.

    Args:
        by_config: save with a bridge that has no weights, and so no folder to be like.
    """
    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.host import host_backend

    with host_backend():
        bridge, _, chunks = _load(path, layout)
        if by_config:
            bridge = AutoBridge.from_hf_config(bridge.config)
        with _noting_disk() as notes:
            try:
                bridge.save_hf_pretrained(chunks, out, **options)
            except BridgeError as error:
                return str(error)
    return notes


def save_with_own_option(path: str, layout: dict[str, Any], out: str, option: str, values: tuple, **others: Any) -> str:
    """Save without a source, each rank with its own value of an option; the error's text."""
    import torch.distributed as dist

    told = save(path, layout, out, by_config=True, **{option: values[dist.get_rank()]}, **others)
    return told if isinstance(told, str) else "no error"


def stream_in(path: str, layout: dict[str, Any], dtype: str):
    """Both ways to stream in a dtype, by its name and as torch has it: metadata and tensors."""
    import torch

    from bridge_core.runtime.host import host_backend

    with host_backend():
        bridge, _, chunks = _load(path, layout)
        stream = bridge.stream(chunks, dtype=dtype, bucket_bytes=60_000)
        streamed = {name: tensor.clone() for name, tensor in stream}
        exported = dict(bridge.export_hf_weights(chunks, dtype=getattr(torch, dtype), cpu=True))
    return stream.metadata(), streamed, exported


def mixed_dtypes(path: str, layout: dict[str, Any], out: str):
    """One rank keeps a norm in bfloat16: what save and stream say to that, unasked; and the stream once it is asked."""
    import torch
    import torch.distributed as dist

    from bridge_core import BridgeError
    from bridge_core.runtime.host import host_backend

    told = []
    with host_backend():
        bridge, _, chunks = _load(path, layout)
        if dist.get_rank() == 1:
            norm = chunks[0].decoder.final_layernorm
            norm.weight = torch.nn.Parameter(norm.weight.detach().bfloat16())
        for call in (lambda: bridge.save_hf_pretrained(chunks, out), lambda: bridge.stream(chunks)):
            try:
                call()
                told.append("no error")
            except BridgeError as error:
                told.append(str(error))
        asked = {name: tensor.clone() for name, tensor in bridge.export_hf_weights(chunks, dtype="float32")}
    return told, asked


def count(path: str, layout: dict[str, Any], verb: str, out: str, options: dict[str, Any]) -> str:
    """A verb with a count that is none; what this rank is told."""
    from bridge_core import BridgeError
    from bridge_core.runtime.host import host_backend

    with host_backend():
        bridge, _, chunks = _load(path, layout)
        try:
            if verb == "load":
                bridge.load_hf_weights(chunks, **options)
            else:
                bridge.save_hf_pretrained(chunks, out, **options)
        except BridgeError as error:
            return str(error)
    return "no error"


def contradict(path: str, layout: dict[str, Any], out: str) -> list[str]:
    """Options that exclude or want one another; each error's text."""
    from bridge_core.runtime.host import host_backend

    with host_backend():
        bridge, _, chunks = _load(path, layout)
        return errors_of(
            lambda: bridge.save_hf_pretrained(chunks, out, fp8=True, one_writer_per_file=True),
            lambda: bridge.load_hf_weights(chunks, one_reader_per_node=True),
        )


def in_other_groups(path: str, layout: dict[str, Any], swapped: tuple[str, str], out: str) -> list[str]:
    """Load, stream and save with two kinds of groups exchanged; each error's text."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from bridge_core.runtime.host import host_backend

    first, second = swapped
    with host_backend():
        bridge, pg, chunks = _load(path, layout)
        others = ProcessGroupCollection(**vars(pg) | {first: getattr(pg, second), second: getattr(pg, first)})
        return errors_of(
            lambda: bridge.load_hf_weights(chunks, groups=others),
            lambda: bridge.stream(chunks, groups=others),
            lambda: bridge.save_hf_pretrained(chunks, out, groups=others),
        )


def pipeline_before_tensor_parallel(path: str, out: str):
    """A TP2 x PP2 model whose stages are neighbours, where mcore's usual order has neighbours share a tensor.

    Saved with one writer per file, what is said to that; and as usual.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import on_this_device, seed_gpu, settings
    from bridge_core.testing.rank_worker import groups

    layout = {"tp": 2, "pp": 2}
    usual = groups(**layout)
    tensor, stages = usual.pp, usual.tp
    pg = ProcessGroupCollection(
        **vars(usual) | {"tp": tensor, "tp_cp": tensor, "expt_tp": tensor, "tp_ep": tensor, "tp_dp_cp": tensor}
    )
    pg.pp = pg.embd = stages
    bridge = AutoBridge.from_hf_pretrained(path)
    provider = bridge.to_megatron_provider(spec=on_this_device("host"))
    provider.apply_overrides(settings(layout) | {"make_vocab_size_divisible_by": 16})
    with host_backend():
        seed_gpu(usual)
        chunks = provider.provide_distributed_model(pg)
        bridge.load_hf_weights(chunks)
        try:
            bridge.save_hf_pretrained(chunks, f"{out}/owned", one_writer_per_file=True)
            told = "no error"
        except BridgeError as error:
            told = str(error)
        bridge.save_hf_pretrained(chunks, f"{out}/shared")
    return told


def on_a_group_of_gpus(path: str, out: str) -> str:
    """Parameters on the CPU, and a default group that says it serves GPUs alone; what saving says."""
    import torch.distributed as dist

    from bridge_core import BridgeError
    from bridge_core.runtime.host import host_backend

    original, world = dist.get_backend_config, dist.group.WORLD
    with host_backend():
        bridge, _, chunks = _load(path, {"tp": 2})
        dist.get_backend_config = lambda group=None: "cuda:nccl" if group is world else original(group)
        try:
            bridge.save_hf_pretrained(chunks, out)
        except BridgeError as error:
            return str(error)
        finally:
            dist.get_backend_config = original
    return "no error"
