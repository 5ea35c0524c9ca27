"""A Megatron `torch_dist` checkpoint folder: which iteration, which configuration, where its tensors lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge_core.checkpoint.dcp import DcpFolder, DcpTensor, read_dcp
from bridge_core.checkpoint.keys import Form, places, stacked_shape
from bridge_core.checkpoint.megatron_files import read_common
from bridge_core.checkpoint.run_config import RUN_CONFIG, SECTION, fields_of_args, fields_of_run_config, read_run_config
from bridge_core.errors import CheckpointError, ConfigError, CoverageError, preview
from bridge_core.families import Family, Fields, family_for, family_named, recognise
from bridge_core.plan import Entry

LATEST = "latest_checkpointed_iteration.txt"
METADATA = ".metadata"

# Keys of a training checkpoint that hold no weights; left alone by name, and reported.
NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler")

_NEEDED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("vocab_size", "share_embeddings_and_output_weights"),
)
_PASS_HF = "pass the HF folder (--source) or the config.json (--hf-config) that the model came from"


@dataclass(frozen=True)
class MegatronFolder:
    """A torch_dist checkpoint whose metadata was read and checked; no tensor data was.

    Attributes:
        path: the folder with `.metadata` (one iteration).
        dcp: its tensors and objects.
        fields: Megatron fields of the model.
        family: the model family.
        hf_config: the config.json that the checkpoint was imported from, if it says so.
    """

    path: Path
    dcp: DcpFolder = field(repr=False)
    fields: Fields = field(repr=False)
    family: Family = field(repr=False)
    hf_config: dict[str, Any] | None = field(repr=False)

    def weights(self) -> dict[str, DcpTensor]:
        """The tensors that are weights."""
        return {key: tensor for key, tensor in self.dcp.tensors.items() if not key.startswith(NOT_WEIGHTS)}


def find_iteration(path: Path) -> Path:
    """The folder of one iteration: `path` itself, or the latest one of the run in `path`.

    Raises:
        CheckpointError: there is none.
    """
    if not path.exists():
        raise CheckpointError(
            "no such folder",
            where=path,
            expected="a folder that Megatron saved, with ckpt_format torch_dist",
            got="nothing",
            fix="check the path",
        )
    if (path / METADATA).exists():
        return path
    candidates = [path / f"iter_{_latest(path):07d}"] if (path / LATEST).exists() else sorted(path.glob("iter_*"))
    for folder in reversed(candidates):
        if (folder / METADATA).exists():
            return folder
    raise CheckpointError(
        "the folder holds no torch_dist checkpoint",
        where=path,
        expected=f"{METADATA}, or an iter_*/{METADATA}",
        got=preview(sorted(file.name for file in path.iterdir())) or "an empty folder",
        fix="give the folder that Megatron saved, with ckpt_format torch_dist",
    )


def _latest(path: Path) -> int:
    text = (path / LATEST).read_text(encoding="utf-8").strip()
    if not text.isdigit():
        raise CheckpointError(
            "the latest iteration is no number",
            where=path / LATEST,
            expected="a number, as in iter_0000100",
            got=repr(text),
            fix="give the folder of one iteration",
        )
    return int(text)


def open_megatron(path: str | Path, *, hf_config: Mapping[str, Any] | None = None) -> MegatronFolder:
    """Read the metadata and configuration of a torch_dist checkpoint.

    Args:
        path: a run's folder, or that of one iteration.
        hf_config: config.json of the model, where the checkpoint does not say enough.

    Raises:
        CheckpointError: the folder is incomplete or corrupt.
        ConfigError: the model's configuration cannot be told.
    """
    folder = find_iteration(Path(path))
    dcp = read_dcp(folder)
    fields, family, stored = _configuration(folder, hf_config)
    return MegatronFolder(folder, dcp, fields, family, dict(hf_config) if hf_config else stored)


def _configuration(folder: Path, hf_config: Mapping[str, Any] | None) -> tuple[Fields, Family, dict[str, Any] | None]:
    run_config = next((f / RUN_CONFIG for f in (folder, folder.parent) if (f / RUN_CONFIG).exists()), None)
    if hf_config is not None:
        family = family_for(hf_config)
        return family.to_megatron(hf_config), family, None
    section: Mapping[str, Any] = {}
    if run_config is not None:
        config = read_run_config(run_config)
        section = config.get(SECTION) or {}
        fields = fields_of_run_config(config, where=run_config)
    else:
        args = read_common(folder).get("args")
        values = getattr(args, "state", args)
        if not isinstance(values, Mapping):
            raise ConfigError(
                "the checkpoint does not say how its model is configured",
                where=folder,
                expected=f"{RUN_CONFIG}, or `args` in its common state",
                got="neither",
                fix=_PASS_HF,
            )
        fields = fields_of_args(values)
    where = run_config or folder
    if absent := [name for name in _NEEDED if fields.get(name) is None]:
        raise ConfigError(
            "the checkpoint's configuration lacks fields that a conversion needs",
            where=where,
            expected=preview(absent, limit=len(absent)),
            got="nothing",
            fix=_PASS_HF,
        )
    family = family_named(section["family"]) if section else recognise(fields)
    return fields, family, section.get("hf_config")


def form_of(entries: tuple[Entry, ...], tensors: Mapping[str, DcpTensor], *, num_layers: int, where: Path) -> Form:
    """The form in which a checkpoint holds its layers and experts.

    Raises:
        CoverageError: in no form does it hold the tensors of the model; names the first that are missing.
    """
    missing: list[str] = []
    for form in Form:
        wanted = {
            place.key
            for entry in entries
            for layer in entry.layers[:1]
            for place in places(entry, form, layer, 0, num_layers=num_layers)
        }
        absent = sorted(wanted - set(tensors))
        if not absent:
            return form
        if not missing or len(absent) < len(missing):
            missing = absent
    raise CoverageError(
        "the Megatron checkpoint lacks tensors that the model's configuration asks for",
        where=where,
        expected=preview(missing),
        got=f"{len(tensors)} tensors, the first: {preview(sorted(tensors))}",
        fix="check that the configuration (run_config.yaml, or the config.json given) belongs to this checkpoint",
    )


def check_weights(
    entries: tuple[Entry, ...], form: Form, tensors: Mapping[str, DcpTensor], *, num_layers: int, where: Path
) -> None:
    """Raise unless a checkpoint's weights are exactly those of the entries, by key and shape."""
    wanted = {
        place.key: stacked_shape(place)
        for entry in entries
        for layer, expert in entry.instances()
        for place in places(entry, form, layer, expert, num_layers=num_layers)
    }
    missing = [key for key in wanted if key not in tensors]
    unexpected = [key for key in tensors if key not in wanted]
    if missing or unexpected:
        raise CoverageError(
            "the Megatron checkpoint does not hold exactly the tensors of the model",
            where=where,
            expected=f"{len(wanted)} tensors; missing {len(missing)}: {preview(missing) or 'none'}",
            got=f"{len(tensors)} tensors; unexpected {len(unexpected)}: {preview(unexpected) or 'none'}",
            fix="a tensor that the family does not know would be lost: teach its table to map it",
        )
    for key, shape in wanted.items():
        if tuple(tensors[key].shape) != tuple(shape):
            raise CoverageError(
                "a tensor of the Megatron checkpoint has another shape than the configuration says",
                where=key,
                expected=shape,
                got=tuple(tensors[key].shape),
                fix="check that the configuration belongs to this checkpoint",
            )
