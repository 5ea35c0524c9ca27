"""The places where megatron-core takes a GPU for granted, and what stands in for each on a CPU.

`PATCHES` is the whole list. Nothing is changed at import; `host_backend` applies the list and takes it
back. Checked with megatron-core 0.16.1 and 0.19.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from importlib import import_module
from threading import RLock
from typing import Any

from bridge_core.extras import require


class HostStream:
    """Stands in for a CUDA stream: work on a CPU is done when its call returns, so nothing waits."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def record_event(self, event: object = None) -> HostEvent:
        """An event that has already happened."""
        return HostEvent()

    def synchronize(self) -> None:
        """Nothing to wait for."""


class HostEvent:
    """Stands in for a CUDA event that has already happened."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        """Already happened."""

    def wait(self, stream: object = None) -> None:
        """Already happened."""

    def synchronize(self) -> None:
        """Already happened."""

    def query(self) -> bool:
        """Always true: already happened."""
        return True


def _cpu(*args: object, **kwargs: object) -> Any:
    import torch

    return torch.device("cpu")


def _itself(tensor: Any, *args: object, **kwargs: object) -> Any:
    return tensor


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _false(*args: object, **kwargs: object) -> bool:
    return False


def _get_rng_state(*args: object, **kwargs: object) -> Any:
    import torch

    return torch.get_rng_state()


def _set_rng_state(state: Any, *args: object, **kwargs: object) -> None:
    import torch

    torch.set_rng_state(state)


def _add_seed(self: Any, name: str, seed: int) -> None:
    """`CudaRNGStatesTracker.add` with a state of the CPU generator."""
    import torch

    self._is_initialized = True
    self.seeds_.add(seed)
    self.states_[name] = torch.Generator().manual_seed(seed).get_state()


@contextmanager
def _fork_rng(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """`CudaRNGStatesTracker.fork` on the CPU generator; a name without a seed keeps the default state."""
    import torch

    if name not in self.states_:
        yield
        return
    before = torch.get_rng_state()
    torch.set_rng_state(self.states_[name])
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(before)


def _causal_mask(sq: int) -> Any:
    import torch

    return torch.ones(sq, sq, dtype=torch.bool).triu(diagonal=1)


def _window_mask(sq: int, skv: int, window_size: tuple[int, int]) -> Any:
    """True where attention is not allowed: outside `window_size` = (left, right) of the diagonal."""
    import torch

    ahead = torch.arange(skv)[None, :] - torch.arange(skv - sq, skv)[:, None]
    return (ahead < -window_size[0]) | (ahead > window_size[1])


def _memory_buffer() -> Callable[[], Any]:
    from megatron.core.utils import GlobalMemoryBuffer

    buffer = GlobalMemoryBuffer()
    return lambda: buffer


def _to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """A tensor as such, or as numpy array: unlike mcore's own also when it is on the CPU already."""
    import torch

    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _duplicated_linear() -> Any:
    from bridge_core.runtime.host.linears import HostDuplicatedLinear

    return HostDuplicatedLinear


def _norm() -> Any:
    from bridge_core.runtime.host.linears import HostNorm

    return HostNorm


def _backend_of_impl() -> Callable[[str], Any]:
    from megatron.core.models.backends import get_backend

    from bridge_core.runtime.host.specs import host_spec_provider

    return lambda impl: host_spec_provider()() if impl == "transformer_engine" else get_backend(impl)


def _recurrence(name: str) -> Callable[[], Any]:
    def make() -> Any:
        from bridge_core.runtime.host import recurrence

        return getattr(recurrence, name)

    return make


def _delta_rule() -> Any:
    from megatron.core.ssm.gated_delta_net.common import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule


@dataclass(frozen=True)
class Patch:
    """One attribute that is replaced while the host backend is active.

    Args:
        where: "module:attribute" or "module:Class.attribute"; skipped where a version has no such module or class.
        make: makes the replacement when the backend is entered.
        reason: what in mcore needs it.
        new: set it also where there was no such attribute; otherwise the patch is skipped there.
    """

    where: str
    make: Callable[[], object]
    reason: str
    new: bool = False


