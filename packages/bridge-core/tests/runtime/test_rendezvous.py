"""A launcher's leftover environment, and workers that never come: an error within minutes that the caller names."""

from __future__ import annotations

import socket
import time

import pytest

from bridge_core import BridgeError
from bridge_core.cli import main
from bridge_core.runtime.workers import torchrun_workers

pytest.importorskip("torch", reason="workers meet through torch.distributed")


@pytest.fixture
def lonely(monkeypatch):
    """The environment of one worker of two; the other is not there. Gives its rank a free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    return lambda rank: monkeypatch.setenv("RANK", str(rank))


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_that_never_come_are_named_after_the_limit(lonely, rank):
    lonely(rank)
    started = time.monotonic()
    with (
        pytest.raises(BridgeError, match=r"did not meet[\s\S]*2 processes within 0\.03 minutes") as caught,
        torchrun_workers(rendezvous_minutes=0.03),
    ):
        pytest.fail("one worker is not two")
    assert "unset WORLD_SIZE" in str(caught.value)
    assert f"RANK={rank}" in str(caught.value)
    assert time.monotonic() - started < 20


def test_a_leftover_world_size_alone_is_an_error_at_once(monkeypatch, tmp_path, capsys):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "megatron")]) != 0
    told = capsys.readouterr().err
    assert "did not meet" in told
    assert "RANK expected, but not set" in told


def test_the_command_line_names_the_limit(lonely, tmp_path, capsys):
    lonely(1)
    arguments = ["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--rendezvous-minutes", "0.03"]
    assert main(arguments) != 0
    assert "within 0.03 minutes" in capsys.readouterr().err
