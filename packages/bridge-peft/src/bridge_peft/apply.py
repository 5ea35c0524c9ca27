"""Put adapters on a live model: freeze the base, wrap what matches, say what was done."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bridge_core.errors import ConfigError, preview
from bridge_core.extras import require
from bridge_peft.config import CHANGES_BASE, LoraConfig
from bridge_peft.dtypes import torch_dtype
from bridge_peft.targets import check_used, match

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bridge_peft.layers.adapter import LoraAdapter
    from bridge_peft.layers.sites import Site

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Adapted:
    """One adapted layer on this rank: its name in the whole model, mode, r, scaling, parts, elements held here."""

    name: str
    mode: str
    r: int
    scaling: float
    parts: tuple[str, ...]
    elements: int


@dataclass(frozen=True)
class LoraReport:
    """What `apply_lora` did on this rank.

    Attributes:
        adapter: its name.
        adapted: every adapted layer.
        skipped: layers that could carry an adapter and were not meant.
        trainable, frozen: elements of parameters on this rank.
    """

    adapter: str
    adapted: tuple[Adapted, ...]
    skipped: tuple[str, ...]
    trainable: int
    frozen: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(1, self.trainable + self.frozen)
        lines = [
            f"adapter {self.adapter!r}: {len(self.adapted)} layers adapted, {len(self.skipped)} left alone; "
            f"{self.trainable:,} of {self.trainable + self.frozen:,} elements are trained ({share:.3g} %)"
        ]
        for entry in self.adapted:
            parts = f" ({', '.join(entry.parts)})" if entry.parts else ""
            lines.append(f"  {entry.name}{parts}: {entry.mode}, r={entry.r}, scaling={entry.scaling:g}")
        return "\n".join(lines)


def apply_lora(model: Any, config: LoraConfig, groups: Any = None, *, adapter_name: str = "default") -> LoraReport:
    """Freeze a model and add an adapter to each of its linear layers that the configuration means.

    Call it on the bare model, before DDP and the optimizer are made (they look at which parameters are
    trained), and before or after ModelOpt quantises it. A second call with another name adds a second adapter,
    which becomes the active one. Either all layers get their adapter or, after an error, none.

    Collective: every rank of the model calls it with the same arguments. Ranks of a pipeline agree on which
    patterns fit something; magnitudes of DoRA and decompositions need the ranks that cut a layer.

    Args:
        model: a `GPTModel`, or the list of its chunks under virtual pipelining.
        config: what to adapt, and how.
        groups: mcore's `ProcessGroupCollection` of the model; by default the one that it was built with.
        adapter_name: letters, digits, `_` and `-`.

    Raises:
        ConfigError: a pattern fits nothing, the name is taken, the model is wrapped already, or a layer is of a form
            that the configuration does not go with.
        LayoutError: a layer does not divide by the ranks that cut it.
        WorkerError: a layer of another pipeline stage is of such a form; or a rank is gone (`LostWorkerError`).
    """
    require("megatron.core", extra="mcore", package="bridge-peft")
    from bridge_core.runtime.homes import unwrap
    from bridge_peft.layers.sites import sites

    _check_name(adapter_name)
    _check_unwrapped(model)
    chunks = unwrap(model)
    groups = chunks[0].pg_collection if groups is None else groups
    _check_chunks(chunks)
    found = [(chunk, site) for chunk in chunks for site in sites(chunk, groups)]
    matches = match(config, {site.name: [part.name for part in site.linear.parts] for _, site in found})
    used, names = _agreed(groups, matches.used, [site.name for _, site in found])
    check_used(config, used, names)
    meant = [(chunk, site) for chunk, site in found if site.name in matches.parts]

    def check() -> None:
        for _, site in meant:
            _check_site(site, config, matches.parts[site.name], adapter_name)

    _together(groups, check)
    _add(meant, matches.parts, config, adapter_name)
    for chunk in chunks:
        _freeze(chunk, adapter_name)
        _keep_recomputation_alive(chunk)
    return _report(chunks, meant, [site.name for _, site in found], config, matches.parts, adapter_name)


def _add(meant: list[tuple[nn.Module, Site]], parts: Any, config: LoraConfig, name: str) -> None:
    """Make the adapters, set their values, and join them to their layers."""
    from bridge_core.runtime.workers import noticing_loss
    from bridge_peft.init import initialise
    from bridge_peft.layers.adapter import LoraAdapter
    from bridge_peft.layers.attach import attach

    made: list[tuple[Site, LoraAdapter]] = []
    first: dict[str, LoraAdapter] = {}
    for chunk, site in meant:
        adapter = LoraAdapter(site, _settings(site, config, parts[site.name]), device=_device(chunk, site))
        owner = first.setdefault(site.name, adapter)
        if owner is not adapter:  # another expert of the same layer: what they share is one parameter
            for key, factor in adapter.factors.items():
                if factor.shared:
                    adapter.register_parameter(key, owner.get_parameter(key))
        made.append((site, adapter))
    with noticing_loss():
        initialise([(name, adapter) for _, adapter in made], config)
    for site, adapter in made:
        adapters = attach(site)
        adapters[name] = adapter
        adapters.active = (name,)
        adapter.train(site.module.training)


def _settings(site: Site, config: LoraConfig, parts: tuple[str, ...]) -> Any:
    from bridge_peft.layers.adapter import Settings

    return Settings(
        rank=config.rank(site.name),
        alpha=config.alpha(site.name),
        rslora=config.use_rslora,
        dropout=config.lora_dropout,
        dtype=_dtype(site, config),
        keep_dtype=config.lora_dtype is not None,
        parts=parts,
        dora=config.use_dora,
        sharing=config.expert_adapters,
        changes_base=config.lora_init_method in CHANGES_BASE,
    )


def _dtype(site: Site, config: LoraConfig) -> torch.dtype:
    """The dtype that is asked for, or that of the layer; a packed weight has none, its model has."""
    import torch

    if config.lora_dtype is not None:
        return torch_dtype(config.lora_dtype)
    if site.normed:
        return site.module.layer_norm_weight.dtype  # type: ignore[union-attr, return-value]
    stored = next((p.dtype for p in site.module.parameters(recurse=False) if p.dtype in _FLOATS()), None)
    return stored or getattr(getattr(site.module, "config", None), "params_dtype", torch.float32)


def _FLOATS() -> tuple[torch.dtype, ...]:  # noqa: N802 - a constant that needs torch
    import torch

    return torch.bfloat16, torch.float16, torch.float32


def _device(chunk: nn.Module, site: Site) -> torch.device:
    """That of the layer; a tied output layer has no parameter, and is called with one of its chunk's: the embedding."""
    import torch

    parameters = (*site.module.parameters(), *chunk.parameters())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "an adapter cannot have this name",
            where="adapter_name",
            expected="letters, digits, _ and -",
            got=repr(name),
            fix='choose another, for example "default"',
        )


