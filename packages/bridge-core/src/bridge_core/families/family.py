"""What a model family is: a translation of its configuration, and a mapping table. Nothing else.

A family file fills in one `Family`. Its configuration is translated to and from a flat dict of
**Megatron fields**: the fields of megatron-core's `TransformerConfig`, and beside them what
`GPTModel` takes as arguments (`vocab_size`, `rotary_base`, `share_embeddings_and_output_weights`,
...), under the names Megatron-Bridge's providers use, so that `run_config.yaml` reads the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bridge_core.errors import ConfigError, preview
from bridge_core.rules import Rule

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
    "is_encoder_decoder",
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


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: which architectures it is for, how it is configured, where its weights lie.

    Attributes:
        name: short name, as run_config.yaml records it.
        architectures: values of config.json's `architectures` that the family handles.
        model_type: config.json's `model_type`.
        fields: options that both sides have.
        fixed: HF options that must have the given value where present, and are written so.
        megatron: Megatron fields that are the same for every model of the family.
        reads: translations from HF that are more than a renaming; each returns Megatron fields.
        writes: the way back; each takes Megatron fields and returns HF options.
        handled: HF options that `reads` takes care of.
        table: mapping table of a model with the given Megatron fields.
        ignored: HF tensors that are no weights: name pattern to the reason.
        recognises: whether a model with the given Megatron fields is of this family; used to export
            a checkpoint that says nothing of its HF origin.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    fields: Sequence[Field]
    table: Callable[[Fields], Table]
    recognises: Callable[[Fields], bool]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    megatron: Mapping[str, Any] = field(default_factory=dict)
    reads: Sequence[Reading] = ()
    writes: Sequence[Writing] = ()
    handled: frozenset[str] = frozenset()
    ignored: Mapping[str, str] = field(default_factory=dict)

    def to_megatron(self, config: Config, *, ignore: Sequence[str] = ()) -> Fields:
        """Megatron fields of an HF configuration.

        Args:
            config: the content of config.json.
            ignore: options to leave out of account although the family does not know them.

        Raises:
            ConfigError: an option is missing, has a value that Megatron cannot express, or is unknown.
        """
        known = {name for f in self.fields for name in f.names} | set(self.fixed) | self.handled | CARRIED | set(ignore)
        if unknown := sorted(set(config) - known):
            raise ConfigError(
                f"the {self.name} family does not translate {len(unknown)} option(s) of the configuration",
                where=f"config.json: {preview(unknown)}",
                expected=f"options of a {self.name} model that this package knows",
                got=preview(f"{name}={config[name]!r}" for name in unknown),
                fix="if they change nothing that matters, name them in `ignore_options` (--ignore-option); "
                f"else teach families/{self.name}.py to translate them",
            )
        for name, value in self.fixed.items():
            if name in config and name not in ignore and config[name] != value:
                raise ConfigError(
                    f"the {self.name} family cannot express an option's value",
                    where=f"config.json: {name}",
                    expected=repr(value),
                    got=repr(config[name]),
                    fix=f"teach the {self.name} family to translate it",
                )
        fields: Fields = dict(self.megatron)
        try:
            for option in self.fields:
                value = fields[option.megatron] = option.read(config)
                if option.megatron in _WHOLE and (type(value) is not int or value < 1):
                    raise ConfigError(
                        "a size is not a positive whole number",
                        where=f"config.json: {option.hf}",
                        expected="an int >= 1",
                        got=repr(value),
                        fix="correct config.json",
                    )
            for read in self.reads:
                fields.update(read(config))
        except (TypeError, KeyError, ArithmeticError, AttributeError) as error:
            raise ConfigError(
                "an option of the configuration has a value of the wrong kind, or lacks a part",
                where="config.json",
                expected=f"what a {self.name} model's configuration holds",
                got=f"{type(error).__name__}: {error}",
                fix="compare config.json with that of a published model",
            ) from error
        return fields

    def to_hf(self, fields: Fields) -> dict[str, Any]:
        """The HF configuration of a model with the given Megatron fields."""
        config: dict[str, Any] = {"architectures": [self.architectures[0]], "model_type": self.model_type}
        for option in self.fields:
            if option.megatron not in fields:
                raise ConfigError(
                    "the checkpoint's configuration lacks a field that config.json needs",
                    where=option.megatron,
                    expected=f"a value, which becomes {option.hf}",
                    fix="pass the HF folder (or its config.json) that the model came from",
                )
            config[option.hf] = fields[option.megatron]
        config.update(self.fixed)
        for write in self.writes:
            config.update(write(fields))
        return config
