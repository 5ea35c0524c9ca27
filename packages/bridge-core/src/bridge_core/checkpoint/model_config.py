"""Which model a Megatron checkpoint holds: from what lies beside it, from a given config.json, or both.

Where both speak they must agree: tensors of equal shape can mean different things (8 heads of 3 or 4 of 6),
so a configuration that contradicts the checkpoint would export wrong weights without a wrong shape anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from bridge_core.checkpoint.dcp import DcpFolder
from bridge_core.checkpoint.megatron_files import has_common, read_common
from bridge_core.checkpoint.run_config import RUN_CONFIG, SECTION, fields_of_args, fields_of_run_config, read_run_config
from bridge_core.errors import BridgeError, ConfigError, preview
from bridge_core.families import Family, Fields, family_for, family_named, recognise
from bridge_core.families.meaning import check_meaning

_SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    "vocab_size",
)
_NEEDED = (*_SIZES, "share_embeddings_and_output_weights")
# What decides where weights lie. Training options may differ; so may the rotary base, which holds no weights.
_GEOMETRY = (
    *(name for name in _NEEDED if name != "vocab_size"),
    *("num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "mtp_num_layers"),
    *("add_qkv_bias", "qk_layernorm", "multi_latent_attention"),
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    *("hybrid_layer_pattern", "mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim"),
    *("moe_latent_size", "linear_num_key_heads", "linear_num_value_heads"),
    *("linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"),
)
# Constants of a family that say how a model is trained, not what it computes.
_TRAINING = frozenset({
    "hidden_dropout", "attention_dropout", "moe_grouped_gemm", "moe_router_load_balancing_type", "moe_router_dtype",
})  # fmt: skip
# Fields of TransformerConfig that change what weights mean, as they are where a family says nothing of them.
_DEFAULTS: Mapping[str, Any] = {
    "layernorm_zero_centered_gamma": False,
    "multi_latent_attention": False,
    "rotary_interleaved": False,
    "window_size": None,
    "mtp_num_layers": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_latent_size": None,
    "moe_shared_expert_gate": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
}
_PASS_HF = "pass the HF folder (--source) or the config.json (--hf-config) that the model came from"


class ModelConfig(NamedTuple):
    """The model of a checkpoint: its Megatron fields, its family, and its config.json where one is known.

    `ignore` are patterns of HF names that its import left out, `forms` the HF forms that its rows had,
    `shifted` the HF dtypes of rows that it holds wider.
    """

    fields: Fields
    family: Family
    hf_config: dict[str, Any] | None
    ignore: tuple[str, ...] = ()
    forms: Mapping[str, int] | None = None
    shifted: Mapping[str, str] = MappingProxyType({})


class _Said(NamedTuple):
    """What a checkpoint says of itself; `section` is this package's own record, empty for others' checkpoints."""

    fields: Fields
    section: Mapping[str, Any]
    where: Path


def model_of(
    checkpoint: DcpFolder, hf_config: Mapping[str, Any] | None, *, ignore_options: Sequence[str] = ()
) -> ModelConfig:
    """The model of a checkpoint.

    Args:
        checkpoint: the folder of one iteration.
        hf_config: a config.json to go by, which may say more than the checkpoint but must not contradict it.
        ignore_options: options of `hf_config` to leave out of account although the family does not know them.

    Raises:
        ConfigError: the configuration is missing, incomplete, contradictory, or of no known family.
    """
    said = _said_by(checkpoint, must=hf_config is None)
    if said is not None and said.section:
        return _from_section(said, hf_config)
    if hf_config is not None:
        return _from_given(said, hf_config, ignore_options)
    assert said is not None
    _check_complete(said)
    family = recognise(said.fields)
    _check_meaning(family, said.fields, said.where)
    return ModelConfig(said.fields, family, None)


def check_said(checkpoint: DcpFolder, fields: Fields) -> None:
    """Raise if a checkpoint says that its weights mean something else than those of a model, for all their shapes.

    Args:
        checkpoint: the folder of one iteration. One that says nothing of its model, or nothing that can be read,
            passes: its tensors are compared all the same.
        fields: Megatron fields of the model.

    Raises:
        ConfigError: names the settings that differ.
    """
    try:
        said = _said_by(checkpoint, must=False)
    except BridgeError:
        return
    if said is not None:
        check_meaning(
            fields,
            said.fields,
            what="the checkpoint is of a model with other settings",
            where=said.where,
            fix="load it into a model of its own settings (a bridge of its config.json)",
        )


def _from_section(said: _Said, hf_config: Mapping[str, Any] | None) -> ModelConfig:
    """The model as this package recorded it; a config.json that is given must be of the same one."""
    family = family_named(said.section["family"])
    _check_complete(said)
    ignore = tuple(said.section.get("ignore") or ())
    recorded: dict[str, Any] = {name: dict(said.section.get(name) or {}) for name in ("forms", "shifted")}
    recorded["ignore"] = ignore
    if hf_config is None:
        stored = said.section.get("hf_config")
        return ModelConfig(said.fields, family, dict(stored) if stored else None, **recorded)
    other = family_for(hf_config)
    given = other.without(other.to_megatron(hf_config, ignore=tuple(hf_config)), ignore)
    _compare(said.fields, family, given, other, where=said.where, names=(*_GEOMETRY, "vocab_size"))
    return ModelConfig(said.fields, family, family.consistent(hf_config, said.fields), **recorded)


def _from_given(said: _Said | None, hf_config: Mapping[str, Any], ignore_options: Sequence[str]) -> ModelConfig:
    """The model of a config.json; what another tool recorded must agree as far as it goes."""
    family = family_for(hf_config)
    given = family.to_megatron(hf_config, ignore=ignore_options)
    if said is not None:
        _check_meaning(family, said.fields, said.where)
        _compare(said.fields, None, given, family, where=said.where, names=_GEOMETRY)
        _check_vocabulary(said, given)
        if family.unsaid_mtp and "mtp_num_layers" in said.fields:
            given = given | {"mtp_num_layers": said.fields["mtp_num_layers"]}
    return ModelConfig(given, family, dict(hf_config))


def _said_by(checkpoint: DcpFolder, *, must: bool) -> _Said | None:
    """What lies beside the weights; None if nothing does, or too little and `must` is not set."""
    folder = checkpoint.path
    run_config = next((f / RUN_CONFIG for f in (folder, folder.parent) if (f / RUN_CONFIG).exists()), None)
    if run_config is not None:
        config = read_run_config(run_config)
        section = _section_of(config, run_config)
        return _Said(fields_of_run_config(config, where=run_config), section, run_config)
    args = read_common(checkpoint).get("args") if has_common(checkpoint) else None
    values = getattr(args, "state", args)
    try:
        if isinstance(values, Mapping):
            return _Said(_fields_of(values, folder), {}, folder)
    except ConfigError:
        if must:
            raise
        return None
    if must:
        raise ConfigError(
            "the checkpoint does not say how its model is configured",
            where=folder,
            expected=f"{RUN_CONFIG}, or `args` in its common state",
            got="neither",
            fix=_PASS_HF,
        )
    return None


def _section_of(config: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    """This package's section of a run configuration; empty if another tool wrote it."""
    section = config.get(SECTION)
    if not section:
        return {}
    wanted = {"family": str, "megatron": dict, "hf_config": dict | None}
    values = section if isinstance(section, dict) else {}
    if wrong := [name for name, kind in wanted.items() if not isinstance(values.get(name), kind)]:
        raise ConfigError(
            "this package's section of the run configuration is damaged",
            where=where,
            expected="family (text), megatron and hf_config (mappings)",
            got=", ".join(f"{name}: {values.get(name)!r:.40}" for name in wrong),
            fix=f"remove the section {SECTION!r}, and {_PASS_HF}",
        )
    return section


