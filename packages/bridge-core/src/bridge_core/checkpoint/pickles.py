"""Pickles that are read without running them, and written without having the classes they name.

Reading. Unpickling is dangerous because a pickle may fetch any global of the process and call it. Here the only
globals that a pickle can obtain are stand-ins made for that one purpose: a class that remembers its name, the arguments
it was called with and the state it was given, and does nothing else. Two modes:

- strict: only names that the caller listed; any other one raises. For formats whose classes are known.
- inert: any name becomes a stand-in. For what users put into a checkpoint beside its tensors.

Writing. A pickle is a program for a stack machine; a fixed structure needs only a dozen of its instructions. Each
function below returns the instructions that leave one value on the stack, so values compose by concatenation,
repeated parts are computed once, and no class has to be importable here.
Opcodes: CPython `Lib/pickletools.py`, protocol 2.
"""

from __future__ import annotations

import gc
import io
import pickle
import reprlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from bridge_core.errors import CheckpointError, UnsafeCheckpointError

# What CPython's unpickler raises on bytes that are not a well-formed pickle (`Modules/_pickle.c`, 3.11-3.14).
_MALFORMED = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,
    RecursionError,
    struct.error,
)


class _Sealed(type):
    """Metaclass of stand-ins: a pickle may aim its BUILD instruction at a class, which must not change it."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError(f"{cls.__name__} is sealed")


_NO_KWARGS: Mapping[str, Any] = MappingProxyType({})


class Inert(metaclass=_Sealed):
    """What a pickle wanted to make out of a global: the name, the arguments and the state, and nothing done with them.

    Attributes:
        NAME: module and qualified name of the global, joined by a dot.
        args, kwargs: arguments of the call or of the constructor.
        state: what the object's `__setstate__` would have received, or None.
        items: what was appended, added or set on it (pairs for a mapping), for objects that subclass containers.
    """

    __slots__ = ("args", "items", "kwargs", "state")
    NAME: ClassVar[str] = ""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = object.__new__(cls)
        self.args = args
        self.kwargs = kwargs or _NO_KWARGS
        self.state = None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        # Reached when a pickle calls what a former call returned, e.g. a functools.partial.
        return _stand_in(f"{self.NAME}()")(self, *args, **kwargs)

    def append(self, value: Any) -> None:
        self.extend([value])

    def extend(self, values: Iterable[Any]) -> None:
        if not hasattr(self, "items"):
            self.items = []
        self.items.extend(values)

    add = append

    def __setitem__(self, key: Any, value: Any) -> None:
        self.extend([(key, value)])

    @property
    def fields(self) -> dict[str, Any]:
        """The attributes that the object would have had, as far as the pickle says so in the default ways."""
        if type(self.state) is dict:
            return self.state
        parts = self.state if isinstance(self.state, tuple) else ()
        return {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}

    def __repr__(self) -> str:
        named = {**self.kwargs, **self.fields}
        inside = [*map(describe, self.args), *(f"{key}={describe(value)}" for key, value in named.items())]
        return f"<{self.NAME}({', '.join(inside)})>"


class _Brief(reprlib.Repr):
    """Cuts off long and deep values, so that a message about a hostile pickle stays short."""

    def repr_instance(self, x: Any, level: int) -> str:
        return f"<{x.NAME}>" if isinstance(x, Inert) else super().repr_instance(x, level)


def describe(value: object) -> str:
    """One short line about a value from a pickle, for messages."""
    return _BRIEF.repr(value)


_BRIEF = _Brief()


class StorageRef(NamedTuple):
    """A tensor's storage as `torch.save` names it in place of its bytes.

    `kind` is the global of the storage class, `key` the record `data/<key>` that holds the bytes, `numel` counts
    elements of `kind` (bytes for an untyped storage). Source: torch 2.13 `torch/serialization.py`, `persistent_id`.
    """

    kind: str
    key: str
    location: str
    numel: int


def _stand_in(name: str) -> type[Inert]:
    return _Sealed(name, (Inert,), {"NAME": name, "__slots__": ()})  # pyright: ignore[reportReturnType]


def global_name(value: object) -> str | None:
    """The name of the global that `value` stands for, when a pickle holds the global itself, not a call of it."""
    return value.NAME if isinstance(value, type) and issubclass(value, Inert) else None


def is_call(value: object, *names: str) -> bool:
    """Whether `value` is what a pickle made by calling or instantiating one of the globals `names`."""
    return isinstance(value, Inert) and value.NAME in names


# Immutable or harmless builtins stand for themselves; an OrderedDict is an ordinary dict since Python 3.7.
_PLAIN: dict[str, type] = {"collections.OrderedDict": dict, "torch.Size": tuple}
_PLAIN_INERT: dict[str, type] = {
    **_PLAIN,
    **{f"{module}.{kind.__name__}": kind for module in ("builtins", "__builtin__") for kind in (set, frozenset)},
}


def known_globals(names: Iterable[str]) -> Mapping[str, type]:
    """Stand-ins for `names`, to be made once and given to `load_strict`."""
    return {**{name: _stand_in(name) for name in names}, **_PLAIN}


class _Unpickler(pickle.Unpickler):
    """Gives out stand-ins only: `find_class` is the one way by which a pickle reaches a global."""

    def __init__(self, data: bytes, known: Mapping[str, type], *, strict: bool, where: object) -> None:
        super().__init__(io.BytesIO(data))
        self._known = dict(known)
        self._strict = strict
        self._where = where

    def find_class(self, module_name: str, global_name: str, /) -> type:
        name = f"{module_name}.{global_name}"
        if (found := self._known.get(name)) is None:
            if self._strict:
                raise UnsafeCheckpointError(
                    "a pickle names a global that this format does not need; it was not run",
                    where=self._where,
                    got=name,
                    fix="do not unpickle this file with other tools unless you trust where it comes from",
                )
            found = self._known[name] = _stand_in(name)
        return found

    def persistent_load(self, pid: Any, /) -> StorageRef:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("a persistent id that is not a torch storage")
        kind, key, location, numel = global_name(pid[1]), *pid[2:5]
        if not (isinstance(kind, str) and isinstance(key, str) and isinstance(location, str) and type(numel) is int):
            raise pickle.UnpicklingError("a torch storage with fields of unexpected types")
        return StorageRef(kind, key, location, numel)


def _load(data: bytes, known: Mapping[str, type], *, strict: bool, where: object) -> Any:
    # Every object of the result stays alive: looking for garbage while it grows takes as long as the reading itself.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _Unpickler(data, known, strict=strict, where=where).load()
    except _MALFORMED as error:
        raise CheckpointError(
            "not a well-formed pickle",
            where=where,
            expected="a complete pickle",
            got=f"{type(error).__name__}: {error}",
            fix="copy the file again from where it was written, and compare sizes",
        ) from error
    finally:
        if collecting:
            gc.enable()


def load_strict(data: bytes, known: Mapping[str, type], *, where: object) -> Any:
    """The value of a pickle that may name the globals of `known` only (see `known_globals`); no code of it runs.

    Plain values come out as themselves, `OrderedDict` as `dict`, `torch.Size` as `tuple`, a storage as `StorageRef`,
    anything else as `Inert`.

    Raises:
        UnsafeCheckpointError: it names another global.
        CheckpointError: it is not a well-formed pickle.
    """
    return _load(data, known, strict=True, where=where)


def load_inert(data: bytes, *, where: object) -> Any:
    """The value of any pickle, with `Inert` in place of every object that is not plain data; no code of it runs.

    Raises:
        CheckpointError: it is not a well-formed pickle.
    """
    return _load(data, _PLAIN_INERT, strict=False, where=where)


# ---------------------------------------------------------------- writing

PROTOCOL_2 = b"\x80\x02"
STOP = b"."
NONE = b"N"
FALSE = b"\x89"
TRUE = b"\x88"
EMPTY_TUPLE = b")"
REDUCE = b"R"  # callable, tuple -> callable(*tuple)
NEWOBJ = b"\x81"  # class, tuple -> class.__new__(class, *tuple)
BUILD = b"b"  # object, state -> object with that state
POP = b"0"

_TUPLE_OF = (b")", b"\x85", b"\x86", b"\x87")


def put_int(value: int) -> bytes:
    """Instructions for an int, in the shortest form (the one that CPython's pickler chooses)."""
    if 0 <= value < 1 << 8:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    size = ((value if value >= 0 else ~value).bit_length() >> 3) + 1  # with one bit for the sign
    return b"\x8a" + size.to_bytes(1, "little") + value.to_bytes(size, "little", signed=True)


def put_str(value: str) -> bytes:
    """Instructions for a str."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + len(raw).to_bytes(4, "little") + raw


def put_global(name: str) -> bytes:
    """Instructions for a global, named by module and name joined with a dot."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def put_tuple(values: Sequence[bytes]) -> bytes:
    """Instructions for a tuple of values that are instructions themselves."""
    body = b"".join(values)
    return body + _TUPLE_OF[len(values)] if len(values) < 4 else b"(" + body + b"t"


def put_ints(values: Sequence[int]) -> bytes:
    """Instructions for a tuple of ints."""
    return put_tuple([put_int(value) for value in values])


def put_list(values: Iterable[bytes]) -> bytes:
    """Instructions for a list of values that are instructions themselves."""
    return b"](" + b"".join(values) + b"e"


def put_dict(flat: Iterable[bytes]) -> bytes:
    """Instructions for a dict; `flat` alternates keys and values, instructions themselves."""
    return b"}(" + b"".join(flat) + b"u"


def remember(slot: int) -> bytes:
    """Instruction that keeps the topmost value under `slot` (0 to 255) for `recall`; the value stays on the stack."""
    return b"q" + slot.to_bytes(1, "little")


def recall(slot: int) -> bytes:
    """Instruction that puts back the value kept under `slot`."""
    return b"h" + slot.to_bytes(1, "little")


_PLAIN_TYPES = (type(None), bool, int, float, str)


def dump_plain(value: Any, *, where: object = None) -> bytes:
    """A pickle (protocol 2) of dicts, lists, tuples and scalars, which `torch.load(weights_only=True)` reads.

    Raises:
        CheckpointError: there is anything else inside: other types, and subclasses such as enums, would need
            their class at the reader's side.
    """
    pending = [value]
    seen: set[int] = set()
    while pending:
        part = pending.pop()
        if type(part) in _PLAIN_TYPES or id(part) in seen:
            continue
        seen.add(id(part))
        if type(part) is dict:
            pending += (*part.keys(), *part.values())
        elif type(part) in (list, tuple):
            pending += part
        else:
            raise CheckpointError(
                "only plain values can be written into a checkpoint's objects",
                where=where,
                expected="dict, list, tuple, str, int, float, bool, None",
                got=f"{type(part).__module__}.{type(part).__qualname__}",
            )
    return pickle.dumps(value, protocol=2)
