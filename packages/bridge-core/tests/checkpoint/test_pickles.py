"""Pickles are read without running them: hostile ones do nothing, honest ones come out as data."""

import argparse
import collections
import dataclasses
import enum
import functools
import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bridge_core.checkpoint import pickles as p
from bridge_core.errors import CheckpointError, UnsafeCheckpointError

KNOWN = p.known_globals(["torch.float32", "builtins.getattr"])


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def attacks(marker: Path) -> dict[str, bytes]:
    """Live pickles that make a folder called `marker`, one for each way in which a pickle can call something."""
    module, path = os.mkdir.__module__, text(str(marker))  # "posix": what os.mkdir is a global of
    call = f"c{module}\nmkdir\n".encode()
    stack_global = text(module) + text("mkdir") + b"\x93"
    code = text(f"__import__('os').mkdir({str(marker)!r})")
    getattr_chain = (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n"
        + text("os")
        + b"\x85R"
        + text("mkdir")
        + b"tR"
        + path
        + b"\x85R."
    )
    return {
        "REDUCE": b"\x80\x02" + call + path + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04" + stack_global + path + b"\x85R.",
        "eval": b"\x80\x02cbuiltins\neval\n" + code + b"\x85R.",
        "exec in a python 2 name": b"\x80\x02c__builtin__\nexec\n" + code + b"\x85R.",
        "INST": b"(" + path + f"i{module}\nmkdir\n.".encode(),
        "OBJ": b"(" + call + path + b"o.",
        "dotted name": b"\x80\x04" + text("os") + text("path.os.mkdir") + b"\x93" + path + b"\x85R.",
        "nested": b"\x80\x02}(" + text("args") + b"](K\x01" + call + path + b"\x85Reu.",
        "popped": b"\x80\x02" + call + path + b"\x85R0N.",
        "getattr of an import": b"\x80\x02" + getattr_chain,
        "partial": b"\x80\x02cfunctools\npartial\n(" + call + path + b"tR)R.",
        # The first item of a map is computed when the constructor of bytes asks for it.
        "NEWOBJ": b"\x80\x02cbuiltins\nbytes\ncbuiltins\nmap\n" + call + b"](" + path + b"e\x86\x81\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04cbuiltins\nbytes\ncbuiltins\nmap\n" + call + b"](" + path + b"e\x86}\x92\x85}\x92.",
        # BUILD calls __setstate__ of what lies below it; here it is the callable, put on an instance beforehand.
        "BUILD": b"\x80\x02cargparse\nNamespace\n)\x81}" + text("__setstate__") + call + b"sb" + path + b"b.",
    }


NAMES = list(attacks(Path("x")))


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_pickle_does_nothing(name, tmp_path):
    marker = tmp_path / "marker"
    payload = attacks(marker)[name]
    with pytest.raises(UnsafeCheckpointError, match=r"(?s)does not need.*where: .*here\.pt.*got: "):
        p.load_strict(payload, KNOWN, where="here.pt")
    p.load_inert(payload, where="here.pt")
    assert not marker.exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_hostile_pickles_are_live(name, tmp_path):
    """Otherwise the test above would prove nothing."""
    marker = tmp_path / "marker"
    program = "import pickle, sys; pickle.loads(bytes.fromhex(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, attacks(marker)[name].hex()], capture_output=True, timeout=60)
    assert marker.exists()


def test_strict_names_the_global_and_the_file():
    with pytest.raises(UnsafeCheckpointError) as caught:
        p.load_strict(pickle.dumps(os.system), KNOWN, where="/data/.metadata")
    assert caught.value.got == f"{os.system.__module__}.system"
    assert caught.value.where == "/data/.metadata"


def test_strict_with_a_hostile_pickle_inside_a_known_one():
    inner = b"](" + pickle.dumps(eval, 2)[2:-1] + b"e"
    with pytest.raises(UnsafeCheckpointError, match=r"__builtin__\.eval|builtins\.eval"):
        p.load_strict(b"\x80\x02}" + text("a") + inner + b"s.", KNOWN, where="x")


def test_a_pickle_cannot_change_a_stand_in_for_later_pickles():
    poison = b"\x80\x02ctorch\nfloat32\nN}" + text("NAME") + text("torch.float64") + b"s\x86b."
    with pytest.raises(CheckpointError):
        p.load_strict(poison, KNOWN, where="x")
    assert p.global_name(p.load_strict(b"ctorch\nfloat32\n.", KNOWN, where="x")) == "torch.float32"
    with pytest.raises(TypeError, match="sealed"):
        p.Inert.NAME = "other"


def test_extension_codes_reach_nothing():
    with pytest.raises(CheckpointError):
        p.load_inert(b"\x80\x02\x82\x01.", where="x")


