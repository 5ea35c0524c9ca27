"""How much memory a step of a test takes beside what was there before."""

from __future__ import annotations

import threading
import time
from pathlib import Path


class Peak:
    """The largest anonymous memory of this process while the context is open, beyond what it was before.

    Read from Linux's /proc, every millisecond, so all allocators are seen: numpy's, torch's, those of libraries.

    Attributes:
        nbytes: what was found; final when the context is closed.
    """

    def __enter__(self) -> Peak:
        self._before, self.nbytes, self._open = _anonymous(), 0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._open = False
        self._thread.join()

    def _watch(self) -> None:
        while self._open:
            self.nbytes = max(self.nbytes, _anonymous() - self._before)
            time.sleep(0.001)


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("Linux says RssAnon")
