"""From Megatron fields to a real model: the one place that calls megatron-core's constructors.

A `Provider` is a bag of settings that a trainer may change until `finalize`: every field of mcore's
`TransformerConfig`, and what `GPTModel` or `HybridModel` takes beside it, under the names of `bridge.fields`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from typing import TYPE_CHECKING, Any

from bridge_core.errors import ConfigError
from bridge_core.extras import require
from bridge_core.families import Fields
from bridge_core.runtime.layer_specs import Spec, block_spec, mtp_spec, placed_by
from bridge_core.runtime.provider_hybrid import PIPELINE_OPTIONS, hybrid_chunk, pattern_with_pipeline
from bridge_core.topology import ParallelLayout
from bridge_core.topology.hybrid_pattern import parse_hybrid_pattern, with_pipeline

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

# What GPTModel takes beside its configuration (megatron-core 0.19, models/gpt/gpt_model.py `__init__`).
_MODEL_ARGUMENTS = (
    "position_embedding_type",
    "rotary_percent",
    "rotary_base",
    "rope_scaling",
    "rope_scaling_factor",
    "seq_len_interpolation_factor",
    "share_embeddings_and_output_weights",
)
# Fields that choose other modules than a plain decoder's, and that not every version has.
_VARIANTS = (
    *("experimental_attention_variant", "linear_attention_freq", "attention_output_gate"),
    *("moe_shared_expert_gate", "layernorm_zero_centered_gamma", "mtp_num_layers"),
)
# And HybridModel (models/hybrid/hybrid_model.py), or its layers.
_HYBRID_ARGUMENTS = ("hybrid_layer_pattern", "mamba_chunk_size")
_BESIDE = (
    *(*_MODEL_ARGUMENTS, *_HYBRID_ARGUMENTS),
    *("vocab_size", "seq_length", "make_vocab_size_divisible_by", "padded_vocab_size"),
)
_SETTINGS = "fields of TransformerConfig, or arguments of GPTModel or HybridModel"
_CHECK_NAMES = "check the names against the installed megatron-core"


class Provider:
    """Settings of a model, and the way to build it. Made by `AutoBridge.to_megatron_provider`.

    Settings are attributes: `provider.tensor_model_parallel_size = 2`. A name that neither
    `TransformerConfig` nor `GPTModel` knows is refused when it is set.

    Args:
        fields: Megatron fields of the model.
        spec: which modules layers are made of: Transformer Engine's, megatron-core's own, or those of
            the CPU host backend. None takes Transformer Engine where it is installed and a GPU is there,
            the host backend otherwise.
    """

    def __init__(self, fields: Fields, *, spec: Spec | None = None) -> None:
        require("megatron.core", extra="mcore")
        from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

        kind = MLATransformerConfig if fields.get("multi_latent_attention") else TransformerConfig
        known = {f.name for f in dataclass_fields(kind) if f.init} | set(_BESIDE)
        object.__setattr__(self, "_known", known)
        object.__setattr__(self, "_settings", {"make_vocab_size_divisible_by": 1})
        object.__setattr__(self, "spec", spec or default_spec())
        _check_version(fields, known)
        self.apply_overrides({name: value for name, value in fields.items() if name in known})
        if fields.get("position_embedding_type") == "mrope":
            # mcore's GPTModel does not interleave; for text, whose three positions are one, this is the same.
            self.apply_overrides({"position_embedding_type": "rope", "mrope_section": None})

    def __getattr__(self, name: str) -> Any:
        settings = object.__getattribute__(self, "_settings")
        if name in settings:
            return settings[name]
        if name in object.__getattribute__(self, "_known"):
            from megatron.core.transformer.transformer_config import TransformerConfig

            return getattr(TransformerConfig, name, None)
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._known:
            raise ConfigError(
                "a provider has no such setting",
                where=name,
                expected=_SETTINGS,
                got=f"{name}={value!r}",
                fix=_CHECK_NAMES,
            )
        self._settings[name] = value

    def apply_overrides(self, overrides: Mapping[str, Any]) -> Provider:
        """Set many settings at once, for trainers that keep them in a dict. All are checked before any is set."""
        if unknown := sorted(set(overrides) - self._known):
            raise ConfigError(
                "a provider has no such settings",
                where=", ".join(unknown),
                expected=_SETTINGS,
                got=", ".join(f"{name}={overrides[name]!r}" for name in unknown),
                fix=_CHECK_NAMES,
            )
        for name, value in overrides.items():
            setattr(self, name, value)
        return self

    def copy(self) -> Provider:
        """A provider of the same settings, whose changes are its own."""
        made = object.__new__(type(self))
        for name, value in vars(self).items():
            object.__setattr__(made, name, dict(value) if name == "_settings" else value)
        return made

    @property
    def layout(self) -> ParallelLayout:
        """The parallel sizes among the settings. `dp` is not one of them: it follows from the ranks."""
        get = self._settings.get
        layout = ParallelLayout(
            tp=get("tensor_model_parallel_size", 1),
            pp=get("pipeline_model_parallel_size", 1),
            vpp=get("virtual_pipeline_model_parallel_size") or 1,
            ep=get("expert_model_parallel_size", 1),
            etp=get("expert_tensor_parallel_size"),
            cp=get("context_parallel_size", 1),
            num_layers_in_first_pipeline_stage=get("num_layers_in_first_pipeline_stage"),
            num_layers_in_last_pipeline_stage=get("num_layers_in_last_pipeline_stage"),
            account_for_embedding_in_pipeline_split=get("account_for_embedding_in_pipeline_split", False),
            account_for_loss_in_pipeline_split=get("account_for_loss_in_pipeline_split", False),
            pipeline_model_parallel_layout=get("pipeline_model_parallel_layout"),
        )
        pattern = get("hybrid_layer_pattern")
        return with_pipeline(layout, parse_hybrid_pattern(pattern)) if pattern else layout

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding over all tensor-parallel ranks."""
        if (given := self._settings.get("padded_vocab_size")) is not None:
            return given
        unit = self.make_vocab_size_divisible_by * self.layout.tp
        return -(-self.vocab_size // unit) * unit

    def finalize(self) -> TransformerConfig:
        """mcore's configuration of these settings; raises what mcore has to say against them."""
        import torch
        from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

        kind = MLATransformerConfig if self._settings.get("multi_latent_attention") else TransformerConfig
        own = {f.name for f in dataclass_fields(kind) if f.init}  # of MLA, the rotary base as well
        kwargs = {name: value for name, value in self._settings.items() if name in own}
        if self._settings.get("hybrid_layer_pattern"):
            for option in PIPELINE_OPTIONS:
                kwargs.pop(option, None)  # said by the pattern that the model is given
        kwargs["activation_func"] = _activation(kwargs.get("activation_func", "silu"))
        kwargs.setdefault("pipeline_dtype", kwargs.get("params_dtype", torch.float32))
        if kwargs.get("expert_tensor_parallel_size") is None:
            kwargs["expert_tensor_parallel_size"] = kwargs.get("tensor_model_parallel_size", 1)
        if self.spec == "local":
            kwargs["moe_grouped_gemm"] = False  # megatron-core's own modules have no grouped experts
        if self.spec != "te" and not torch.cuda.is_available():
            from bridge_core.runtime.host import cpu_friendly

            kwargs |= cpu_friendly(kwargs)
            if self.spec == "local":
                # mcore's torch norm refuses it; without it, experts with tp > 1 can be evaluated, not trained.
                kwargs["sequence_parallel"] = False
        return kind(**kwargs)

    def provide(self, pg_collection: ProcessGroupCollection) -> list[GPTModel | HybridModel]:
        """This rank's model chunks, one per virtual pipeline stage, in mcore's order.

        Of mcore's global state nothing is used: where mcore asks for this stage all the same, the groups answer
        (`placed_by`). It also asks for groups that rematerialise weights (0.19, tensor_parallel/layers.py); without a
        global state there are none.

        Args:
            pg_collection: groups of the layout that the settings say.

        Raises:
            ConfigError: the groups are not of the layout's sizes (tp, pp, cp, ep, etp; `dp` may be any), or one is
                not there; on a GPU, mcore's random states are not there to fill weights from.
        """
        config = self.finalize()
        _check_groups(self.layout, pg_collection)
        _check_seeded(config)
        return [self._chunk(config, pg_collection, stage) for stage in range(self.layout.vpp)]

    def provide_distributed_model(
        self, pg_collection: ProcessGroupCollection, *, wrap_with_ddp: bool = False, ddp_config: Any = None
    ) -> list[Any]:
        """`provide`, moved to this rank's GPU where there is one, and wrapped in mcore's DDP if asked to.

        Args:
            pg_collection: groups of the layout that the settings say.
            wrap_with_ddp: wrap every chunk in `DistributedDataParallel`.
            ddp_config: its `DistributedDataParallelConfig`; by default mcore's defaults.
        """
        import torch

        chunks = self.provide(pg_collection)
        if torch.cuda.is_available() and self.spec != "host":
            chunks = [chunk.cuda() for chunk in chunks]
        if not wrap_with_ddp:
            return chunks
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

        return [
            DistributedDataParallel(
                chunk.config,
                ddp_config or DistributedDataParallelConfig(),
                chunk,
                disable_bucketing=number > 0,
                pg_collection=pg_collection,
            )
            for number, chunk in enumerate(chunks)
        ]

    def _chunk(self, config: TransformerConfig, groups: ProcessGroupCollection, stage: int) -> GPTModel | HybridModel:
        with placed_by(config, groups, self.layout.vpp):
            if pattern := self._settings.get("hybrid_layer_pattern"):
                return hybrid_chunk(
                    config,
                    groups,
                    spec=self.spec,
                    pattern=pattern_with_pipeline(pattern, self.layout, self.mtp_num_layers),
                    stage=stage,
                    vpp=self.layout.vpp,
                    chunk_size=self.mamba_chunk_size,
                    vocab_size=self.padded_vocab,
                    max_sequence_length=self.seq_length,
                    share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
                    position_embedding_type=self.position_embedding_type,
                )
            from megatron.core.models.gpt import GPTModel

            arguments = self.model_arguments(config, groups, stage)
            block, vp_stage = arguments["transformer_layer_spec"], arguments["vp_stage"]
            prediction = mtp_spec(self.spec, config, block, pp_rank=groups.pp.rank(), vp_stage=vp_stage)
            return GPTModel(**arguments, mtp_block_spec=prediction)

    def model_arguments(
        self, config: TransformerConfig, groups: ProcessGroupCollection, stage: int = 0
    ) -> dict[str, Any]:
        """What `GPTModel` is given for one chunk, but for its prediction layers.

        Args:
            config: what `finalize` gave.
            groups: of the layout that the settings say.
            stage: number of the chunk among those of this rank.
        """
        pp, rank, vpp = groups.pp.size(), groups.pp.rank(), self.layout.vpp
        vp_stage = stage if vpp > 1 else None
        arguments = {name: self._settings[name] for name in _MODEL_ARGUMENTS if self._settings.get(name) is not None}
        return {
            "config": config,
            "transformer_layer_spec": block_spec(self.spec, config, pp_rank=rank, vp_stage=vp_stage),
            "vocab_size": self.padded_vocab,
            "max_sequence_length": self.seq_length,
            "pre_process": rank == 0 and stage == 0,
            "post_process": rank == pp - 1 and stage == vpp - 1,
            "parallel_output": True,
            "pg_collection": groups,
            "vp_stage": vp_stage,
            **arguments,
        }


def _check_version(fields: Fields, known: set[str]) -> None:
    """Raise if the installed megatron-core does not know a field that changes what the model computes."""
    lacking = [name for name in _VARIANTS if fields.get(name) and name not in known]
    if lacking:
        raise ConfigError(
            "the installed megatron-core cannot build this model",
            where=", ".join(lacking),
            expected="fields of its TransformerConfig, as in megatron-core 0.19",
            got="a version without them",
            fix="install a newer megatron-core; converting checkpoints does without it",
        )


# Size of a layout -> the group that has it, and the setting that says it.
_AXES = {
    "tp": ("tp", "tensor_model_parallel_size"),
    "pp": ("pp", "pipeline_model_parallel_size"),
    "cp": ("cp", "context_parallel_size"),
    "ep": ("ep", "expert_model_parallel_size"),
    "etp": ("expt_tp", "expert_tensor_parallel_size"),
}


def _check_seeded(config: TransformerConfig) -> None:
    """mcore fills weights on a GPU from random states that somebody has to make (0.19.2, tensor_parallel/layers.py)."""
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    fills = config.perform_initialization and not config.use_cpu_initialization
    tracker: Any = get_cuda_rng_tracker()
    if torch.cuda.is_available() and fills and not tracker.is_initialized():
        call = "model_parallel_cuda_manual_seed(seed, tp_rank=..., ep_rank=..., etp_rank=...)"
        raise ConfigError(
            "megatron-core has no random states to fill weights from",
            where="provide_distributed_model",
            expected="random states made on every rank before the model is built",
            got="none",
            fix=f"call megatron.core.tensor_parallel.random.{call}, or set perform_initialization=False",
        )


def _check_groups(layout: ParallelLayout, groups: ProcessGroupCollection) -> None:
    """Raise unless the groups have the sizes of a layout: mcore builds by the groups, and checks few against it."""
    held = {axis: getattr(groups, name, None) for axis, (name, _) in _AXES.items()}
    found = {axis: None if group is None else group.size() for axis, group in held.items()}
    wanted = {axis: getattr(layout, axis) for axis in _AXES}
    if differ := [axis for axis in _AXES if found[axis] != wanted[axis]]:
        raise ConfigError(
            "process groups differ from the settings",
            where="pg_collection, " + ", ".join(_AXES[axis][0] for axis in differ),
            expected=", ".join(f"{axis}={wanted[axis]} ({_AXES[axis][1]})" for axis in differ),
            got=", ".join(f"{axis}={found[axis] or 'no group'}" for axis in differ),
            fix="set these sizes to those of the groups, or make the groups with pg_collection of the sizes set",
        )


def default_spec() -> Spec:
    """Transformer Engine where it is installed and a GPU is there; the CPU host backend otherwise."""
    from importlib.util import find_spec

    import torch

    if torch.cuda.is_available():
        return "te" if find_spec("transformer_engine") else "local"
    return "host"


def _activation(name: Any) -> Any:
    if not isinstance(name, str):
        return name
    import torch
    from megatron.core.activations import squared_relu

    functional = torch.nn.functional
    known = {"silu": functional.silu, "gelu": functional.gelu, "squared_relu": squared_relu}
    if name not in known:
        raise ConfigError(
            "no activation function has this name",
            where="activation_func",
            expected=" or ".join(known),
            got=name,
            fix="give one of these names, or the function itself",
        )
    return known[name]