_CORE = "megatron.core"
_DEVICE = "device of parameters, buffers and of the targets of collectives (tensor_parallel, router, rotary embedding)"
_BUFFER = "the buffer exists only after parallel_state was initialised, and groups are arguments here"
_DELTA = f"{_CORE}.ssm.gated_delta_net"
_FLA = "gated delta nets run on flash-linear-attention's CUDA kernels, in 0.19; older versions have no such nets"
_STREAMS = "all-to-all dispatcher and overlapped shared experts make streams when they are built"

PATCHES = (
    Patch("torch.cuda:current_device", lambda: _cpu, _DEVICE),
    Patch("torch.cuda:is_available", lambda: _false, "with a GPU present mcore would move tensors to it"),
    Patch(
        "torch:Tensor.cuda",
        lambda: _itself,
        "tied embeddings go to the GPU before pipeline stages agree on their values",
        new=True,  # inherited from a base that cannot be patched
    ),
    Patch("torch.cuda:synchronize", lambda: _nothing, "dist_checkpointing writers wait for copies from the GPU"),
    Patch("torch.cuda:Stream", lambda: HostStream, _STREAMS),
    Patch("torch.cuda:Event", lambda: HostEvent, _STREAMS),
    Patch("torch.cuda:current_stream", lambda: HostStream, _STREAMS),
    Patch("torch.cuda:stream", lambda: nullcontext, _STREAMS),
    Patch(
        f"{_CORE}.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.cuda_dtoh_stream",
        HostStream,
        "a class attribute that outlives the model, and would keep a stand-in after exit",
    ),
    Patch(
        f"{_CORE}.transformer.moe.shared_experts:SharedExpertMLP.stream",
        HostStream,
        "a class attribute that outlives the model, and would keep a stand-in after exit",
    ),
    Patch(
        f"{_CORE}.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        lambda: _to_cpu,
        "all-to-all split sizes stay a tensor when they are on the CPU, and torch refuses them",
    ),
    Patch(f"{_CORE}.tensor_parallel.random:CudaRNGStatesTracker.add", lambda: _add_seed, "seeds a CUDA generator"),
    Patch(f"{_CORE}.tensor_parallel.random:CudaRNGStatesTracker.fork", lambda: _fork_rng, "dropout in attention"),
    Patch(f"{_CORE}.tensor_parallel.random:_get_cuda_rng_state", lambda: _get_rng_state, "activation recomputation"),
    Patch(f"{_CORE}.tensor_parallel.random:_set_cuda_rng_state", lambda: _set_rng_state, "activation recomputation"),
    Patch(f"{_CORE}.fusions.fused_softmax:get_default_causal_mask", lambda: _causal_mask, 'made on "cuda"'),
    Patch(f"{_CORE}.fusions.fused_softmax:get_sliding_window_causal_mask", lambda: _window_mask, 'made on "cuda"'),
    Patch(f"{_CORE}.parallel_state:get_global_memory_buffer", _memory_buffer, _BUFFER),
    Patch(f"{_CORE}.tensor_parallel.layers:get_global_memory_buffer", _memory_buffer, _BUFFER),
    Patch(f"{_CORE}.tensor_parallel.mappings:get_global_memory_buffer", _memory_buffer, _BUFFER),
    Patch(
        f"{_CORE}.transformer.moe.moe_utils:te_general_gemm",
        lambda: None,
        "0.16.1 leaves the name undefined without Transformer Engine, and the router then reads it",
        new=True,
    ),
    Patch(
        f"{_CORE}.transformer.multi_latent_attention:TELinear",
        _duplicated_linear,
        "latent attention picks the arguments of its down projections by this very class",
    ),
    Patch(
        f"{_CORE}.transformer.mla_qk_norm_config:get_backend",
        _backend_of_impl,
        "0.19 latent attention takes its fused projections from the configured backend, not from the spec",
    ),
    Patch(f"{_CORE}.models.hybrid.hybrid_block:TENorm", _norm, "a hybrid stack makes its final norm itself"),
    Patch(
        f"{_CORE}.transformer.moe.moe_layer:TELinear", _duplicated_linear, "latent experts project by this very class"
    ),
    Patch(f"{_CORE}.transformer.moe.moe_layer:HAVE_TE", lambda: True, "latent experts are refused otherwise"),
    Patch(f"{_DELTA}.common:HAVE_FLA", lambda: True, _FLA),
    Patch(f"{_DELTA}.common:l2norm", _recurrence("l2norm"), _FLA),
    Patch(f"{_DELTA}.gdn:causal_conv1d", _recurrence("causal_conv1d"), _FLA),
    Patch(f"{_DELTA}.gdn:chunk_gated_delta_rule", _delta_rule, _FLA),
)