def _check_unwrapped(model: Any) -> None:
    """DDP has made its buffers for the parameters that it found; new ones would never be reduced."""
    for chunk in model if isinstance(model, list | tuple) else [model]:
        while chunk is not None:
            if hasattr(chunk, "ddp_config"):
                raise ConfigError(
                    "adapters come before DDP",
                    where=type(chunk).__name__,
                    expected="a model that is not wrapped for data parallelism",
                    got="one whose gradient buffers are made already",
                    fix="call apply_lora first, then wrap the model and make the optimizer",
                )
            chunk = getattr(chunk, "module", None)


def _check_chunks(chunks: Iterable[Any]) -> None:
    for chunk in chunks:
        if getattr(chunk.config, "use_transformer_engine_op_fuser", False):
            raise ConfigError(
                "fused operations pass by the layers that adapters sit on",
                where="use_transformer_engine_op_fuser",
                expected="False",
                got="True",
                fix="switch it off for training with adapters",
            )


def _check_site(site: Site, config: LoraConfig, parts: tuple[str, ...], name: str) -> None:
    from bridge_peft.init import check_method

    taken: Any = site.module._modules.get("adapter")
    if taken is not None and name in taken:
        raise ConfigError(
            "a layer has an adapter of this name already",
            where=site.name,
            expected="a new name",
            got=repr(name),
            fix="pass another adapter_name, or delete_adapter first",
        )
    leaf = site.name.rpartition(".")[2]
    if leaf == "in_proj" and site.size > 1:
        # Each rank holds a part of every segment (megatron-core 0.19, ssm/gated_delta_net/gdn.py, ssm/mamba_mixer.py),
        # so the rows of B on two ranks are not two halves of the whole's: a checkpoint would mix segments up.
        raise ConfigError(
            "the segments of a recurrent layer's projection are cut one by one, which adapters do not follow",
            where=site.name,
            expected="tensor-parallel size 1",
            got=site.size,
            fix='leave the layer out (exclude_modules=["*in_proj"]), or train with tensor_model_parallel_size=1',
        )
    fused = leaf in ("linear_qkv",) or (leaf == "linear_fc1" and site.linear.blocks == 2)
    if config.variant == "canonical" and fused and not parts:
        raise ConfigError(
            "the parts of a fused layer are not known",
            where=site.name,
            expected="queries, keys and values of [out] = heads + 2 * groups, times the head size",
            got=f"{site.linear.out_features} rows",
            fix='variant="lora" adapts the fused layer as a whole',
        )
    if config.use_dora or config.lora_init_method != "kaiming_zeros":
        site.weights()  # refuses a layer without a weight of its own
    check_method(site, config.lora_init_method)


