"""Memory of freed tensors goes back to the system while it is asked for."""

import re
from pathlib import Path

import pytest
import torch

from normswap.checkpoints import freeing
from normswap.checkpoints.freeing import freed_at_once

STATUS = Path("/proc/self/status")


def _own_memory() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", STATUS.read_text())
    assert found
    return int(found[1]) * 1024


def _holes() -> int:
    """Bytes that stay behind when every second of many blocks of one megabyte is freed, and then the rest but one."""
    before = _own_memory()
    blocks = [torch.ones(2**18) for _ in range(64)]
    last = blocks[-1]
    blocks.clear()
    left = _own_memory() - before - last.nbytes
    del last
    return left


@pytest.mark.skipif(not STATUS.exists(), reason="the system has no /proc")
def test_freed_blocks_leave_no_holes() -> None:
    with freed_at_once():
        assert _holes() < 4 * 2**20
    assert _holes() > 32 * 2**20  # else the first says nothing


def test_where_there_is_no_such_option_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freeing.sys, "platform", "darwin")
    monkeypatch.setattr(freeing.ctypes, "CDLL", lambda _: pytest.fail("asked for"))
    with freed_at_once():
        pass
