"""`return_freed_memory` returns freed tensors to the system inside its block."""

import subprocess
import sys
from pathlib import Path

import pytest

from normswap.checkpoints.io import memory
from normswap.checkpoints.io.memory import return_freed_memory

# In a process of its own, whose heap has no holes to begin with: what stays behind, in MB, when of 64 blocks of one
# megabyte all but the last are freed; while it is asked for, and after.
_HOLES = """
import re
from pathlib import Path
import torch
from normswap.checkpoints.io.memory import return_freed_memory

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def holes():
    before = own()
    blocks = [torch.ones(2**18) for _ in range(64)]
    last = blocks[-1]
    blocks.clear()
    return own() - before - last.nbytes / 2**20

with return_freed_memory():
    asked = holes()
print(asked, holes())
"""


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc")
def test_freed_blocks_leave_no_holes() -> None:
    done = subprocess.run([sys.executable, "-c", _HOLES], capture_output=True, text=True, check=True)
    asked, after = map(float, done.stdout.split())
    assert asked < 4
    assert after > 32  # otherwise the first comparison shows nothing


def test_where_there_is_no_such_option_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: pytest.fail("asked for"))
    with return_freed_memory():
        pass
