"""Output folders: what is refused, what a failed write leaves behind, what overwriting keeps."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
from hf_folders import write_hf
from refusals import left, refused

from bridge_core.checkpoint.convert import Options, export_ckpt, import_ckpt
from bridge_core.checkpoint.output import finished_folder
from bridge_core.checkpoint.verify import verify
from bridge_core.errors import CheckpointError, OutputError


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root = tmp_path_factory.mktemp("converted")
    import_ckpt(write_hf(root / "hf"), root / "megatron")
    return root / "megatron"


def test_an_output_that_holds_something_is_refused_and_kept(tmp_path, converted):
    hf = write_hf(tmp_path / "hf")
    out = tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    (out / "mine" / "notes.txt").write_text("precious")
    for run in (lambda: import_ckpt(hf, out / "mine"), lambda: export_ckpt(converted, out / "mine")):
        refused(run, "already holds something", "notes.txt", "--overwrite")
        assert left(out) == ["mine"]
        assert left(out / "mine") == ["notes.txt"]


def test_an_output_that_is_a_file_is_refused(tmp_path, converted):
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("precious")
    refused(lambda: export_ckpt(converted, out / "file", options=Options(overwrite=True)), "is a file", "out/file")
    assert left(out) == ["file"]


def test_overwriting_replaces_all_of_the_old_folder(tmp_path):
    hf = write_hf(tmp_path / "hf")
    out = tmp_path / "out"
    (out / "megatron").mkdir(parents=True)
    (out / "megatron" / "old.txt").write_text("old")
    import_ckpt(hf, out / "megatron", options=Options(overwrite=True))
    assert left(out) == ["megatron"]
    assert "old.txt" not in left(out / "megatron")
    assert verify(hf, out / "megatron").ok


def test_the_folder_that_is_converted_is_never_overwritten(tmp_path):
    hf = write_hf(tmp_path / "in" / "hf")
    for output in (hf, hf.parent):
        refused(lambda output=output: import_ckpt(hf, output, options=Options(overwrite=True)), "replace", str(hf))
    assert verify(hf, hf).ok


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch, converted, direction):
    hf = write_hf(tmp_path / "hf")
    usage = namedtuple("usage", "total used free")(10_000, 9_000, 1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    out = tmp_path / "out" / "folder"
    run = (lambda: import_ckpt(hf, out)) if direction == "import" else (lambda: export_ckpt(converted, out))
    error = refused(run, "not enough room", "1,000 bytes free", "folder")
    assert isinstance(error, OutputError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("direction", ["import", "export"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_in_the_middle_leaves_the_old_folder(
    tmp_path, monkeypatch, converted, direction, overwrite, number
):
    hf = write_hf(tmp_path / "hf")
    out = tmp_path / "out"
    out.mkdir()
    if overwrite:
        (out / "folder").mkdir()
        (out / "folder" / "old.txt").write_text("old")
    calls = iter(range(1000))

    def pwrite_until_full(real):
        def write(*arguments):
            if next(calls) >= 3:
                raise OSError(number, os.strerror(number))
            return real(*arguments)

        return write

    for name in ("pwrite", "pwritev"):
        monkeypatch.setattr(os, name, pwrite_until_full(getattr(os, name)))
    options = Options(overwrite=overwrite)
    if direction == "import":
        run = lambda: import_ckpt(hf, out / "folder", options=options)  # noqa: E731
    else:
        run = lambda: export_ckpt(converted, out / "folder", options=options)  # noqa: E731
    error = refused(run, "could not be written", os.strerror(number), str(out / "folder"))
    assert isinstance(error, OutputError)
    assert left(out) == (["folder"] if overwrite else [])
    assert left(out / "folder") == (["old.txt"] if overwrite else [])


LIMITED = """
import resource, sys
from bridge_core.checkpoint.convert import export_ckpt, import_ckpt
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
{"import": import_ckpt, "export": export_ckpt}[sys.argv[1]](sys.argv[2], sys.argv[3])
"""


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_limit_of_the_operating_system_is_reported_as_such(tmp_path, converted, direction):
    """The system itself refuses (RLIMIT_FSIZE), after files and folders were made."""
    source = write_hf(tmp_path / "hf") if direction == "import" else converted
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", LIMITED, direction, source, out / "folder", "6000"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 1
    for word in ("OutputError", os.strerror(errno.EFBIG), "where:", "expected:", "got:", "fix:"):
        assert word in done.stderr, done.stderr
    assert left(out) == []


def test_two_runs_do_not_write_the_same_output(tmp_path, converted):
    with finished_folder(tmp_path / "hf", overwrite=False):
        refused(lambda: export_ckpt(converted, tmp_path / "hf"), "another run")
    assert left(tmp_path) == ["hf"]


def write_new(path, *, overwrite, meanwhile=lambda: None):
    with finished_folder(path, overwrite=overwrite) as new:
        (new / "new.txt").write_text("new")
        meanwhile()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_killed_run_was_about_to_replace_is_there_again(tmp_path, overwrite):
    """It was killed after the old folder had lost its name, and before the new one had it."""
    out, old = tmp_path / "out", tmp_path / ".out.replaced"
    old.mkdir()
    (old / "notes.txt").write_text("precious")

    def run():
        with finished_folder(out, overwrite=overwrite):
            raise OutputError("this run fails as well")

    with pytest.raises(OutputError, match="fails as well" if overwrite else "already holds something"):
        run()
    assert left(out) == ["notes.txt"]
    assert not old.exists()


def test_what_somebody_put_there_in_the_meantime_is_not_replaced(tmp_path):
    def put_notes():
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("precious")

    with pytest.raises(OutputError, match="already holds something"):
        write_new(tmp_path / "out", overwrite=False, meanwhile=put_notes)
    assert left(tmp_path) == ["out"]
    assert left(tmp_path / "out") == ["notes.txt"]


def test_the_old_folder_is_back_if_the_new_one_cannot_get_its_name(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    rename = os.rename

    def refuse(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source), None, str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OutputError, match="could not be written"):
        write_new(tmp_path / "out", overwrite=True)
    assert left(tmp_path) == ["out"]
    assert left(tmp_path / "out") == ["old.txt"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_a_source_that_cannot_be_opened_is_not_called_an_output(tmp_path, monkeypatch, number):
    hf = write_hf(tmp_path / "hf")
    opened = os.open

    def refuse(path, flags, *rest, **options):
        if str(path).endswith(".safetensors"):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    words = ("could not be opened", str(hf), os.strerror(number))
    error = refused(lambda: import_ckpt(hf, tmp_path / "megatron"), *words)
    assert isinstance(error, CheckpointError)
    assert ("ulimit" in str(error)) == (number == errno.EMFILE)
    assert left(tmp_path) == ["hf"]


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_durable_output_is_on_the_disk_before_it_has_its_name_and_after(tmp_path, monkeypatch, converted, direction):
    hf = write_hf(tmp_path / "hf")
    out = tmp_path / "out" / "folder"
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor):
        steps.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_rename(source, target):
        steps.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    run = import_ckpt if direction == "import" else export_ckpt
    run(hf if direction == "import" else converted, out, options=Options(durable=True))
    at = steps.index("rename")
    assert steps[at:] == ["rename", str(out.parent)]
    everything = sorted(str(out.parent / ".folder.partial" / path.relative_to(out)) for path in (out, *out.rglob("*")))
    assert sorted(steps[at - len(everything) : at]) == everything  # also what was written after the tensors


def test_without_being_asked_nothing_waits_for_the_disk(tmp_path, monkeypatch, converted):
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("fsync"))
    export_ckpt(converted, tmp_path / "hf")