def _fields_of(args: Mapping[str, Any], folder: Path) -> Fields:
    try:
        return fields_of_args(args)
    except KeyError as error:
        raise ConfigError(
            "the checkpoint's arguments lack one that a conversion needs",
            where=f"{folder}: args",
            expected=str(error.args[0]),
            got="nothing",
            fix=_PASS_HF,
        ) from None


def _check_complete(said: _Said) -> None:
    if absent := [name for name in _NEEDED if said.fields.get(name) is None]:
        raise ConfigError(
            "the checkpoint's configuration lacks fields that a conversion needs",
            where=said.where,
            expected=preview(absent, limit=len(absent)),
            got="nothing",
            fix=_PASS_HF,
        )
    wrong = {name: said.fields[name] for name in _SIZES if type(said.fields[name]) is not int or said.fields[name] < 1}
    if wrong:
        raise ConfigError(
            "sizes in the checkpoint's configuration are not whole numbers",
            where=said.where,
            expected="whole numbers of at least 1",
            got=preview(f"{name}={value!r}" for name, value in wrong.items()),
            fix=_PASS_HF,
        )


def _compare(
    ours: Fields, family: Family | None, given: Fields, other: Family, *, where: Path, names: Sequence[str]
) -> None:
    """The checkpoint's own configuration against a given one, wherever both say something."""
    if given.get("multi_latent_attention"):
        names = [name for name in names if name != "kv_channels"]  # says nothing there, and everyone sets another
    wrong = [n for n in names if ours.get(n) is not None and (ours[n] or None) != (given.get(n) or None)]
    if family is not None and family.name != other.name:
        wrong.insert(0, "family")
        ours, given = ours | {"family": family.name}, given | {"family": other.name}
    if wrong:
        raise ConfigError(
            "the configuration that was given contradicts the checkpoint",
            where=f"{where}: {preview(wrong)}",
            expected=preview(f"{name}={ours[name]!r}" for name in wrong),
            got=preview(f"{name}={given.get(name)!r}" for name in wrong),
            fix="give the HF folder or config.json of this very model",
        )


