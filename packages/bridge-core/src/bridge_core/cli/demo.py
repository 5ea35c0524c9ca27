"""`bridge-core demo`: the main job on small real models, each step checked by somebody else's code.

For every model: transformers makes and saves it; it is imported; megatron-core loads the result on two
ranks at TP=2 through its own `dist_checkpointing.load`; its logits are compared with transformers'; the
checkpoint is exported; the export is compared with the original, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from bridge_core.errors import VerificationError
from bridge_core.extras import require

if TYPE_CHECKING:
    from rich.console import Console

    from bridge_core.testing.ranks import RankPool

MODELS = ("qwen3_moe", "llama")
RANKS = 2
TOLERANCE = 1e-5
TOKENS = [[3, 17, 91, 130, 5, 64, 64, 2, 77, 11, 40, 8]]


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code.

    Raises:
        BridgeError: a step failed, or two results that must be equal are not.
    """
    parser = argparse.ArgumentParser(prog="bridge-core demo", description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here; default: a temporary folder")
    folder = parser.parse_args(argv).folder
    # Notes of other libraries about themselves would drown the report; errors are still shown.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.simplefilter("ignore")
    for module, extra in (("torch", "torch"), ("transformers", "hf"), ("rich", "cli")):
        require(module, extra=extra)
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bridge-demo-") as temporary:
        _run(folder or Path(temporary), console)
    console.print(f"[bold green]All equal.[/] {time.perf_counter() - started:.0f} s in all.")
    return 0


def _run(folder: Path, console: Console) -> None:
    import torch

    from bridge_core.testing.ranks import RankPool

    gpus = torch.cuda.device_count() >= RANKS
    where = f"{RANKS} GPUs (NCCL)" if gpus else "CPU (gloo)"
    console.print(f"[bold]bridge-core demo[/]: {RANKS} ranks on {where}, TP={RANKS}\n")
    with RankPool(RANKS, "nccl" if gpus else "gloo") as pool:
        for name in MODELS:
            _one_model(name, folder / name, pool, console)


def _one_model(name: str, folder: Path, pool: RankPool, console: Console) -> None:
    import torch

    from bridge_core import AutoBridge, export_ckpt, import_ckpt, verify
    from bridge_core.testing.hf_models import make_model, save_model
    from bridge_core.testing.mcore_jobs import load_and_run

    def step(text: str, since: float) -> None:
        console.print(f"  [green]ok[/] {text:<86} {time.perf_counter() - since:5.2f} s")

    at = time.perf_counter()
    model = make_model(name)
    hf = save_model(model, folder / "hf", max_shard_size="300KB")
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"[bold]{type(model).__name__}[/], {count:,} parameters, all different")
    step("transformers saved it", at)

    at = time.perf_counter()
    report = import_ckpt(hf, folder / "megatron")
    step(f"imported {report.tensors} tensors, {report.nbytes:,} bytes, to torch_dist", at)

    at = time.perf_counter()
    tokens = torch.tensor(TOKENS)
    bridge = AutoBridge.from_hf_pretrained(hf)
    layout = {"tp": RANKS, "etp": 1, "ep": RANKS} if bridge.fields.get("num_moe_experts") else {"tp": RANKS}
    results = pool.run(load_and_run, bridge.fields, layout, str(folder / "megatron" / "iter_0000000"), tokens)
    with torch.no_grad():
        expected = model(tokens).logits
    parts = {tp_rank: logits.cpu() for _, logits, tp_rank in results}
    got = torch.cat([parts[rank] for rank in sorted(parts)], dim=-1)[..., : expected.shape[-1]]
    difference = (got - expected).abs().max().item()
    if not difference <= TOLERANCE:
        raise VerificationError("logits differ from transformers'", where=name, expected=TOLERANCE, got=difference)
    shown = ", ".join(f"{axis.upper()}{size}" for axis, size in layout.items() if size > 1)
    step(f"megatron-core loaded it at {shown}; logits equal transformers' to {difference:.1e}", at)

    at = time.perf_counter()
    export_ckpt(folder / "megatron", folder / "export", source=hf)
    verify(hf, folder / "export").raise_if_different()
    for file in sorted(hf.glob("*.safetensors*")):
        if file.read_bytes() != (folder / "export" / file.name).read_bytes():
            raise VerificationError("an exported file differs from the original", where=file.name)
    step("exported; every tensor and every file equals the original to the bit", at)
    console.print()
