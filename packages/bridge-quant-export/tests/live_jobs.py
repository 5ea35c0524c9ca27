"""Jobs for the pool: quantised models exported, refused, and loaded again."""

from __future__ import annotations

from typing import Any

from quantising import build_loaded, disable, quantise


def export(
    path: str,
    layout: dict[str, Any],
    out: str,
    formats: list[tuple[str, str]],
    *,
    spec: str = "host",
    kv: bool = False,
    head: bool = False,
    grouped: bool = True,
    skip: tuple[int, ...] = (),
    options: dict[str, Any] | None = None,
) -> list[Any]:
    """Quantise and export to `out/{format}-{writer}`, for each pair of both; the reports.

    Args:
        kv, head: see `quantise`.
        skip: layers (global numbers) that are left unquantised.
    """
    import logging
    import warnings

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_quant_export import export_quantized

    warnings.simplefilter("ignore")
    logging.getLogger("modelopt").setLevel(logging.ERROR)
    bridge = AutoBridge.from_hf_pretrained(path)
    reports = []
    with host_backend():
        for name in dict.fromkeys(name for name, _ in formats):
            pg, chunks = build_loaded(bridge, layout, spec, grouped=grouped)
            quantise(chunks, pg, name, kv=kv, head=head)
            disable(chunks, skip)
            for writer in [writer for other, writer in formats if other == name]:
                reports.append(
                    export_quantized(
                        chunks, f"{out}/{name}-{writer}", bridge=bridge, groups=pg, format=writer, **(options or {})
                    )
                )
    return reports


def opened_for_writing(path: str, layout: dict[str, Any], out: str) -> list[str]:
    """Names of the JSON files that this rank opens for writing in an export, each as often as it does.

    Told by the interpreter itself, to a hook that stays and is silent afterwards: hooks cannot be removed.
    """
    import sys
    from pathlib import Path

    opened: list[str] = []
    listening = True

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            name = Path(str(arguments[0])).name
            if name.endswith(".json"):
                opened.append(name)

    sys.addaudithook(hear)
    try:
        export(path, layout, out, [("fp8", "modelopt")], options={"max_shard_size": 300_000})
    finally:
        listening = False
    return opened


# --- What goes wrong ---------------------------------------------------------------------------


def _linear(chunks: list[Any]) -> Any:
    """The first linear of the feed-forward network of a rank's first layer."""
    return chunks[0].decoder.layers[0].mlp.linear_fc1


def _scaled(quantizer: Any, factor: float) -> None:
    quantizer.amax = quantizer.amax * factor


SPOILS = {
    "input not calibrated": lambda chunks: _linear(chunks).input_quantizer.reset_amax(),
    "input differs": lambda chunks: _scaled(_linear(chunks).input_quantizer, 2.0),
    "weight differs": lambda chunks: _scaled(_linear(chunks).weight_quantizer, 2.0),
    "input is zero": lambda chunks: _scaled(_linear(chunks).input_quantizer, 0.0),
    "input is nan": lambda chunks: _scaled(_linear(chunks).input_quantizer, float("nan")),
    "weight is infinite": lambda chunks: _scaled(_linear(chunks).weight_quantizer, float("inf")),
    "not quantised here": lambda chunks: _linear(chunks).weight_quantizer.disable(),
    "output quantised": lambda chunks: _linear(chunks).output_quantizer.enable(),
    "weight is nan": lambda chunks: _linear(chunks).weight.data[3].fill_(float("nan")),
}


