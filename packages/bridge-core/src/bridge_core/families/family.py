"""What a model family is: a translation of its configuration, and a mapping table. Nothing else.

A family file fills in one `Family`. Its configuration is translated to and from a flat dict of
**Megatron fields**: the fields of megatron-core's `TransformerConfig`, and beside them what
`GPTModel` takes as arguments (`vocab_size`, `rotary_base`, `share_embeddings_and_output_weights`,
...), under the names Megatron-Bridge's providers use, so that `run_config.yaml` reads the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from bridge_core.codecs import codec_of
from bridge_core.errors import ConfigError, preview
from bridge_core.patterns import alternatives, fill
from bridge_core.rules import Rule
from bridge_core.topology import hybrid_pattern

Config = Mapping[str, Any]
Fields = dict[str, Any]
Table = Mapping[str, Rule]

REQUIRED: Any = object()
"""Default of a `Field` that must be in the configuration."""

# Options that change neither the weights nor what the model computes from them in evaluation.
CARRIED = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id",
    "initializer_range", "model_type", "output_router_logits", "pad_token_id", "router_aux_loss_coef",
    "router_jitter_noise", "torch_dtype", "transformers_version", "use_cache", "id2label", "label2id",
    "problem_type", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward",
    "is_encoder_decoder", "moe_shared_expert_overlap", "quantization_config",
})  # fmt: skip


@dataclass(frozen=True)
class Field:
    """One option that both sides have, under its names.

    `default` is used when config.json leaves the option out or says null: a value, or a function of the config.
    `aliases` are further HF names that mean the same; `hf` is the one that is written.
    """

    hf: str
    megatron: str
    default: Any = REQUIRED
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All HF names of the option."""
        return (self.hf, *self.aliases)

    def read(self, config: Config) -> Any:
        """The option's value in an HF configuration."""
        found = {name: config[name] for name in self.names if config.get(name) is not None}
        if len({repr(value) for value in found.values()}) > 1:
            raise ConfigError(
                "two names of one option have different values",
                where=f"config.json: {', '.join(found)}",
                expected="one value",
                got=", ".join(map(repr, found.values())),
                fix="remove the wrong one",
            )
        if found:
            return next(iter(found.values()))
        if self.default is REQUIRED:
            raise ConfigError(
                "the configuration lacks an option that the conversion needs",
                where=f"config.json: {self.hf}",
                expected=f"a value, which becomes Megatron's {self.megatron}",
                got="nothing",
                fix="add it to config.json",
            )
        return self.default(config) if callable(self.default) else self.default


_WHOLE = frozenset({
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size", "num_moe_experts", "moe_ffn_hidden_size",
})  # fmt: skip

Reading = Callable[[Config], Fields]
Writing = Callable[[Fields], dict[str, Any]]


