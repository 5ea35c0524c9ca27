"""What an exported folder has beside its weights, whatever these came from: configurations, tokenizer, notes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bridge_core.checkpoint.hf_layout import HfLayout
from bridge_core.checkpoint.hf_output import copy_files, finish_hf_folder
from bridge_core.checkpoint.safetensors import read_header
from bridge_core.errors import CoverageError, preview
from bridge_quant_export.configs import compressed_tensors, modelopt
from bridge_quant_export.formats.format import Writer
from bridge_quant_export.manifest import Manifest


@dataclass(frozen=True)
class Beside:
    """All of a folder but its weights.

    Attributes:
        config: config.json, but for what is quantised how.
        dtype: of what is not quantised, for config.json.
        quantization: its `quantization_config`.
        quant_config: content of `hf_quant_config.json`; None for a format that has no such file.
        base: the folder that files are copied from.
        carried: those files.
    """

    config: dict[str, Any]
    dtype: str
    quantization: dict[str, Any]
    quant_config: dict[str, Any] | None
    base: Path
    carried: tuple[Path, ...]

    @classmethod
    def of(
        cls, manifest: Manifest, writer: Writer, config: dict[str, Any], carried: tuple[Path, Sequence[Path]] | None
    ) -> Beside:
        """What the layers of a manifest need said of them.

        Args:
            manifest: of the export.
            writer: the checkpoint format.
            config: config.json of the unquantised model.
            carried: a folder, and the files of it to carry along. What it says of how it is quantised stays there.
        """
        base, files = carried or (Path(), ())
        kept = tuple(file for file in files if file.name != modelopt.HF_QUANT_CONFIG)
        return cls(config, manifest.dtype, *_configurations(manifest, writer), base, kept)

    def copy(self, folder: Path) -> None:
        """Copy the files that are carried along."""
        copy_files(self.base, self.carried, folder)

    def finish(self, folder: Path, layout: HfLayout) -> None:
        """Check the weight files and write the rest: the index, and the configurations.

        Raises:
            CoverageError: a weight file does not say of its tensors what was planned; names it.
            CheckpointError: one is no safetensors file of its size.
        """
        _check_headers(folder, layout)
        if self.quant_config is not None:
            text = json.dumps(self.quant_config, indent=4) + "\n"
            (folder / modelopt.HF_QUANT_CONFIG).write_text(text, encoding="utf-8")
        finish_hf_folder(folder, layout, self.config, dtype=self.dtype, quantization=self.quantization)


def _configurations(manifest: Manifest, writer: Writer) -> tuple[dict[str, Any], dict[str, Any] | None]:
    if writer == "compressed-tensors":
        return compressed_tensors.compose(manifest.layers), None
    return modelopt.compose(manifest.layers, producer_version=_modelopt_version())


def _modelopt_version() -> str:
    """The version of the ModelOpt that is installed here, which quantised the model."""
    try:
        return version("nvidia-modelopt")
    except PackageNotFoundError:
        return "unknown"


def _check_headers(folder: Path, layout: HfLayout) -> None:
    for file in layout.files:
        found, _, _ = read_header(folder / file.name)
        said = {name: (stored.offset, stored.dtype, stored.shape) for name, stored in found.items()}
        if said != file.tensors:
            raise CoverageError("a file holds other tensors than planned", where=file.name, got=preview(sorted(said)))