_lock = RLock()
_depth = 0
_undo = ExitStack()


@contextmanager
def host_backend(*, force: bool = False) -> Iterator[bool]:
    """Let megatron-core models be built, run, trained and checkpointed on a CPU while this is active.

    Everything from the model's construction to its last backward belongs inside. On exit every patched
    attribute has its old value again. May be nested; the outermost one decides. The patches are
    process-wide: other threads see them too.

    On a machine with CUDA this does nothing, unless `force` is true: then the model stays on the CPU there.

    Functions that mcore compiles with `torch.compile` run uncompiled in here: no C++ compiler is needed.

    Args:
        force: also on a machine with CUDA.

    Yields:
        Whether the patches are in place.

    Raises:
        MissingExtraError: megatron-core is not installed.
    """
    global _depth
    require("megatron.core", extra="mcore")
    import torch

    with _lock:
        active = _depth > 0 or force or not torch.cuda.is_available()
        if active and _depth == 0:
            _apply(_undo)
        _depth += active
    try:
        yield active
    finally:
        with _lock:
            _depth -= active
            if active and _depth == 0:
                _undo.close()


def _apply(undo: ExitStack) -> None:
    """Put every patch in place; `undo` takes them back in reverse order."""
    import torch

    with ExitStack() as done:
        for patch in PATCHES:
            owner, name = _owner(patch.where)
            if owner is None or not (patch.new or name in vars(owner)):
                continue
            if name in vars(owner):
                # vars and not getattr: a descriptor must be put back as it was, not what it gives.
                done.callback(setattr, owner, name, vars(owner)[name])
            else:
                done.callback(delattr, owner, name)
            setattr(owner, name, patch.make())
        done.enter_context(torch.compiler.set_stance("force_eager"))
        undo.push(done.pop_all().__exit__)


def _owner(where: str) -> tuple[Any, str]:
    """The module or class that holds the attribute, or None where this version has none, and its name."""
    module, _, path = where.partition(":")
    *classes, name = path.split(".")
    try:
        owner: Any = import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # it, or a package that it is in
            raise
        return None, name
    for part in classes:
        owner = getattr(owner, part, None)
    return owner, name


def cpu_friendly(config_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a `TransformerConfig` must say on a CPU, for a configuration that says `config_kwargs`.

    Args:
        config_kwargs: fields of `TransformerConfig` as they would be on a GPU.

    Returns:
        Fields that override or extend them (`config_kwargs | cpu_friendly(config_kwargs)`), limited to those
        that the installed mcore knows. No numerics change except the order of additions.

    Raises:
        MissingExtraError: megatron-core is not installed.
    """
    require("megatron.core", extra="mcore")
    from megatron.core.transformer.transformer_config import TransformerConfig

    overrides: dict[str, Any] = {"use_cpu_initialization": True}
    # Fused kernels exist for CUDA only.
    overrides |= dict.fromkeys(
        (
            "apply_rope_fusion",
            "bias_activation_fusion",
            "bias_dropout_fusion",
            "cross_entropy_loss_fusion",
            "gradient_accumulation_fusion",
            "masked_softmax_fusion",
            "moe_permute_fusion",
            "moe_router_fusion",
            "moe_shared_expert_overlap",
            "persist_layer_norm",
            "tp_comm_overlap",
            "use_fused_weighted_squared_relu",
            "use_te_activation_func",
        ),
        False,
    )
    if config_kwargs.get("num_moe_experts") is not None:
        overrides["moe_token_dispatcher_type"] = config_kwargs.get("moe_token_dispatcher_type", "allgather")
        if overrides["moe_token_dispatcher_type"] == "flex":
            overrides["moe_token_dispatcher_type"] = "alltoall"  # DeepEP is CUDA only
        if config_kwargs.get("tensor_model_parallel_size", 1) > 1:
            overrides["sequence_parallel"] = True  # mcore asserts it when a MoE layer trains with TP
    known = {field.name for field in fields(TransformerConfig)}
    return {name: value for name, value in overrides.items() if name in known}
