"""What ranks are watched for while a job runs: reads of files, and writes to Megatron's global state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import patch

Read = tuple[str, int, int]
"""File, first byte, number of bytes."""


@contextmanager
def reads() -> Iterator[list[Read]]:
    """The runs of bytes that are asked of files of weights, as they are read."""
    from bridge_core.checkpoint.reading import Reader
    from bridge_core.dtypes import dtype_of
    from bridge_core.geometry import runs

    found: list[Read] = []
    read = Reader._read

    def watched(self, stored, target, piece):
        size = dtype_of(stored.dtype).itemsize
        found.extend((stored.path, stored.offset + run.source * size, run.length * size) for run in runs(piece))
        return read(self, stored, target, piece)

    with patch.object(Reader, "_read", watched):
        yield found


@contextmanager
def frozen_parallel_state() -> Iterator[None]:
    """Nobody sets mcore's global parallel state, not for a moment: neither its functions nor others by assignment."""
    from megatron.core import parallel_state

    before = _globals(parallel_state)

    class Frozen(ModuleType):
        def __setattr__(self, name, value):
            if name.isupper():  # a variable; functions are exchanged by the CPU host backend, and poisoned by tests
                raise AssertionError(f"parallel_state.{name} was assigned")
            super().__setattr__(name, value)

    def refused(*args, **kwargs):
        raise AssertionError("mcore's global parallel state was set")

    setters = [n for n in vars(parallel_state) if n.startswith(("set_", "initialize_", "destroy_"))]
    originals = {name: getattr(parallel_state, name) for name in setters}
    for name in setters:
        setattr(parallel_state, name, refused)
    parallel_state.__class__ = Frozen
    try:
        yield
    finally:
        parallel_state.__class__ = ModuleType
        for name, function in originals.items():
            setattr(parallel_state, name, function)
    assert before == _globals(parallel_state)


def _globals(module: ModuleType) -> dict[str, int]:
    """Which objects the module's global variables are."""
    return {name: id(value) for name, value in vars(module).items() if name.isupper()}


@contextmanager
def context_parallel_without_te() -> Iterator[None]:
    """mcore's own attention can be built with context parallelism, although it cannot compute so."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    build = DotProductAttention.__init__

    def built(self, config, *args, **kwargs):
        size, config.context_parallel_size = config.context_parallel_size, 1
        try:
            build(self, config, *args, **kwargs)
        finally:
            config.context_parallel_size = size

    with patch.object(DotProductAttention, "__init__", built):
        yield
