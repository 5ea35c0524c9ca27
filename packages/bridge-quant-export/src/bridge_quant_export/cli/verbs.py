"""The verbs of `bridge-quant-export`. Importing this needs no torch."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from bridge_core.checkpoint.workers import Alone
from bridge_core.cli.tables import facts, in_bytes, table
from bridge_core.extras import require
from bridge_quant_export.readers import readers_of


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a saved, ModelOpt-quantised Megatron checkpoint for serving engines. No model is built.

    Under torchrun the ranks share the work.
    """

    megatron: Annotated[Path, "A run's folder, or one iteration's, saved with ckpt_format torch_dist."]
    output: Annotated[Path, "The folder to write."]
    source: Annotated[Path | None, "The HF folder of the unquantised model: configuration, tokenizer."] = None
    hf_config: Annotated[Path | None, "config.json, where there is no --source and the checkpoint does not say."] = None
    format: Annotated[Literal["modelopt", "compressed-tensors"], "The format to write."] = "modelopt"
    dtype: Annotated[str | None, "Type of what is not quantised (bf16, fp16, fp32); by default as it is."] = None
    uncalibrated: Annotated[
        Literal["error", "peers", "weight_only"], "What to do with layers whose inputs were never seen."
    ] = "error"
    max_shard_size: Annotated[int, "Bytes per file."] = 5_000_000_000
    overwrite: Annotated[bool, "Replace a folder that holds something."] = False
    durable: Annotated[bool, "Wait for the disk before the folder gets its name."] = False
    rendezvous_minutes: Annotated[float, "Minutes to wait under torchrun until all processes are there."] = 15.0

    def run(self) -> int:
        """Write."""
        require("torch", extra="torch", package="bridge-quant-export")
        from bridge_core.runtime.workers import torchrun_workers, world_size
        from bridge_quant_export.saved.export import export_saved

        shared = world_size() > 1
        with torchrun_workers(rendezvous_minutes=self.rendezvous_minutes) if shared else nullcontext(Alone()) as team:
            found = export_saved(
                self.megatron,
                self.output,
                source=self.source,
                hf_config=self.hf_config,
                format=self.format,
                dtype=self.dtype,
                uncalibrated=self.uncalibrated,
                max_shard_size=self.max_shard_size,
                overwrite=self.overwrite,
                durable=self.durable,
                workers=team,
            )
        if team.rank == 0:
            print(facts([
                ("wrote", found.output),
                ("format", self.format),
                ("tensors", f"{found.tensors}, {in_bytes(found.nbytes)}"),
                ("layers", ", ".join(f"{count} {name}" for name, count in found.formats.items())),
            ]))  # fmt: skip
        return 0


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Describe a quantised checkpoint folder from its configuration and headers; no tensor is read."""

    path: Annotated[Path, "A folder that export_quantized, ModelOpt or compressed-tensors wrote."]
    json: Annotated[bool, "Print the description as JSON."] = False

    def run(self) -> int:
        """Describe."""
        from bridge_quant_export.folders.open import open_quantized

        found = open_quantized(self.path)
        formats = {
            format.name: {
                "layers": len(names),
                "group_size": format.group_size,
                "read_by": readers_of(found.writer, format),
            }
            for format, names in found.layers.formats.items()
        }
        nbytes = sum(stored.nbytes for stored in found.folder.tensors.values())
        described = {
            "path": str(self.path),
            "writer": found.writer,
            "dtype": found.dtype,
            "formats": formats,
            "unquantized": len(found.layers.unquantized),
            "kv_scales": len(found.kv_scales),
            "tensors": len(found.folder.tensors),
            "nbytes": nbytes,
            "wrong": list(found.wrong),
        }
        if self.json:
            print(json.dumps(described))
            return 0
        head = facts([
            ("folder", self.path),
            ("format", found.writer),
            ("tensors", f"{len(found.folder.tensors)}, {in_bytes(nbytes)}"),
            ("not quantised", f"{len(found.layers.unquantized)} layers, in {found.dtype}"),
            ("KV scales", len(found.kv_scales) or ""),
            ("contradictions", len(found.wrong) or "none"),
        ])  # fmt: skip
        rows = [
            (n, said["layers"], said["group_size"] or "", ", ".join(said["read_by"])) for n, said in formats.items()
        ]
        columns = ["quantised to", "layers", "group size", "read by"]
        print(f"{head}\n\n{table(columns, rows, right=columns[1:3])}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check a quantised checkpoint: configuration against tensors, scales, and weights against the original's.

    The exit code is 1 if something is wrong.
    """

    path: Annotated[Path, "A quantised checkpoint folder."]
    original: Annotated[Path | None, "The same model unquantised: how far every weight is from it."] = None
    tolerance: Annotated[float, "Relative error above which a weight counts as another one."] = 0.3
    limit: Annotated[int, "How many contradictions to name."] = 10
    json: Annotated[bool, "Print the result as JSON, with the error of every layer."] = False

    def run(self) -> int:
        """Check and report."""
        require("torch", extra="torch", package="bridge-quant-export")
        from bridge_quant_export.folders.verify import verify_quantized

        found = verify_quantized(self.path, self.original, tolerance=self.tolerance)
        if self.json:
            print(json.dumps({"ok": found.ok, **asdict(found)}))
            return 0 if found.ok else 1
        print(facts([
            ("verified", "sound" if found.ok else f"{len(found.wrong)} contradiction(s)"),
            ("compared", f"{len(found.errors)} weights, {found.unquantized} other tensors" if self.original else ""),
        ]))  # fmt: skip
        for line in found.wrong[: self.limit]:
            print(f"  {line}")
        if len(found.wrong) > self.limit:
            print(f"  ... ({len(found.wrong) - self.limit} more)")
        counts = Counter(error.format for error in found.errors)
        rows = []
        for name, count in counts.items():
            of = sorted((error for error in found.errors if error.format == name), key=lambda error: error.relative)
            middle, worst = of[len(of) // 2], of[-1]
            rows.append((name, count, f"{middle.relative:.4f}", f"{worst.relative:.4f}", worst.module))
        if rows:
            print("\n" + table(["format", "weights", "median error", "largest error", "of"], rows, right=("weights",)))
        return 0 if found.ok else 1


@dataclass(frozen=True, kw_only=True)
class Retag:
    """Write a quantised checkpoint in the other format. Codes stay what they are."""

    path: Annotated[Path, "A quantised checkpoint folder."]
    output: Annotated[Path, "The folder to write."]
    to: Annotated[Literal["modelopt", "compressed-tensors"], "The format to write."] = "compressed-tensors"
    max_shard_size: Annotated[int, "Bytes per file."] = 5_000_000_000
    overwrite: Annotated[bool, "Replace a folder that holds something."] = False

    def run(self) -> int:
        """Write."""
        require("torch", extra="torch", package="bridge-quant-export")
        from bridge_quant_export.folders.retag import retag

        found = retag(
            self.path, self.output, writer=self.to, max_shard_size=self.max_shard_size, overwrite=self.overwrite
        )
        print(facts([
            ("wrote", found.output),
            ("format", found.writer),
            ("layers", found.layers),
            ("tensors", found.tensors),
        ]))  # fmt: skip
        return 0
