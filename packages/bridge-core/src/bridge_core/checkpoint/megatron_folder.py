"""A Megatron `torch_dist` checkpoint folder: which iteration, which configuration, where its tensors lie."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge_core.checkpoint.dcp import DcpFolder, DcpTensor, read_dcp
from bridge_core.checkpoint.keys import Form, Forms, by_block, is_adapter, places, stacked_shape
from bridge_core.checkpoint.model_config import model_of
from bridge_core.checkpoint.variant import PLAIN, Variant
from bridge_core.codecs import Codec
from bridge_core.errors import CheckpointError, CoverageError, preview
from bridge_core.families import Family, Fields
from bridge_core.geometry import Shape
from bridge_core.plan import Entry, Plan
from bridge_core.plan.placement import EMBEDDING
from bridge_core.topology import ParallelLayout

LATEST = "latest_checkpointed_iteration.txt"
METADATA = ".metadata"
# What a checkpoint without an iteration is called, in the file and as a folder: a converted model, not a step of
# training (Megatron-LM core_v0.13, megatron/training/checkpointing.py, `get_checkpoint_name`, `read_metadata`).
RELEASE = "release"

# Keys of a training checkpoint that hold no weights; left alone by name, and reported.
NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler")


@dataclass(frozen=True)
class MegatronFolder:
    """A torch_dist checkpoint whose metadata was read and checked; no tensor data was.

    Attributes:
        path: the folder with `.metadata` (one iteration).
        dcp: its tensors and objects.
        fields: Megatron fields of the model.
        family: the model family.
        hf_config: the config.json that the checkpoint was imported from, if it says so.
        ignore: patterns of HF names that its import left out.
        forms: which HF forms its rows had (`Plan.forms`).
        shifted: HF dtypes of the rows that it holds wider, by Megatron name pattern.
    """

    path: Path
    dcp: DcpFolder = field(repr=False)
    fields: Fields = field(repr=False)
    family: Family = field(repr=False)
    hf_config: dict[str, Any] | None = field(repr=False)
    ignore: tuple[str, ...] = ()
    forms: Mapping[str, int] | None = field(default=None, repr=False)
    shifted: Mapping[str, str] = field(default_factory=dict, repr=False)

    def weights(self) -> dict[str, DcpTensor]:
        """The tensors that are weights."""
        return {key: tensor for key, tensor in self.dcp.tensors.items() if not key.startswith(NOT_WEIGHTS)}


def find_iteration(path: Path) -> Path:
    """The folder of one iteration: `path` itself, or the latest one of the run in `path`, which may be its release.

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
    candidates = [_latest(path)] if (path / LATEST).exists() else [path / RELEASE, *sorted(path.glob("iter_*"))]
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


def _latest(path: Path) -> Path:
    """The folder that a run says is its latest."""
    text = (path / LATEST).read_text(encoding="utf-8").strip()
    if text == RELEASE:
        return path / RELEASE
    if not text.isdigit():
        raise CheckpointError(
            "the latest iteration is no number",
            where=path / LATEST,
            expected=f"a number, as in iter_0000100, or the word {RELEASE}",
            got=repr(text),
            fix="give the folder of one iteration",
        )
    return path / f"iter_{int(text):07d}"


def open_megatron(
    path: str | Path,
    *,
    hf_config: Mapping[str, Any] | None = None,
    ignore_options: Sequence[str] = (),
    variant: Variant = PLAIN,
) -> MegatronFolder:
    """Read the metadata and configuration of a torch_dist checkpoint.

    Args:
        path: a run's folder, or that of one iteration.
        hf_config: config.json of the model, where the checkpoint does not say enough; must not contradict it.
        ignore_options: options of `hf_config` that the family does not know and that do not matter.
        variant: how its tensors are arranged.

    Raises:
        CheckpointError: the folder is incomplete or corrupt.
        ConfigError: the model's configuration cannot be told.
    """
    folder = find_iteration(Path(path))
    dcp = read_dcp(folder)
    model = model_of(dcp, hf_config, ignore_options=ignore_options)
    family = variant.family(model.family, model.fields, folder)
    return MegatronFolder(folder, dcp, **model._replace(family=family)._asdict())


def export_plan(
    checkpoint: MegatronFolder,
    *,
    inventory: Mapping[str, Shape] | None = None,
    ignore: Sequence[str] = (),
    codec: Codec | None = None,
    quantised: Collection[str] | None = None,
) -> Plan:
    """The plan of a checkpoint's model; the vocabulary's padding is what the checkpoint has.

    Args:
        checkpoint: says what was left out of it, and in which forms its tensors were published.
        inventory: shapes of the HF tensors to be like, where there are such.
        ignore: further patterns of HF names to leave out.
        codec, quantised: as for a `Plan`.
    """
    stored = next((t for key, t in checkpoint.dcp.tensors.items() if f".{key}".endswith(f".{EMBEDDING}")), None)
    ignore = tuple(dict.fromkeys((*checkpoint.ignore, *ignore)))
    return Plan(
        checkpoint.family,
        checkpoint.family.without(checkpoint.fields, ignore),
        ParallelLayout(),
        padded_vocab=max(stored.shape[0], checkpoint.fields["vocab_size"]) if stored else None,
        inventory=inventory,
        forms=checkpoint.forms,
        ignore=ignore,
        codec=codec,
        quantised=quantised,
    )


def forms_of(entries: tuple[Entry, ...], tensors: Mapping[str, DcpTensor], *, where: Path) -> Forms:
    """The form in which a checkpoint holds the layers of each block, and their experts.

    Raises:
        CoverageError: in no form does it hold the tensors of the model; names the first that are missing.
    """
    return {block: _form_of(members, tensors, where) for block, members in by_block(entries).items()}


def _form_of(entries: Sequence[Entry], tensors: Mapping[str, DcpTensor], where: Path) -> Form:
    missing: list[str] = []
    for form in Form:
        wanted = {
            place.key for entry in entries for layer in entry.layers[:1] for place in places(entry, form, layer, 0)
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


def check_no_adapters(keys: Collection[str], *, where: Path) -> None:
    """Raise if a checkpoint holds adapters beside the model's tensors."""
    if adapters := [key for key in keys if is_adapter(key)]:
        raise CoverageError(
            "the Megatron checkpoint holds adapters beside the model, which would be lost",
            where=where,
            expected="the tensors of the model alone",
            got=f"{len(adapters)} tensors of adapters: {preview(adapters)}",
            fix='ignore=["*.adapter.*"] (--ignore) leaves them out; bridge-peft export converts them',
        )


def check_weights(entries: tuple[Entry, ...], forms: Forms, tensors: Mapping[str, DcpTensor], *, where: Path) -> None:
    """Raise unless a checkpoint's weights are exactly those of the entries, by key and shape."""
    wanted = {
        place.key: stacked_shape(place)
        for entry in entries
        for layer, expert in entry.instances()
        for place in places(entry, forms[entry.block], layer, expert)
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
