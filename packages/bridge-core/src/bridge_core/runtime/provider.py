"""From Megatron fields to a real model: the one place that calls megatron-core's constructors.

A `Provider` is a bag of settings that a trainer may change until `finalize`: every field of mcore's
`TransformerConfig`, and what `GPTModel` takes beside it, under the names of `bridge.fields`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from typing import TYPE_CHECKING, Any, Literal

from bridge_core.errors import ConfigError
from bridge_core.extras import require
from bridge_core.families import Fields
from bridge_core.topology import ParallelLayout

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

Spec = Literal["te", "local", "host"]

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
_BESIDE = (*_MODEL_ARGUMENTS, "vocab_size", "seq_length", "make_vocab_size_divisible_by", "padded_vocab_size")


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
        from megatron.core.transformer.transformer_config import TransformerConfig

        known = {f.name for f in dataclass_fields(TransformerConfig) if f.init} | set(_BESIDE)
        object.__setattr__(self, "_known", known)
        object.__setattr__(self, "_settings", {"make_vocab_size_divisible_by": 1})
        object.__setattr__(self, "_final", False)
        object.__setattr__(self, "spec", spec or default_spec())
        self.apply_overrides({name: value for name, value in fields.items() if name in known})
        if fields.get("mrope_interleaved"):
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
                expected="a field of TransformerConfig, or an argument of GPTModel",
                got=f"{name}={value!r}",
                fix="check the name against the installed megatron-core",
            )
        self._settings[name] = value
        object.__setattr__(self, "_final", False)

    def apply_overrides(self, overrides: Mapping[str, Any]) -> Provider:
        """Set many settings at once, for trainers that keep them in a dict. All are checked before any is set."""
        if unknown := sorted(set(overrides) - self._known):
            raise ConfigError(
                "a provider has no such settings", where=", ".join(unknown), expected="fields of TransformerConfig"
            )
        for name, value in overrides.items():
            setattr(self, name, value)
        return self

    @property
    def layout(self) -> ParallelLayout:
        """The parallel sizes among the settings. `dp` is not one of them: it follows from the ranks."""
        get = self._settings.get
        return ParallelLayout(
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
        from megatron.core.transformer.transformer_config import TransformerConfig

        kwargs = {name: value for name, value in self._settings.items() if name not in _BESIDE}
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
        config = TransformerConfig(**kwargs)
        object.__setattr__(self, "_final", True)
        return config

    def provide(self, pg_collection: ProcessGroupCollection) -> list[GPTModel]:
        """This rank's model chunks, one per virtual pipeline stage, in mcore's order.

        Args:
            pg_collection: groups of the layout that the settings say. Nothing global is read.

        Raises:
            ConfigError: the groups are not of the layout's sizes.
        """
        config = self.finalize()
        sizes = {"tp": pg_collection.tp.size(), "pp": pg_collection.pp.size()}
        wanted = {"tp": self.layout.tp, "pp": self.layout.pp}
        if sizes != wanted:
            raise ConfigError(
                "process groups differ from the settings", where="pg_collection", expected=wanted, got=sizes
            )
        return [self._chunk(config, pg_collection, stage) for stage in range(self.layout.vpp)]

    def provide_distributed_model(
        self, pg_collection: ProcessGroupCollection, *, wrap_with_ddp: bool = False, ddp_config: Any = None
    ) -> list[Any]:
        """`provide`, moved to this rank's GPU where there is one, and wrapped in mcore's DDP if asked to.

        Args:
            pg_collection: groups of the layout that the settings say. Nothing global is read.
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

    def _chunk(self, config: TransformerConfig, groups: ProcessGroupCollection, stage: int) -> GPTModel:
        from megatron.core.models.gpt import GPTModel

        pp, rank, vpp = groups.pp.size(), groups.pp.rank(), self.layout.vpp
        vp_stage = stage if vpp > 1 else None
        arguments = {name: self._settings[name] for name in _MODEL_ARGUMENTS if self._settings.get(name) is not None}
        return GPTModel(
            config,
            _block_spec(self.spec, config, pp_rank=rank, vp_stage=vp_stage),
            vocab_size=self.padded_vocab,
            max_sequence_length=self.seq_length,
            pre_process=rank == 0 and stage == 0,
            post_process=rank == pp - 1 and stage == vpp - 1,
            parallel_output=True,
            pg_collection=groups,
            vp_stage=vp_stage,
            **arguments,
        )


def default_spec() -> Spec:
    """Transformer Engine where it is installed and a GPU is there; the CPU host backend otherwise."""
    from importlib.util import find_spec

    import torch

    if torch.cuda.is_available():
        return "te" if find_spec("transformer_engine") else "local"
    return "host"


def _activation(name: Any) -> Any:
    import torch

    return {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}[name] if isinstance(name, str) else name


def _block_spec(spec: Spec, config: TransformerConfig, *, pp_rank: int, vp_stage: int | None) -> Any:
    """The layer specs of one chunk, from the builder that fits."""
    if spec == "host":
        from bridge_core.runtime.host import host_block_spec

        return host_block_spec(config, pp_rank=pp_rank, vp_stage=vp_stage)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=spec == "te",
        normalization=config.normalization,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
