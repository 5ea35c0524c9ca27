"""`run_config.yaml`: the configuration that lies beside a Megatron checkpoint, written and read as data.

The file is the one Megatron-Bridge 0.7 writes and reads (training/utils/checkpoint_utils.py): a mapping
whose `model` section holds a provider's fields. What is an object there is spelled `{_target_: dotted.name,
_call_: false}`; such names are compared with a small table, never imported.

What only this package needs (the family and the original config.json) is in a section of its own, so
that an export gives back the very configuration that was imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge_core.dtypes import dtype_of
from bridge_core.errors import CheckpointError, ConfigError
from bridge_core.extras import require
from bridge_core.families import Family, Fields
from bridge_core.topology.hybrid_pattern import parse_hybrid_pattern

RUN_CONFIG = "run_config.yaml"
SECTION = "bridge_core"

_FIX = "copy the file again, or remove it and pass the HF folder (or its config.json) that the model came from"

_PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
_HYBRID_PROVIDER = "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider"
_ACTIVATIONS = {
    "silu": "torch.nn.functional.silu",
    "gelu": "torch.nn.functional.gelu",
    "squared_relu": "megatron.core.activations.squared_relu",
}
_OBJECTS = {target: name for name, target in _ACTIVATIONS.items()}

# Arguments of Megatron-LM's command line that stand for a field under another name (Megatron-LM,
# megatron/training/arguments.py, `core_transformer_config_from_args` and `gpt_builders.py`).
_ARGS = {
    "num_moe_experts": "num_experts",
    "layernorm_epsilon": "norm_epsilon",
    "gated_linear_unit": "swiglu",
    "add_bias_linear": "add_bias_linear",
    "seq_length": "max_position_embeddings",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "vocab_size": "vocab_size",
}
_ACTIVATION_ARGS = {"swiglu": "silu", "squared_relu": "squared_relu"}


def write_run_config(
    fields: Fields,
    family: Family,
    hf_config: Mapping[str, Any] | None,
    dtype: str,
    *,
    ignore: Sequence[str] = (),
    forms: Mapping[str, int] | None = None,
    shifted: Mapping[str, str] | None = None,
) -> str:
    """The text of run_config.yaml for an imported checkpoint. JSON is YAML: no library is needed to write it.

    Args:
        fields, family, hf_config: of the model.
        dtype: its safetensors dtype.
        ignore: patterns of the HF names that were left out.
        forms: which HF forms its rows had (`Plan.forms`).
        shifted: HF dtypes of the rows that the checkpoint holds wider, by Megatron name pattern.
    """
    target = _HYBRID_PROVIDER if fields.get("hybrid_layer_pattern") else _PROVIDER
    model: dict[str, Any] = {"_target_": target, **fields}
    model["activation_func"] = _object(_ACTIVATIONS[fields["activation_func"]])
    model["params_dtype"] = _object(f"torch.{dtype_of(dtype).torch}")
    model["bf16"], model["fp16"] = dtype == "BF16", dtype == "F16"
    section = {"family": family.name, "dtype": dtype, "megatron": fields, "hf_config": hf_config}
    section |= {"ignore": list(ignore), "forms": dict(forms or {}), "shifted": dict(shifted or {})}
    return json.dumps(
        {"model": model, "checkpoint": {"save_optim": False, "save_rng": False}, SECTION: section}, indent=2
    )


def _object(target: str) -> dict[str, Any]:
    return {"_target_": target, "_call_": False}


def read_run_config(path: Path) -> dict[str, Any]:
    """The content of a run_config.yaml, as plain data.

    Raises:
        CheckpointError: the file is no YAML mapping; names the line.
    """
    text = path.read_text(encoding="utf-8")
    try:
        value = json.loads(text)
    except ValueError:
        yaml = require("yaml", extra="mcore")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise CheckpointError(
                "run_config.yaml cannot be read",
                where=f"{path}{line}",
                expected="YAML",
                got=getattr(error, "problem", None) or error,
                fix=_FIX,
            ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            "run_config.yaml cannot be read", where=path, expected="a mapping", got=type(value).__name__, fix=_FIX
        )
    return value


def fields_of_run_config(config: Mapping[str, Any], *, where: Path) -> Fields:
    """Megatron fields of a model from its run_config.yaml, whoever wrote it."""
    if section := config.get(SECTION):
        return dict(section["megatron"])
    model = config.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(
            "run_config.yaml has no section `model`",
            where=where,
            expected="a mapping `model`",
            got=type(model).__name__,
            fix=_FIX,
        )
    return _one_pattern({name: _plain(value) for name, value in model.items() if name not in ("_target_", "_builder_")})


def _plain(value: Any) -> Any:
    """An option as a plain value; objects by the short name of their `_target_`."""
    if isinstance(value, dict) and "_target_" in value:
        target = str(value["_target_"])
        return _OBJECTS.get(target, target.rpartition(".")[2])
    return value


def fields_of_args(args: Mapping[str, Any]) -> Fields:
    """Megatron fields from the arguments that plain Megatron-LM keeps in a checkpoint's common state.

    Raises:
        ConfigError: an argument that is needed is not there.
    """
    fields = {name: args[name] for name in args if not name.startswith("_")}
    for field, argument in _ARGS.items():
        if argument in args:
            fields[field] = args[argument]
    if "untie_embeddings_and_output_weights" not in args:
        raise ConfigError("the checkpoint's arguments do not say whether embeddings are tied", where="args")
    fields["share_embeddings_and_output_weights"] = not args["untie_embeddings_and_output_weights"]
    if fields.get("num_query_groups") is None or not args.get("group_query_attention", True):
        fields["num_query_groups"] = fields["num_attention_heads"]
    if fields.get("vocab_size") is None:
        raise ConfigError(
            "the checkpoint's arguments give the padded size of the vocabulary, not the real one",
            where="args.vocab_size",
            expected="the number of tokens",
            got=f"padded_vocab_size={args.get('padded_vocab_size')}",
            fix="pass the HF folder (or its config.json) that the model came from",
        )
    if not fields.get("num_moe_experts"):
        fields["num_moe_experts"] = None
    if fields.get("moe_ffn_hidden_size") is None:
        fields["moe_ffn_hidden_size"] = fields["ffn_hidden_size"]
    fields.setdefault("rope_scaling", False)
    fields["activation_func"] = next(
        (name for argument, name in _ACTIVATION_ARGS.items() if args.get(argument)), "gelu"
    )
    return _one_pattern(fields)


def _one_pattern(fields: Fields) -> Fields:
    """The fields with a hybrid model's layers as one pattern, in which no pipeline is spelled out.

    Older checkpoints have the prediction layers apart, and the whole under the name `hybrid_override_pattern`
    (megatron-core 0.19.2, models/hybrid/hybrid_model.py; Megatron-Bridge 0.7, models/hybrid/hybrid_provider.py).
    """
    text = fields.get("hybrid_layer_pattern") or fields.get("hybrid_override_pattern")
    if not text:
        return fields
    pattern = parse_hybrid_pattern(text)
    if not pattern.depths and (apart := fields.get("mtp_hybrid_override_pattern")):
        pattern = pattern._replace(mtp=apart, depths=fields.get("mtp_num_layers") or 0)
    whole = pattern._replace(chunks=(pattern.decoder,))
    return fields | {"hybrid_layer_pattern": str(whole), "num_layers": len(pattern.decoder)}
