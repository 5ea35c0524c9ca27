"""Megatron-Bridge at the same work as `live.py`, where it is installed: load into ranks of this machine, and save.

Run by torchrun: `torchrun --nproc-per-node RANKS peer.py SOURCE FOLDER ROUNDS LAYOUT`; rank 0 prints JSON. Its names
are those of Megatron-Bridge 0.7 (models/conversion/auto_bridge.py, models/model_provider.py), which needs Transformer
Engine and a GPU for each rank.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from measure import spread

OPTIONS = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size"}


def peer(source: Path, folder: Path, ranks: int, layout: dict[str, int], *, rounds: int) -> dict[str, Any] | str:
    """Seconds of its load and save; or why there are none."""
    try:
        if not find_spec("megatron.bridge"):
            return "not installed"
    except ModuleNotFoundError:
        return "not installed"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    run = subprocess.run(
        [*command, __file__, str(source), str(folder), str(rounds), json.dumps(layout)],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        said = [line for line in run.stderr.splitlines() if "Error: " in line and ".elastic." not in line]
        return f"failed: {said[-1] if said else f'exit code {run.returncode}'}"
    return json.loads(run.stdout.splitlines()[-1])


def main(source: Path, folder: Path, rounds: int, layout: dict[str, int]) -> None:
    """One rank of it."""
    import torch.distributed as dist
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(source)
    provider = bridge.to_megatron_provider(load_weights=False)
    for name, size in layout.items():
        setattr(provider, OPTIONS[name], size)
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    out = folder / f"{source.name}-peer"
    steps = {
        "load": lambda: bridge.load_hf_weights(model, source),
        "save": lambda: bridge.save_hf_pretrained(model, out, show_progress=False, distributed_save=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            if dist.get_rank() == 0:
                shutil.rmtree(out, ignore_errors=True)
            dist.barrier()
            started = time.perf_counter()
            step()
            dist.barrier()
            seconds[name].append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        shutil.rmtree(out, ignore_errors=True)
        print(json.dumps({name: spread(found) for name, found in seconds.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
