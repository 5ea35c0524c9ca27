"""Jobs for the pool: a model on some of the ranks of the default process group, the others taking no part."""

from __future__ import annotations

from functools import partial
from typing import Any

from runtime.helpers import errors_of

MEMBERS = [1, 2]


def _build(bridge, layout: dict[str, Any], members: list[int] = MEMBERS):
    """Groups and chunks of a model on `members`, and a group of all these; None on other ranks. Collective over all."""
    import torch.distributed as dist

    from bridge_core.runtime.provider import Provider
    from bridge_core.testing.mcore_jobs import on_this_device, seed_gpu, settings
    from bridge_core.testing.rank_worker import groups

    pg, everyone = groups(**layout, ranks=members), dist.new_group(members)
    if dist.get_rank() not in members:
        return None
    provider = Provider(bridge.fields, spec=on_this_device("host"))
    provider.apply_overrides(settings(layout) | {"make_vocab_size_divisible_by": 16})
    seed_gpu(pg)
    return pg, everyone, provider.provide_distributed_model(pg)


def round_trip(path: str, layout: dict[str, Any], out: str):
    """Load, save both ways and stream on `MEMBERS`; the stream, and the bytes read and written, or None elsewhere.

    Whoever takes no part has left when the others begin: a collective over more ranks than theirs would find nobody.
    """
    from runtime.helpers import poisoned_parallel_state

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        if (built := _build(bridge, layout)) is None:
            return None
        pg, everyone, chunks = built
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))
        where = {"groups": pg, "group": everyone}
        with poisoned_parallel_state(frozenset()) as reads:
            loaded = bridge.load_hf_weights(chunks, **where)
            shared = bridge.save_hf_pretrained(chunks, f"{out}/shared", **where)
            owned = bridge.save_hf_pretrained(
                chunks, f"{out}/owned", one_writer_per_file=True, bucket_bytes=40_000, **where
            )
            stream = {name: tensor.clone() for name, tensor in bridge.stream(chunks, bucket_bytes=60_000, **where)}
            exported = dict(bridge.export_hf_weights(chunks, cpu=True, **where))
            held = {shard.name for shard in bridge.iter_local_shards(chunks, groups=pg)}
        assert not reads, reads
    return {
        "read": loaded.bytes_read,
        "written": (shared.bytes_written, owned.bytes_written),
        "stream": stream,
        "exported": exported,
        "held": held,
    }


def refused_by_megatron(path: str, layout: dict[str, Any], folder: str):
    """What saving and loading a Megatron checkpoint says on `MEMBERS`; None elsewhere."""
    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        if (built := _build(bridge, layout)) is None:
            return None
        pg, everyone, chunks = built
        verbs = (bridge.save_megatron_model, bridge.load_megatron_model)
        return errors_of(*(partial(verb, chunks, folder, groups=pg, group=everyone) for verb in verbs))


def hook_fails(path: str, layout: dict[str, Any], failing: int) -> list[str] | None:
    """What the ranks of `MEMBERS` get when the loop over a stream fails on one of them; None elsewhere."""
    import torch.distributed as dist

    from bridge_core import AutoBridge
    from bridge_core.errors import BridgeError
    from bridge_core.runtime.host import host_backend

    def loop() -> None:
        with bridge.export_hf_weights(chunks, groups=pg, group=everyone) as tensors:
            for _ in tensors:
                if dist.get_rank() == failing:
                    raise BridgeError("no place for it")

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        if (built := _build(bridge, layout)) is None:
            return None
        pg, everyone, chunks = built
        return errors_of(loop)


def group_forgotten(path: str, layout: dict[str, Any], out: str) -> list[str] | None:
    """What verbs say on `MEMBERS` without `group`, while the others have left; None there."""
    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        if (built := _build(bridge, layout)) is None:
            return None
        pg, _, chunks = built
        return errors_of(
            lambda: bridge.stream(chunks),  # the groups that the model was built with
            lambda: list(bridge.export_hf_weights(chunks, groups=pg)),
            lambda: bridge.save_hf_pretrained(chunks, out, groups=pg),
            lambda: bridge.save_megatron_model(chunks, out, groups=pg),
            lambda: bridge.load_hf_weights(chunks),
            lambda: bridge.load_megatron_model(chunks, out),
        )


def two_copies(path: str, layout: dict[str, Any], out: str) -> list[str]:
    """What streams and saves of two copies of a model, each on two of four ranks, say over groups of other ranks.

    Over that of all four, and over one that has as many ranks as the model, but the same one of both copies.
    """
    import torch.distributed as dist

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend

    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        copies = [_build(bridge, layout, members) for members in ([0, 1], [2, 3])]
        alike = [dist.new_group(members) for members in ([0, 2], [1, 3])][dist.get_rank() % 2]
        (pg, _, chunks) = next(built for built in copies if built is not None)
        return errors_of(
            lambda: bridge.stream(chunks, groups=pg),
            lambda: bridge.save_hf_pretrained(chunks, out, groups=pg),
            lambda: bridge.save_hf_pretrained(chunks, out, groups=pg, one_writer_per_file=True),
            lambda: bridge.stream(chunks, groups=pg, group=alike),
            lambda: bridge.save_hf_pretrained(chunks, out, groups=pg, group=alike),
        )
