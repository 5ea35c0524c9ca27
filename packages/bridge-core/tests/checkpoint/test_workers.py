"""Several workers share a conversion: the same output as from one, and one that fails stops all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from hf_folders import write_hf
from refusals import left

from bridge_core.checkpoint.convert import Options, export_ckpt, import_ckpt
from bridge_core.checkpoint.verify import verify
from bridge_core.checkpoint.workers import Workers, jointly
from bridge_core.errors import BridgeError, CheckpointError


class Threads:
    """Workers that are threads of this process; one that waits for nobody raises `BrokenBarrierError`."""

    def __init__(self, rank: int, said: list[Exception | None], barrier: Barrier) -> None:
        self.rank, self.size = rank, len(said)
        self._said, self._barrier = said, barrier

    def together(self, step) -> None:
        self._said[self.rank] = None
        try:
            step()
        except Exception as error:
            self._said[self.rank] = error
        self._barrier.wait()
        failures = [error for error in self._said if error is not None]
        self._barrier.wait()
        if failures:
            raise self._said[self.rank] or BridgeError("another worker failed")


def on_threads(size: int, run) -> list:
    """What `run(workers)` returned, or raised, on each of `size` workers."""
    said: list[Exception | None] = [None] * size
    barrier = Barrier(size, timeout=20)

    def guarded(rank: int):
        workers: Workers = Threads(rank, said, barrier)
        try:
            return run(workers)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(guarded, range(size)))


@pytest.mark.parametrize("size", [2, 3])
def test_workers_share_the_bytes(tmp_path, size):
    hf = write_hf(tmp_path / "hf", "qwen3_moe", files=2)
    steps = ((import_ckpt, hf, tmp_path / "megatron"), (export_ckpt, tmp_path / "megatron", tmp_path / "back"))
    for run, source, output in steps:
        convert = lambda workers, run=run, a=source, b=output: run(a, b, options=Options(workers=workers))  # noqa: E731
        reports = on_threads(size, convert)
        shares = [sum(report.moved[:3]) for report in reports]
        assert sum(shares) == reports[0].nbytes
        assert all(0 < share < reports[0].nbytes for share in shares)
    assert verify(hf, tmp_path / "back").ok


def test_a_worker_that_cannot_see_the_source_stops_all_before_anything_is_written(tmp_path):
    hf = write_hf(tmp_path / "hf")

    def run(workers):
        source = hf if workers.rank == 0 else tmp_path / "not mounted here"
        return import_ckpt(source, tmp_path / "megatron", options=Options(workers=workers))

    first, second = on_threads(2, run)
    assert isinstance(first, BridgeError), first
    assert isinstance(second, CheckpointError), second
    assert "not mounted here" in str(second)
    assert left(tmp_path) == ["hf"]


def test_jointly_gives_each_its_own_result():
    assert on_threads(3, lambda workers: jointly(workers, lambda: workers.rank)) == [0, 1, 2]
