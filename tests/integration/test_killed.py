"""A run that is killed leaves no file, the old one or the whole new one; what else it leaves, the next run removes.

In a process of its own, which forks what it kills: this one may have threads.
"""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.paths import ROOT

KILLS = 20
pytestmark = pytest.mark.slow


@pytest.mark.multiprocess
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_nothing_the_old_or_the_whole_new_file() -> None:
    command = [sys.executable, "-m", "benchmarks.robustness.kills", "--kills", str(KILLS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(done.stdout)
    assert sum(outcome["left"].values()) == KILLS
    assert {*outcome["left"]} <= {"nothing", "old", "new"}
    assert outcome["left"]["old"] > 0
    assert outcome["broken"] == []
    # Kills did hit runs in the middle of writing, and the run after the last one has tidied up.
    assert outcome["temporaries"] > 0
    assert outcome["remains"] == []
