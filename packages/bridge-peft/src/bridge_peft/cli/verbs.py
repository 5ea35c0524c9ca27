"""The verbs of `bridge-peft`, each a dataclass whose fields are its options."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from bridge_core.cli.tables import facts, in_bytes
from bridge_core.extras import require

if TYPE_CHECKING:
    from bridge_core.checkpoint.workers import Workers
    from bridge_peft.converting.report import AdapterReport
    from bridge_peft.converting.run_config import ByHand

HfModel = Annotated[
    Path | None, "Folder of the base, or its config.json; no weights are read. By default what the input names."
]
DType = Annotated[
    Literal["fp32", "fp16", "bf16"] | None, "Dtype of the output's factors; each keeps its own if not given."
]
Overwrite = Annotated[bool, "Replace an output folder that holds something, once the new one is finished."]
Durable = Annotated[bool, "Wait for the disk before the output gets its name."]
AdapterName = Annotated[str | None, "Which adapter of the checkpoint; needed where there are several."]
Rank = Annotated[int | None, "Rank of the factors, where run_config.yaml does not say it; with --alpha."]
Alpha = Annotated[float | None, "Alpha of the adapter, where run_config.yaml does not say it; with --r."]
Rslora = Annotated[bool, "Scale by alpha / sqrt(r); with --r and --alpha."]
Padded = Annotated[int | None, "Rows of Megatron's vocabulary, for an adapter on the output layer."]
Json = Annotated[bool, "Print the report as JSON."]


@dataclass(frozen=True, kw_only=True)
class Export:
    """Convert a Megatron adapter checkpoint, saved at any parallel layout, to an HF adapter folder."""

    adapter: Annotated[Path, "Folder of a run (its latest iteration is taken) or of one iteration."]
    output: Annotated[Path, "Output folder: adapter_model.safetensors, adapter_config.json."]
    hf_model: HfModel = None
    target: Annotated[
        Literal["peft", "peft-target-parameters", "vllm", "sglang"],
        "Who is to read it; decides how routed experts are written.",
    ] = "peft"
    dtype: DType = None
    exclude_adapter_base_prefix: Annotated[
        tuple[str, ...], "Leave out layers whose Megatron name begins so, such as mtp. (repeatable)."
    ] = ()
    adapter_name: AdapterName = None
    r: Rank = None
    alpha: Alpha = None
    use_rslora: Rslora = False
    padded_vocab: Padded = None
    overwrite: Overwrite = False
    durable: Durable = False
    json: Json = False

    def run(self) -> int:
        """Export, report."""
        _require()
        from bridge_peft.converting.offline import export_adapter_ckpt

        by_hand = _by_hand(self.r, self.alpha, rslora=self.use_rslora)
        with _workers() as workers:
            report = export_adapter_ckpt(
                self.adapter,
                self.output,
                self.hf_model,
                adapter_name=self.adapter_name,
                dtype=self.dtype,
                target=self.target,
                by_hand=by_hand,
                exclude_adapter_base_prefix=self.exclude_adapter_base_prefix,
                padded_vocab=self.padded_vocab,
                overwrite=self.overwrite,
                durable=self.durable,
                workers=workers,
            )
            return _shown("exported", report, rank=workers.rank, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class Import:
    """Convert an HF adapter folder to a Megatron adapter checkpoint, which loads at any parallel layout."""

    adapter: Annotated[Path, "Folder that PEFT saved: adapter_config.json, adapter_model.safetensors."]
    output: Annotated[Path, "Output folder; gets iter_0000000/ and latest_checkpointed_iteration.txt."]
    hf_model: HfModel = None
    dtype: DType = None
    canonical: Annotated[bool, "Keep q, k, v, gate and up apart instead of putting their ranks side by side."] = False
    adapter_name: Annotated[str, "What it is called in the checkpoint."] = "default"
    padded_vocab: Padded = None
    overwrite: Overwrite = False
    durable: Durable = False
    json: Json = False

    def run(self) -> int:
        """Import, report."""
        _require()
        from bridge_peft.converting.offline import import_adapter_ckpt

        with _workers() as workers:
            report = import_adapter_ckpt(
                self.adapter,
                self.output,
                self.hf_model,
                adapter_name=self.adapter_name,
                dtype=self.dtype,
                canonical=self.canonical,
                padded_vocab=self.padded_vocab,
                overwrite=self.overwrite,
                durable=self.durable,
                workers=workers,
            )
            return _shown("imported", report, rank=workers.rank, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Fold an adapter into the HF model it belongs to, in float32, folder to folder."""

    hf: Annotated[Path, "HF folder of the base, with weights."]
    adapter: Annotated[Path, "Folder that PEFT saved, or a Megatron adapter checkpoint."]
    output: Annotated[Path, "Output folder."]
    dtype: DType = None
    adapter_name: AdapterName = None
    r: Rank = None
    alpha: Alpha = None
    use_rslora: Rslora = False
    overwrite: Overwrite = False
    durable: Durable = False
    json: Json = False

    def run(self) -> int:
        """Merge, report."""
        _require()
        from bridge_peft.converting.merging import merge_hf

        report = merge_hf(
            self.hf,
            self.adapter,
            self.output,
            adapter_name=self.adapter_name,
            dtype=self.dtype,
            by_hand=_by_hand(self.r, self.alpha, rslora=self.use_rslora),
            overwrite=self.overwrite,
            durable=self.durable,
        )
        return _shown("merged", report, rank=0, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say what an adapter folder holds, of either kind."""

    adapter: Annotated[Path, "Folder that PEFT saved, or a Megatron checkpoint with adapters."]
    json: Json = False

    def run(self) -> int:
        """Look, tell."""
        from bridge_peft.converting.describe import describe

        found = describe(self.adapter)
        if self.json:
            print(json.dumps(found))
            return 0
        kinds = found.pop("kinds")
        print(facts([(name.replace("_", " "), value) for name, value in found.items()]))
        for kind, facts_of_kind in kinds.items():
            print(f"  {facts_of_kind['count']:>6} x {kind}  {facts_of_kind['shape']} {facts_of_kind['dtype']}")
        return 0


def _require() -> None:
    require("torch", extra="mcore", package="bridge-peft")


def _by_hand(r: int | None, alpha: float | None, *, rslora: bool) -> ByHand:
    from bridge_peft.converting.run_config import ByHand

    return ByHand(r=r, alpha=alpha, rslora=rslora)


@contextmanager
def _workers() -> Iterator[Workers]:
    """This process alone, or under torchrun all that it started."""
    from bridge_core.checkpoint.workers import Alone
    from bridge_core.runtime.workers import torchrun_workers, world_size

    if world_size() == 1:
        yield Alone()
        return
    with torchrun_workers() as workers:
        yield workers


def _shown(done: str, report: AdapterReport, *, rank: int, as_json: bool) -> int:
    if rank > 0:
        return 0
    if as_json:
        values = {"output": str(report.output), "layers": report.layers, "tensors": report.tensors}
        values |= {"nbytes": report.nbytes, "read": report.read, "left_out": list(report.left_out)}
        print(json.dumps(values))
        return 0
    print(
        facts([
            (done, f"{report.layers} layers, {report.tensors} tensors, {in_bytes(report.nbytes)}"),
            ("to", report.output),
            ("read", in_bytes(report.read)),
            ("left out", ", ".join(report.left_out)),
        ])
    )  # fmt: skip
    return 0
