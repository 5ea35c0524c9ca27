"""`AutoBridge`: the one object most users meet. It finds the family of a model and does the rest by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bridge_core.checkpoint.hf_folder import HfFolder, open_hf, read_config
from bridge_core.codecs import codec_of
from bridge_core.dtypes import dtype_of
from bridge_core.errors import ConfigError
from bridge_core.families import Family, Fields, all_families, family_for
from bridge_core.plan import Plan, check_ignored
from bridge_core.topology import ParallelLayout

if TYPE_CHECKING:
    # Planning alone does without the machinery that moves bytes.
    from bridge_core.checkpoint.convert import Report
    from bridge_core.runtime.describe import LocalShard, M2NEntry, WeightSource
    from bridge_core.runtime.live import LiveModel
    from bridge_core.runtime.load import LoadReport
    from bridge_core.runtime.megatron_ckpt import MegatronReport
    from bridge_core.runtime.provider import Provider, Spec
    from bridge_core.runtime.save import SaveReport
    from bridge_core.runtime.stream import Pass, Stream


class AutoBridge:
    """A model's way between Hugging Face and Megatron-Core.

    Make one with `from_hf_pretrained` (a folder) or `from_hf_config` (a configuration alone).

    Attributes:
        config: the HF configuration, as config.json has it.
        family: the model family that was found for it.
        fields: the model's Megatron fields (`TransformerConfig` fields and what `GPTModel` takes beside them).
        path: the HF folder, or None.
        ignore: patterns (as in a shell) of HF names that are left out.
        codec: the form in which the HF checkpoint stores quantised weights; None for plain weights.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        path: Path | None = None,
        ignore: Sequence[str] = (),
        ignore_options: Sequence[str] = (),
    ) -> None:
        self.config = dict(config)
        self.path = path
        self.ignore = tuple(ignore)
        self.family: Family = family_for(self.config)
        self.codec = codec_of(self.config)
        self._live_plans: dict[bool, dict[Any, Any]] = {False: {}, True: {}}  # by whether fp8 was asked for
        whole = self.family.to_megatron(self.config, ignore=ignore_options)
        folder = self._weights if self.family.unsaid_mtp or ignore else None
        check_ignored(self.family, whole, self.ignore, folder.tensors if folder else ())
        self.fields: Fields = self.family.without(whole, self.ignore, folder.tensors if folder else None)

    @classmethod
    def from_hf_pretrained(
        cls, path: str | Path, *, ignore: Sequence[str] = (), ignore_options: Sequence[str] = ()
    ) -> Self:
        """A bridge for the model in an HF folder. Only config.json is read here, and at need the names of tensors.

        Args:
            path: HF folder.
            ignore: patterns (as in a shell) of HF names to leave out: `mtp.*`, `model.visual.*`. Reports name them.
            ignore_options: options of config.json to leave out of account although the family does not know them.

        Raises:
            CheckpointError: there is no such folder, or it has no config.json.
            ConfigError: the architecture or an option of it is not known.
        """
        folder = Path(path)
        config = read_config(folder)
        where = folder if folder.is_dir() else folder.parent
        return cls(config, path=where, ignore=ignore, ignore_options=ignore_options)

    @classmethod
    def from_hf_config(cls, config: Any, *, ignore: Sequence[str] = (), ignore_options: Sequence[str] = ()) -> Self:
        """A bridge for a configuration without weights: a dict, or a transformers `PretrainedConfig`."""
        if not isinstance(config, Mapping):
            if not hasattr(config, "to_diff_dict"):
                raise ConfigError(
                    "not an HF configuration",
                    expected="a dict, or a transformers PretrainedConfig",
                    got=type(config).__name__,
                )
            config = {"architectures": config.architectures or [], **config.to_dict()}
        return cls(config, ignore=ignore, ignore_options=ignore_options)

    @staticmethod
    def list_supported_models() -> list[str]:
        """Architectures that a family of this installation handles."""
        return sorted({name for family in all_families() for name in family.architectures})

    @staticmethod
    def supports(config: Mapping[str, Any]) -> bool:
        """Whether a family handles the architecture of a configuration."""
        return bool(set(config.get("architectures") or ()) & set(AutoBridge.list_supported_models()))

    def plan(self, layout: ParallelLayout | None = None, *, make_vocab_size_divisible_by: int = 1) -> Plan:
        """Which part of which HF tensor every rank of `layout` holds. Needs no weights.

        Where the bridge was made from a folder with weights, the plan has their dtypes.

        Raises:
            LayoutError: the layout does not divide the model; says the numbers.
        """
        return Plan(
            self.family,
            self.fields,
            layout or ParallelLayout(),
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            **self._plan_options(),
        )

    def _plan_options(self) -> dict[str, Any]:
        """What a plan is told of the HF side."""
        folder = self._weights
        return {
            "dtype": self.dtype,
            "dtypes": {name: tensor.dtype for name, tensor in folder.tensors.items()} if folder else {},
            "inventory": folder.shapes if folder else None,
            "ignore": self.ignore,
            "codec": folder.codec if folder else self.codec,
            "quantised": folder.quantised if folder else None,
        }

    @property
    def dtype(self) -> str:
        """The model's dtype as config.json has it, by its safetensors name; BF16 if it says none."""
        return dtype_of(str(self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16")).name

    @cached_property
    def _weights(self) -> HfFolder | None:
        """The bridge's own folder, if it holds weights; its headers are read once."""
        if self.path is None or not any(self.path.glob("*.safetensors")):
            return None
        return open_hf(self.path)

    @staticmethod
    def import_ckpt(hf_path: str | Path, megatron_path: str | Path, **options: Any) -> Report:
        """Convert an HF folder to a Megatron torch_dist folder, offline. See `checkpoint.convert.import_ckpt`.

        Keyword options are those of `Options` (`dtype`, `overwrite`, `threads`, `workers`, `progress`) and
        `ignore_options`.
        """
        from bridge_core.checkpoint import convert

        run, rest = convert.Options.of(options)
        return convert.import_ckpt(hf_path, megatron_path, options=run, **rest)

    def export_ckpt(self, megatron_path: str | Path, hf_path: str | Path, **options: Any) -> Report:
        """Convert a Megatron torch_dist folder to an HF folder, offline. See `checkpoint.convert.export_ckpt`.

        The bridge's own folder, if it holds weights, gives the file layout, config.json and other files.
        """
        from bridge_core.checkpoint import convert

        run, rest = convert.Options.of(options)
        source = self.path if self._weights else None
        given: dict[str, Any] = {"source": source, "ignore": self.ignore}
        if source is None:
            given["hf_config"] = self.config
        return convert.export_ckpt(megatron_path, hf_path, options=run, **{**given, **rest})

    # --- Live models ---------------------------------------------------------------------------

    def to_megatron_provider(self, *, spec: Spec | None = None) -> Provider:
        """Settings of the Megatron model, to be changed and then built (`provide_distributed_model`).

        Args:
            spec: `"te"`, `"local"` or `"host"`; by default what fits the machine.
        """
        from bridge_core.runtime.provider import Provider

        return Provider(self.fields, spec=spec)

    def load_hf_weights(self, model: Any, path: str | Path | None = None, **options: Any) -> LoadReport:
        """Fill a live model from this bridge's folder, or `path`. Collective; see `runtime.load.load_hf_weights`."""
        from bridge_core.runtime.load import load_hf_weights

        return load_hf_weights(
            model, self._folder(path), self.family, self.fields, **{"ignore": self.ignore, **options}
        )

    def save_hf_pretrained(self, model: Any, path: str | Path, **options: Any) -> SaveReport:
        """Write a live model as an HF folder. Collective; see `runtime.save.save_hf_pretrained`.

        The bridge's own folder, if it holds weights, says how they are split into files.
        """
        from bridge_core.runtime.save import save_hf_pretrained

        given = {
            "config": self.config,
            "source": self.path if self._weights else None,
            "ignore": self.ignore,
        }
        return save_hf_pretrained(model, path, self.family, self.fields, **(given | options))

    def save_megatron_model(self, model: Any, path: str | Path, **options: Any) -> MegatronReport:
        """Write a live model as a Megatron checkpoint. Collective.

        See `runtime.megatron_ckpt.save_megatron_model`.
        """
        from bridge_core.runtime.megatron_ckpt import save_megatron_model

        given: dict[str, Any] = {"hf_config": self.config, "ignore": self.ignore}
        return save_megatron_model(model, path, self.family, self.fields, **(given | options))

    def load_megatron_model(self, model: Any, path: str | Path, **options: Any) -> MegatronReport:
        """Fill a live model from a Megatron checkpoint of any layout. Collective.

        See `runtime.megatron_ckpt.load_megatron_model`.
        """
        from bridge_core.runtime.megatron_ckpt import load_megatron_model

        return load_megatron_model(model, path, self.family, self.fields, **{"ignore": self.ignore, **options})

    def stream(self, model: Any, *, groups: Any = None, fp8: bool = False, **options: Any) -> Stream:
        """The export of a live model, planned once for many passes. Collective. See `runtime.stream.Stream`.

        Args:
            model: chunks of this rank, wrapped or not.
            groups: process groups of the model; by default those it was built with.
            fp8: quantise what the bridge's own folder, or the family's fp8 checkpoints, have in fp8; each such weight
                is followed by its scales.
            options: `group`, `dtype`, `bucket_bytes` and `names` of a `Stream`.

        Raises:
            BridgeError: on every rank: the model does not fit the bridge, or ranks ask for different things.
        """
        from bridge_core.checkpoint.workers import jointly
        from bridge_core.runtime.agreement import check_size
        from bridge_core.runtime.stream import Stream
        from bridge_core.runtime.words import default_group
        from bridge_core.runtime.workers import TorchWorkers

        group = options.get("group") or default_group()
        check_size(model, groups, group)
        workers = TorchWorkers(group)
        return Stream(jointly(workers, lambda: self._live(model, groups, fp8=fp8)), **options)

    def export_hf_weights(self, model: Any, *, cpu: bool = False, **options: Any) -> Pass:
        """Every HF tensor of a live model as (name, tensor), in one order on all ranks. Collective, lazy.

        Used in a `with`, it tells all ranks the error of a loop's body (see `runtime.stream.Pass`).

        Args:
            model: chunks of this rank, wrapped or not.
            cpu: give tensors in host memory.
            options: those of `stream`. Plans are kept by the bridge: a second call makes none. A kept `stream` also
                need not match the model and compare its dtypes again.
        """
        from bridge_core.runtime.stream import exported

        return exported(lambda: self.stream(model, **options), cpu=cpu)

    def iter_local_shards(self, model: Any, *, groups: Any = None) -> Iterator[LocalShard]:
        """What this rank holds of which HF tensor, as views. Not collective: nothing is communicated.

        See `runtime.describe.iter_local_shards`.
        """
        from bridge_core.runtime.describe import iter_local_shards

        return iter_local_shards(self._live(model, groups))

    def m2n_entries(self, model: Any, *, groups: Any = None) -> list[M2NEntry]:
        """A manifest entry per HF tensor that this rank holds a part of. See `runtime.describe.m2n_entries`."""
        from bridge_core.runtime.describe import m2n_entries

        return m2n_entries(self._live(model, groups))

    def weight_source(self, model: Any, *, cpu: bool = False, **options: Any) -> WeightSource:
        """A live model as vLLM's `WeightSource` protocol has it. Collective. See `runtime.describe.WeightSource`.

        Args:
            model: chunks of this rank, wrapped or not.
            cpu: give tensors in host memory.
            options: those of `stream`.
        """
        from bridge_core.runtime.describe import WeightSource

        return WeightSource(self.stream(model, **options), cpu=cpu)

    def _live(self, model: Any, groups: Any, *, fp8: bool = False) -> LiveModel:
        from bridge_core.checkpoint.convert import codec_options
        from bridge_core.runtime.live import open_live

        folder = self._weights
        return open_live(
            model,
            self.family,
            self.fields,
            groups=groups,
            inventory=folder.shapes if folder else None,  # names are those of the bridge's own folder
            ignore=self.ignore,
            known=self._live_plans[fp8],
            **codec_options(fp8, folder),
        )

    def _folder(self, path: str | Path | None) -> Path:
        if path is None and self.path is None:
            raise ConfigError(
                "there is no HF folder to read weights from",
                where="a bridge made from a configuration alone",
                fix="pass the folder, or make the bridge with from_hf_pretrained",
            )
        return Path(path or self.path or "")

    def __repr__(self) -> str:
        return f"AutoBridge({self.family.name}, {self.path or 'configuration only'})"
