"""Packing beside ModelOpt's own functions, on one core, in one run: megabytes of weight per second, and their ratio.

Both sides get a weight in bf16 and finished ranges, and make codes and scales. They take turns, so that what else
the machine does meets both. Prints a table; `--json` writes the figures.

    python packages/bridge-quant-export/benchmarks/packing.py [--rows 4096] [--cols 4096] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from bridge_core.extras import require
from bridge_quant_export.formats import FORMATS, format_of
from bridge_quant_export.formats.format import Calibration, Format
from bridge_quant_export.formats.packing import check_calibration

# ModelOpt's names; without one it has no function for the format.
_THEIRS = {
    "fp8": "fp8",
    "fp8_channel": "fp8_pc_pt",
    "fp8_block": "fp8_pb_wo",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
    "mxfp8": "mxfp8",
    "int4": "int4_awq",
    "int8_weight_only": "int8_wo",
}


def ranges(format: Format, weight: Tensor) -> Calibration:
    """Ranges of a weight in the shape that a format expects; rows and columns must divide into its blocks."""
    size = weight.float().abs()
    for axis in format.amax or ():
        size = size.unflatten(axis.dim, (-1, axis.per)).amax(axis.dim + 1) if axis.dim is not None else size
    followed = {axis.dim for axis in format.amax or ()}
    for dim in sorted({0, 1} - followed, reverse=True):
        size = size.amax(dim)
    amax = size if format.amax is not None else None
    return Calibration(weight=amax, input=torch.tensor(2.5) if "input" in format.needs else None)


def ours(format: Format, weight: Tensor, known: Calibration) -> Callable[[], Any]:
    """A call that packs as the package does."""
    return lambda: format.quantize(weight, check_calibration(known, format, weight))


def theirs(format: Format, weight: Tensor, known: Calibration) -> Callable[[], Any]:
    """A call that makes the same codes and scales with ModelOpt's functions."""
    utils = require("modelopt.torch.export.quant_utils", extra="modelopt", package="bridge-quant-export")
    qtensor = require("modelopt.torch.quantization.qtensor", extra="modelopt", package="bridge-quant-export")
    name, amax = _THEIRS[format.name], known.weight
    if name == "mxfp8":
        return lambda: qtensor.MXFP8QTensor.quantize(weight)
    if name == "mxfp4":
        return lambda: qtensor.MXFP4QTensor.quantize(weight, block_size=32)
    assert amax is not None
    if name == "nvfp4":
        scale_2 = amax / (6 * 448)
        return lambda: qtensor.NVFP4QTensor.quantize(weight.clone(), 16, None, scale_2)  # it writes to its input
    largest = {"int4_awq": 7.0, "int8_wo": 127.0}.get(name, 448.0)
    return lambda: utils.to_quantized_weight(weight, amax / largest, name, None, format.group_size)


def compare(name: str, weight: Tensor, rounds: int) -> dict[str, float]:
    """Megabytes of weight per second of both sides (medians), taking turns."""
    format = format_of(name)
    known = ranges(format, weight)
    calls = {"ours": ours(format, weight, known), "theirs": theirs(format, weight, known)}
    seconds: dict[str, list[float]] = {side: [] for side in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for side, call in calls.items():
            start = time.process_time()
            call()
            seconds[side].append(time.process_time() - start)
    size = weight.numel() * weight.element_size() / 1e6
    found = {side: size / median(taken) for side, taken in seconds.items()}
    return {**found, "ratio": found["ours"] / found["theirs"]}


def table(results: dict[str, Any]) -> None:
    """Print the figures."""
    console = require("rich.console", extra="cli").Console()
    shown = require("rich.table", extra="cli").Table(
        title=f"Packing {results['rows']} x {results['cols']} bf16 on one core",
        caption=f"Medians of {results['rounds']} rounds. ModelOpt {results['modelopt']}, torch {results['torch']}.",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("format", "bridge MB/s", "ModelOpt MB/s", "ratio"):
        shown.add_column(column, justify="left" if column == "format" else "right")
    for name, found in results["formats"].items():
        shown.add_row(name, f"{found['ours']:.0f}", f"{found['theirs']:.0f}", f"{found['ratio']:.1f} x")
    console.print(shown)


def main() -> None:
    """Measure every format that ModelOpt has a function for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weight = (torch.randn(arguments.rows, arguments.cols) * 0.02).bfloat16()
    results: dict[str, Any] = {
        "rows": arguments.rows,
        "cols": arguments.cols,
        "rounds": arguments.rounds,
        "modelopt": version("nvidia-modelopt"),
        "torch": torch.__version__,
        "formats": {name: compare(name, weight, arguments.rounds) for name in FORMATS if name in _THEIRS},
    }
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    table(results)


if __name__ == "__main__":
    main()