def _check_vocabulary(said: _Said, given: Fields) -> None:
    """A smaller vocabulary than the checkpoint says would drop rows that were trained."""
    stored = said.fields.get("vocab_size")
    if stored is not None and given["vocab_size"] < stored:
        raise ConfigError(
            "the configuration that was given has fewer tokens than the checkpoint",
            where=f"{said.where}: vocab_size",
            expected=f"at least {stored}",
            got=given["vocab_size"],
            fix="give the HF folder or config.json of this very model",
        )


def _check_meaning(family: Family, fields: Fields, where: Path) -> None:
    """Fields that change what weights mean have the values that the family stands for."""
    sections = family.parts.values()
    translated = {option.megatron for section in sections for option in section.fields}
    translated = translated.union(*(section.gives for section in sections))
    expected = {k: v for k, v in family.megatron.items() if k not in _TRAINING}
    expected |= {k: v for k, v in _DEFAULTS.items() if k not in expected and k not in translated}
    if not fields.get("num_moe_experts"):
        expected = {k: v for k, v in expected.items() if not k.startswith("moe_router_")}
    if any(name.startswith("mtp.") for name in family.table(fields)) or not fields.get("mtp_num_layers"):
        expected.pop("mtp_num_layers", None)  # the table has rows for them, or there are none
    wrong = {k: v for k, v in expected.items() if fields.get(k) is not None and fields[k] != v and (fields[k] or v)}
    if wrong:
        raise ConfigError(
            f"the checkpoint's model computes something else than a {family.name} model",
            where=f"{where}: {preview(wrong)}",
            expected=preview(f"{name}={value!r}" for name, value in wrong.items()),
            got=preview(f"{name}={fields[name]!r}" for name in wrong),
            fix="such a model needs a family of its own (docs: 'Add a model family')",
        )
