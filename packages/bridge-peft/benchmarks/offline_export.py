"""What exporting and importing the adapter of a very large model costs: bytes read, peak memory, seconds.

    python packages/bridge-peft/benchmarks/offline_export.py [--r 1] [--layers 94] [--json]

The base is Qwen3-235B-A22B by its sizes (94 layers, 128 experts, hidden 4096); nothing of it but config.json
exists. The adapter has a pair of rank r on every attention layer and on every expert of every layer, in bfloat16:
0.31 GB times r in Megatron's form. Each direction runs in a process of its own. Memory is the most that the process
held beyond what it held after its imports; bytes are those that the kernel handed to its reads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "dtype": "bfloat16",
}


def make(root: Path, r: int, layers: int) -> int:
    """Write config.json and an adapter checkpoint with random factors; returns the bytes of its tensors."""
    import torch

    from bridge_core import AutoBridge
    from bridge_core.checkpoint.dcp_layout import plan_dcp, write_frames, write_metadata
    from bridge_peft.converting.bases import bases_for
    from bridge_peft.converting.run_config import write_settings
    from bridge_peft.placement import factors
    from bridge_peft.settings import AdapterSettings

    config = CONFIG | {"num_hidden_layers": layers}
    (root / "config.json").write_text(json.dumps(config))
    folder = root / "run" / "iter_0000000"
    folder.mkdir(parents=True)
    bases = bases_for(AutoBridge.from_hf_config(config))
    names = ("self_attention.linear_qkv", "self_attention.linear_proj")
    names += ("mlp.experts.linear_fc1", "mlp.experts.linear_fc2")
    settings, specs = AdapterSettings(r=r, alpha=2 * r), {}
    for layer in range(layers):
        for name in names:
            base = bases.all[f"decoder.layers.{{layer}}.{name}"]
            stem = name.replace(".experts.", ".experts.experts.")
            for key, factor in factors(base.linear, r).items():
                whole = ((0,) * len(factor.shape), factor.shape)
                specs[f"decoder.layers.{stem}.adapter.default.layers.{layer}.{key}"] = "BF16", factor.shape, [whole]
    laid = plan_dcp(specs, {}, files=8)
    write_frames(folder, laid)
    generator = torch.Generator().manual_seed(1)
    for chunk in laid.placed():
        with open(folder / chunk.file, "r+b") as file:
            file.seek(chunk.data_offset)
            values = torch.rand(chunk.sizes, generator=generator).to(torch.bfloat16)
            file.write(values.view(torch.uint8).numpy().data)
    write_metadata(folder, laid)
    adapted = {f"decoder.layers.{layer}.{name}": settings for layer in range(layers) for name in names}
    (folder / "run_config.yaml").write_text(write_settings({"default": adapted}, config))
    return sum(chunk.nbytes for chunk in laid.placed())


def measured(verb: str, source: Path, output: Path, config: Path) -> dict[str, float]:
    """One conversion in this process: what it read, held and took."""
    import torch  # noqa: F401 - an import, whose memory does not count

    from bridge_peft import export_adapter_ckpt, import_adapter_ckpt

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, read = _status("VmRSS"), _read()
    started = time.perf_counter()
    convert = export_adapter_ckpt if verb == "export" else import_adapter_ckpt
    report = convert(source, output, config)
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 2),
        "peak_mb": round((_status("VmHWM") - before) / 1e6, 1),
        "kernel_read": _read() - read,
        "tensors_read": report.read,
        "written": report.nbytes,
        "tensors": report.tensors,
    }


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _read() -> int:
    """Bytes that reads of this process were given, from the disk or from caches."""
    return int(Path("/proc/self/io").read_text().splitlines()[0].split()[1])


def run(root: Path, r: int, layers: int) -> dict[str, dict[str, float] | int]:
    """Make the adapter, then measure both directions."""
    found: dict[str, dict[str, float] | int] = {"adapter_bytes": make(root, r, layers)}
    for verb, source, output in (("export", "run", "hf"), ("import", "hf", "back")):
        command = [sys.executable, __file__, "--measure", verb, str(root / source), str(root / output)]
        done = subprocess.run([*command, str(root / "config.json")], check=True, capture_output=True, text=True)
        found[verb] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", type=int, default=1)
    parser.add_argument("--layers", type=int, default=94)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        verb, *paths = options.measure
        print(json.dumps(measured(verb, *map(Path, paths))))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(Path(folder), options.r, options.layers), indent=2))


if __name__ == "__main__":
    main()