class Copy(NamedTuple):
    """An HF tensor that repeats another one: no Megatron tensor is made from it, but it has to be equal.

    Attributes:
        of: the tensor that it repeats.
        written: whether exports write it; else it is accepted where a checkpoint has it.
    """

    of: str
    written: bool


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of config.json, and how its options are translated.

    Attributes:
        fields: options that both sides have.
        fixed: HF options that must have the given value where present, and are written so.
        reads: translations from HF that are more than a renaming; each returns Megatron fields.
        writes: the way back; each takes Megatron fields and returns HF options.
        handled: HF options that `reads` takes care of, or another section.
        gives: Megatron fields that `reads` gives and that most models leave at megatron-core's default.
    """

    fields: Sequence[Field] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    reads: Sequence[Reading] = ()
    writes: Sequence[Writing] = ()
    handled: frozenset[str] = frozenset()
    gives: frozenset[str] = frozenset()

    def known(self) -> set[str]:
        """Every option that the section accounts for."""
        return {name for f in self.fields for name in f.names} | set(self.fixed) | self.handled | CARRIED


@dataclass(frozen=True, kw_only=True)
class Family(Section):
    """A model family: which architectures it is for, how it is configured, where its weights lie.

    What it inherits from `Section` is the part of config.json that configures the language model.

    Attributes:
        name: short name, as run_config.yaml records it.
        architectures: values of config.json's `architectures` that the family handles.
        model_type: config.json's `model_type`.
        inside: name of the part of config.json that configures the language model; empty for all of it.
        sections: the other parts by name, the top level (where `inside` is not empty) as the empty name.
        megatron: Megatron fields that are the same for every model of the family.
        table: mapping table of a model with the given Megatron fields.
        dims: sizes that the table names beside those that every decoder has.
        copies: HF tensors that repeat others, by name.
        quantised: patterns (as in a shell) of the HF names that the family's fp8 checkpoints quantise; none if
            it is not published so.
        ignored: HF tensors that are no weights: name pattern to the reason.
        unsaid_mtp: config.json does not say whether there are prediction layers; a checkpoint's names do.
        recognises: whether a model with the given Megatron fields is of this family; used to export
            a checkpoint that says nothing of its HF origin.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    table: Callable[[Fields], Table]
    recognises: Callable[[Fields], bool]
    inside: str = ""
    sections: Mapping[str, Section] = field(default_factory=dict)
    megatron: Mapping[str, Any] = field(default_factory=dict)
    dims: Callable[[Fields], Mapping[str, int]] = lambda fields: {}
    copies: Callable[[Fields], Mapping[str, Copy]] = lambda fields: {}
    quantised: Sequence[str] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    unsaid_mtp: bool = False

    @property
    def parts(self) -> dict[str, Section]:
        """Every part of config.json by its name; the empty name is the top level."""
        return {self.inside: self, **self.sections}

    def to_megatron(self, config: Config, *, ignore: Sequence[str] = ()) -> Fields:
        """Megatron fields of an HF configuration.

        Args:
            config: the content of config.json.
            ignore: options to leave out of account although the family does not know them.

        Raises:
            ConfigError: an option is missing, has a value that Megatron cannot express, or is unknown.
        """
        codec_of(config)  # a quantised form that nobody reads is refused here, not ignored
        fields: Fields = dict(self.megatron)
        for name, section in self.parts.items():
            part = config if name == "" else self._part(config, name)
            where = f"config.json: {name}." if name else "config.json: "
            nested = set(self.parts) - {""} if name == "" else set()
            self._check_known(part, section.known() | nested | set(ignore), where)
            self._check_fixed(part, section, ignore, where)
            fields.update(self._read(part, section, where))
        return fields

    def to_hf(self, fields: Fields) -> dict[str, Any]:
        """The HF configuration of a model with the given Megatron fields."""
        config: dict[str, Any] = {"architectures": [self.architectures[0]], "model_type": self.model_type}
        for name, section in self.parts.items():
            part = config if name == "" else config.setdefault(name, {})
            for option in section.fields:
                if option.megatron not in fields:
                    raise ConfigError(
                        "the checkpoint's configuration lacks a field that config.json needs",
                        where=option.megatron,
                        expected=f"a value, which becomes {option.hf}",
                        fix="pass the HF folder (or its config.json) that the model came from",
                    )
                part[option.hf] = fields[option.megatron]
            part.update(section.fixed)
            for write in section.writes:
                part.update(write(fields))
        return config

    def without(self, fields: Fields, ignore: Sequence[str], names: Collection[str] | None = None) -> Fields:
        """The fields of a model of which some HF names are left out, or are not there: without MTP, if that is.

        Args:
            fields: Megatron fields.
            ignore: patterns (as in a shell) of HF names to leave out.
            names: HF names that a checkpoint has, or None where they are not known. They count only where config.json
                says nothing of MTP: a checkpoint that lacks what its configuration announces is refused later.
        """
        rows = [rule.hf for name, rule in self.table(fields).items() if name.startswith("mtp.")]
        mtp = [name for row in rows for name in alternatives(row)]
        left_out = all(any(fnmatchcase(name, pattern) for pattern in ignore) for name in mtp)
        absent = self.unsaid_mtp and names is not None and not any(fill(name, 0) in names for name in mtp)
        return _without_mtp(fields) if mtp and (left_out or absent) else fields

    def consistent(self, config: Config, fields: Fields) -> dict[str, Any]:
        """An HF configuration with the options changed that do not say what `fields` do."""
        before = self.to_hf(self.to_megatron(config, ignore=tuple(config)))
        return _changed(config, before, self.to_hf(fields))

    def _part(self, config: Config, name: str) -> Config:
        if not isinstance(part := config.get(name), Mapping):
            raise ConfigError(
                "the configuration lacks a part",
                where=f"config.json: {name}",
                expected=f"a mapping, as in every {self.name} model's",
                got=type(part).__name__,
                fix="compare config.json with that of a published model",
            )
        return part

    def _check_known(self, part: Config, known: set[str], where: str) -> None:
        if unknown := sorted(set(part) - known):
            raise ConfigError(
                f"the {self.name} family does not translate {len(unknown)} option(s) of the configuration",
                where=f"{where}{preview(unknown)}",
                expected=f"options of a {self.name} model that this package knows",
                got=preview(f"{name}={part[name]!r}" for name in unknown),
                fix="if they change nothing that matters, name them in `ignore_options` (--ignore-option); "
                f"else teach families/{self.name}.py to translate them",
            )

    def _check_fixed(self, part: Config, section: Section, ignore: Sequence[str], where: str) -> None:
        for name, value in section.fixed.items():
            if name in part and name not in ignore and part[name] != value:
                raise ConfigError(
                    f"the {self.name} family cannot express an option's value",
                    where=f"{where}{name}",
                    expected=repr(value),
                    got=repr(part[name]),
                    fix=f"teach the {self.name} family to translate it",
                )

    def _read(self, part: Config, section: Section, where: str) -> Fields:
        fields: Fields = {}
        try:
            for option in section.fields:
                value = fields[option.megatron] = option.read(part)
                if option.megatron in _WHOLE and (type(value) is not int or value < 1):
                    raise ConfigError(
                        "a size is not a positive whole number",
                        where=f"{where}{option.hf}",
                        expected="an int >= 1",
                        got=repr(value),
                        fix="correct config.json",
                    )
            for read in section.reads:
                fields.update(read(part))
        except (TypeError, KeyError, ArithmeticError, AttributeError) as error:
            raise ConfigError(
                "an option of the configuration has a value of the wrong kind, or lacks a part",
                where=where.removesuffix(": "),
                expected=f"what a {self.name} model's configuration holds",
                got=f"{type(error).__name__}: {error}",
                fix="compare config.json with that of a published model",
            ) from error
        return fields


def _without_mtp(fields: Fields) -> Fields:
    found = fields | {"mtp_num_layers": None}
    if text := fields.get(hybrid_pattern.OPTION):
        found[hybrid_pattern.OPTION] = str(hybrid_pattern.parse_hybrid_pattern(text)._replace(mtp="", depths=0))
    return found


def _changed(config: Config, before: Config, after: Config) -> dict[str, Any]:
    found = dict(config)
    for name, value in after.items():
        if isinstance(value, Mapping) and isinstance(found.get(name), Mapping):
            found[name] = _changed(found[name], before.get(name, {}), value)
        elif before.get(name) != value:
            found[name] = value
    return found