def test_a_persistent_id_must_be_a_storage():
    storage = b"(" + text("storage") + b"ctorch\nfloat32\n" + text("0") + text("cpu") + b"K\x03tQ."
    assert p.load_strict(storage, KNOWN, where="x") == p.StorageRef("torch.float32", "0", "cpu", 3)
    for wrong in (text("module") + b"Q.", storage.replace(b"K\x03", b"N"), storage.replace(b"storage", b"tensors")):
        with pytest.raises(CheckpointError, match=r"well-formed|persistent"):
            p.load_strict(wrong, KNOWN, where="x")


def test_a_pickle_that_ends_early_is_a_checkpoint_error():
    whole = pickle.dumps({"a": [1, (2, 3)], "b": argparse.Namespace(x=1)})
    for end in range(len(whole) - 1):
        with pytest.raises(CheckpointError, match="well-formed"):
            p.load_inert(whole[:end], where="x")


FUZZ = """
import pickle, random, resource, sys
from bridge_core.checkpoint import pickles as p
from bridge_core.errors import CheckpointError
limit = 2 << 30   # some opcodes ask for memory by a number in the pickle
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
whole = bytearray.fromhex(sys.argv[1])
random.seed(0)
refused = 0
for _ in range(3000):
    changed = bytearray(whole)
    for _ in range(random.randint(1, 4)):
        changed[random.randrange(len(changed))] = random.randrange(256)
    try:
        p.load_inert(bytes(changed), where="x")
    except CheckpointError:
        refused += 1
print(refused)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_damaged_pickles_raise_checkpoint_errors_only():
    space = argparse.Namespace(x=1, y=collections.OrderedDict(a=(1, 2)), z=[{1, 2}, 3.5, 1 << 70])
    run = [sys.executable, "-c", FUZZ, pickle.dumps(space, 2).hex()]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: int
    y: list


class Slotted:
    __slots__ = ("a",)


class Bag(dict):
    pass


class Row(list):
    pass


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_inert_objects_keep_what_they_were_made_of(protocol):
    def load(value):
        return p.load_inert(pickle.dumps(value, protocol), where="x")

    space = load(argparse.Namespace(num_layers=4, inner=argparse.Namespace(tp=2)))
    assert space.fields["num_layers"] == 4
    assert space.fields["inner"].fields == {"tp": 2}
    assert load(Point(1, [2])).fields == {"x": 1, "y": [2]}
    assert load({"o": collections.OrderedDict(a=1)}) == {"o": {"a": 1}}
    assert load({1, 2}) == {1, 2}
    assert load(frozenset([1])) == frozenset([1])
    assert isinstance(load(Colour.RED), p.Inert)
    assert isinstance(load(functools.partial(max, 1)), p.Inert)
    assert "functools.partial" in repr(load(functools.partial(max, 1)))
    if protocol >= 2:
        assert load(Bag(a=1)).items == [("a", 1)]
        assert load(Row([1, 2])).items == [1, 2]
        slotted = Slotted()
        slotted.a = 5
        assert load(slotted).fields == {"a": 5}


def test_a_deeply_nested_value_is_described_in_one_line():
    deep = b"\x80\x02" + b"ca\nb\n" * 5000 + b")R" + b"\x85R" * 4999 + b"."
    assert len(p.describe(p.load_inert(deep, where="x"))) < 200
    assert len(repr(p.load_inert(deep, where="x"))) < 500


@given(st.integers() | st.builds(lambda bits, step: step - (1 << bits), st.integers(0, 200), st.integers(-1, 1)))
@example(-(1 << 39))
@example(1 << 31)
def test_ints_are_written_as_cpython_writes_them(number):
    assert p.PROTOCOL_2 + p.put_int(number) + p.STOP == pickle.dumps(number, 2)


@given(st.lists(st.integers(), max_size=6), st.text())
def test_written_values_are_read_back(numbers, string):
    pairs = [p.put_str(string), p.put_list([p.put_ints(numbers), p.NONE, p.TRUE])]
    assert pickle.loads(p.PROTOCOL_2 + p.put_dict(pairs) + p.STOP) == {string: [tuple(numbers), None, True]}


def test_values_can_be_kept_and_recalled():
    program = p.PROTOCOL_2 + p.put_str("a") + p.remember(3) + p.POP + p.put_tuple([p.recall(3), p.recall(3)]) + p.STOP
    assert pickle.loads(program) == ("a", "a")
    pickletools.dis(program, out=io.StringIO())  # it checks stack and memo


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=10,
)


@given(plain)
def test_plain_values_are_written_exactly(value):
    assert pickle.loads(p.dump_plain(value)) == value
    assert p.load_strict(p.dump_plain(value), p.known_globals([]), where="x") == value


@pytest.mark.parametrize("value", [Colour.RED, {"a": [{1}]}, b"raw", Bag(), {Colour.RED: 1}, 1j, os.system])
def test_other_values_are_not_written(value):
    with pytest.raises(CheckpointError, match=r"(?s)only plain values.*where: .*common\.pt.*got: "):
        p.dump_plain(value, where="common.pt")