def refuse(
    path: str,
    layout: dict[str, Any],
    out: str,
    spoil: str,
    *,
    name: str = "fp8",
    everywhere: bool = False,
    options: dict[str, Any] | None = None,
) -> str:
    """Export after the last rank (or each) spoiled its model; what this rank is told."""
    import warnings

    import torch.distributed as dist

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_quant_export import export_quantized
    from bridge_quant_export.live import files, one_writer

    warnings.simplefilter("ignore")
    last = everywhere or dist.get_rank() == dist.get_world_size() - 1
    bridge = AutoBridge.from_hf_pretrained(path)
    kind = one_writer.OwnedFiles if (options or {}).get("one_writer_per_file") else files.PackedFiles
    original_pack, original_put = files.pack, kind.put
    with host_backend():
        pg, chunks = build_loaded(bridge, layout, "host", grouped=True)
        if spoil != "not quantised":
            quantise(chunks, pg, name)
        if last and spoil in SPOILS:
            SPOILS[spoil](chunks)
        if last and spoil == "packing fails":
            files.pack = _no_memory
        if last and spoil == "a tensor is forgotten":
            kind.put = _forgetful(original_put)
        try:
            export_quantized(chunks, out, bridge=bridge, groups=pg, **(options or {}))
        except (BridgeError, MemoryError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            files.pack, kind.put = original_pack, original_put
    return "no error"


def _no_memory(*args: Any, **kwargs: Any) -> None:
    raise MemoryError("no memory left on this rank")


def _forgetful(put: Any) -> Any:
    def some(self: Any, name: str, tensor: Any, piece: Any) -> None:
        if not name.endswith("layers.2.mlp.down_proj.weight"):
            put(self, name, tensor, piece)

    return some


def uncalibrated_experts(path: str, layout: dict[str, Any], out: str, name: str, policy: str) -> tuple[str, Any]:
    """Export after expert 1 of layer 2 was never reached, wherever it is; `SequentialMLP`, a quantiser for each expert.

    Returns:
        What this rank was told, and its report.
    """
    import warnings

    from bridge_core import AutoBridge, BridgeError
    from bridge_core.runtime.host import host_backend
    from bridge_quant_export import export_quantized

    warnings.simplefilter("ignore")
    bridge = AutoBridge.from_hf_pretrained(path)
    with host_backend():
        pg, chunks = build_loaded(bridge, layout, "host", grouped=False)
        quantise(chunks, pg, name)
        for chunk in chunks:
            for layer in chunk.decoder.layers:
                if layer.layer_number == 3:
                    experts = layer.mlp.experts.local_experts
                    first = pg.ep.rank() * len(experts)
                    for number, expert in enumerate(experts, first):
                        _scaled(expert.linear_fc1.input_quantizer, 1 + number)
                        if number == 1:
                            expert.linear_fc1.input_quantizer.reset_amax()
        try:
            return "no error", export_quantized(chunks, out, bridge=bridge, groups=pg, uncalibrated=policy)
        except BridgeError as error:
            return f"{type(error).__name__}: {error}", None


def export_often(path: str, layout: dict[str, Any], out: str, times: int) -> list[int]:
    """The same export again and again, with ranks that come late by chance; sizes of what each reads afterwards."""
    import json
    import random
    import time
    import warnings
    from pathlib import Path

    import torch.distributed as dist

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_quant_export import export_quantized
    from bridge_quant_export.folders.open import open_quantized
    from bridge_quant_export.live import files

    warnings.simplefilter("ignore")
    chance = random.Random(dist.get_rank())
    original = files.pack

    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(chance.random() * 0.002)
        return original(*args, **kwargs)

    bridge = AutoBridge.from_hf_pretrained(path)
    sizes = []
    with host_backend():
        pg, chunks = build_loaded(bridge, layout, "host", grouped=True)
        quantise(chunks, pg, "fp8")
        files.pack = late
        try:
            for _ in range(times):
                time.sleep(chance.random() * 0.01)
                export_quantized(
                    chunks, out, bridge=bridge, groups=pg, overwrite=True, max_shard_size=100_000, format="modelopt"
                )
                json.loads(Path(out, "model.safetensors.index.json").read_text())
                json.loads(Path(out, "hf_quant_config.json").read_text())
                found = open_quantized(out)
                assert not found.wrong, found.wrong
                sizes.append(len(found.folder.tensors))
                dist.barrier()  # nobody replaces what another still reads
        finally:
            files.pack = original
    return sizes


def load_packed(path: str, layout: dict[str, Any], out: str, *, one_reader: bool = False) -> Any:
    """Load a packed folder into a live model, and save the model's weights plain; this rank's report of loading."""
    import torch.distributed as dist

    from bridge_core import AutoBridge
    from bridge_core.runtime.host import host_backend
    from bridge_core.testing.mcore_jobs import build

    bridge = AutoBridge.from_hf_pretrained(path)
    options = {"one_reader_per_node": True, "node_group": dist.group.WORLD} if one_reader else {}
    with host_backend():
        _, pg, chunks = build(bridge.fields, layout, spec="host", vocab_divisible_by=16)
        report = bridge.load_hf_weights(chunks, groups=pg, **options)
        bridge.save_hf_pretrained(chunks, out, groups=pg, dtype="bfloat16")
    return report