def _agreed(
    groups: Any, used: Iterable[tuple[str, str]], names: Iterable[str]
) -> tuple[set[tuple[str, str]], set[str]]:
    """What all pipeline stages found: a pattern may fit on another stage only."""
    pp = getattr(groups, "pp", None)
    if pp is None or pp.size() == 1:
        return set(used), set(names)
    from bridge_core.runtime.workers import TorchWorkers

    said = TorchWorkers(pp).share([sorted(used), sorted(names)])
    patterns = {(field, pattern) for theirs, _ in said for field, pattern in theirs}
    return patterns, {name for _, theirs in said for name in theirs}


def _together(groups: Any, check: Callable[[], None]) -> None:
    """Run `check` on every pipeline stage; an error on one is raised on all, before any has changed its part."""
    from bridge_core.checkpoint.workers import Alone
    from bridge_core.runtime.workers import TorchWorkers

    pp = getattr(groups, "pp", None)
    workers = Alone() if pp is None or pp.size() == 1 else TorchWorkers(pp)
    workers.together(check)


def _freeze(chunk: nn.Module, name: str) -> None:
    """Only the factors of the named adapter are trained."""
    for path, parameter in chunk.named_parameters():
        parameter.requires_grad_(f".adapter.{name}." in f".{path}")


def _keep_recomputation_alive(chunk: Any) -> None:
    """Let gradients through recomputed layers although nothing before them is trained.

    mcore's `tensor_parallel.checkpoint` is one node of the graph, and has a gradient only if its input asks
    for one. A frozen embedding does not.
    """
    embedding = getattr(chunk, "embedding", None)
    if embedding is None or getattr(chunk.config, "recompute_granularity", None) is None:
        return
    if not any(hook is _ask_for_gradient for hook in embedding._forward_hooks.values()):
        embedding.register_forward_hook(_ask_for_gradient)


def _ask_for_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    import torch

    if torch.is_grad_enabled() and module.training and not output.requires_grad:
        output.requires_grad_()


def _report(
    chunks: list[Any],
    meant: list[tuple[Any, Site]],
    names: list[str],
    config: LoraConfig,
    parts: Any,
    adapter: str,
) -> LoraReport:
    elements: Callable[[Iterable[Any]], int] = lambda tensors: sum(t.numel() for t in tensors)  # noqa: E731
    adapted = {}
    for _, site in meant:
        own = elements(site.module._modules["adapter"][adapter].parameters())  # type: ignore[index]
        before = adapted[site.name].elements if site.name in adapted else 0
        adapted[site.name] = Adapted(
            site.name,
            site.linear.mode,
            config.rank(site.name),
            config.scaling(site.name),
            parts[site.name],
            before + own,
        )
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    return LoraReport(
        adapter,
        tuple(adapted.values()),
        tuple(dict.fromkeys(name for name in names if name not in adapted)),
        trainable=elements(p for p in parameters if p.requires_grad),
        frozen=elements(p for p in parameters if not p.requires_grad),
    )


def adapters_named(model: Any, names: Iterable[str]) -> list[Any]:
    """The adapters (`layers.attach.Adapters`) of every layer that has one of these names.

    Raises:
        ConfigError: a name that no layer has.
    """
    from bridge_core.runtime.homes import unwrap
    from bridge_peft.layers.attach import adapters_of

    found = [adapters for chunk in unwrap(model) for _, adapters in adapters_of(chunk)]
    known = {name for adapters in found for name in adapters}
    if unknown := sorted(set(names) - known):
        raise ConfigError(
            "the model has no adapter of this name",
            where="adapter name",
            expected=preview(sorted(known)) or "none: apply_lora was not called",
            got=", ".join(map(repr, unknown)),
            fix="see the report of apply_lora",
        )
    return found
