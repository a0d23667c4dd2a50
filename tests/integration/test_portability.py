"""What only POSIX systems have is not needed: files are converted without it, in a process that has lost it."""

import os
import pathlib
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.distributed import checkpoint

from normswap.checkpoints.formats.plain_values import path_globals
from tests.helpers import systems

# After the libraries, which choose their own modules by the system.
HIDE = """
import os, signal, sys, tempfile
import click, platformdirs, rich.console, rich.progress, safetensors.torch, timm, torch
import torch.distributed.checkpoint, torch.fx
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
tempfile._O_TMPFILE_WORKS = False
functions = "getuid geteuid fork memfd_create copy_file_range sched_getaffinity mkfifo link"
for name in (*functions.split(), "O_TMPFILE"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGALRM", "SIGKILL", "SIGUSR1", "setitimer", "alarm"):
    if hasattr(signal, name):
        delattr(signal, name)
"""
COLLECT = """
import pytest
sys.exit(pytest.main(["--collect-only", "-p", "no:cacheprovider", "-W", "ignore", sys.argv[1]]))
"""
WINDOWS = """
sys.platform = "win32"
for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY"):
    if hasattr(os, name):
        delattr(os, name)
"""
CONVERT = """
import normswap
from normswap.cli import main
os.chdir(sys.argv[1])
options = ["--arch", "timm:test_resnet", "--input", "2x3x64x64"]
for arguments in (["model.pt"], ["model.pt", "--force"], ["model.pt", "-o", "model.safetensors"], ["shards"]):
    main(["convert", *arguments, *options], standalone_mode=False)
model = normswap.load("model.pt", architecture="timm:test_resnet").model.eval()
x = torch.randn(2, 3, 64, 64)
for name in ("model.normswap.pt", "model.safetensors", "shards.normswap"):
    converted = normswap.load(name, architecture="timm:test_resnet").model.eval()
    assert normswap.importance_weights(converted)
    torch.testing.assert_close(converted(x), model(x))
conversion = normswap.convert(model, x)
normswap.save(conversion.model, "again.pt", plan=conversion.plan)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("system", ["", WINDOWS], ids=["a plain POSIX system", "Windows"])
def test_files_are_converted_without_what_only_some_systems_have(tmp_path: Path, system: str) -> None:
    state = timm.create_model("test_resnet").state_dict()
    torch.save(state, tmp_path / "model.pt")
    checkpoint.save(state, checkpoint_id=tmp_path / "shards", no_dist=True)
    # A killed run left this one; where a lock cannot be asked for, it stays.
    (tmp_path / ".model.normswap.pt.0123abcd.partial").touch()
    before = {entry.name for entry in tmp_path.iterdir()}
    command = [sys.executable, "-c", HIDE + system + CONVERT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = {entry.name for entry in tmp_path.iterdir()} - before
    assert written == {"again.pt", "model.normswap.pt", "model.safetensors", "shards.normswap"}


def test_paths_of_another_system_in_a_file_stay_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for system, own, other in (("posix", "PosixPath", "WindowsPath"), ("nt", "WindowsPath", "PosixPath")):
        with monkeypatch.context() as patch:
            patch.setattr(os, "name", system)
            found = path_globals()
        for module in ("pathlib", "pathlib._local"):
            assert found[f"{module}.{own}"] is getattr(pathlib, own)
            assert found[f"{module}.{other}"] is getattr(pathlib, f"Pure{other}")


@pytest.mark.slow
def test_every_test_is_collected_without_what_only_some_systems_have_and_every_skip_names_one() -> None:
    command = [sys.executable, "-c", HIDE + COLLECT, str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tests = {line.rpartition("::")[2].partition("[")[0] for line in done.stdout.splitlines()}
    assert {*systems.POSIX_ONLY, *systems.LINUX_ONLY} - tests == set()


@pytest.mark.parametrize(("platform", "skipped"), [("linux", []), ("darwin", ["copy"]), ("win32", ["copy", "fork"])])
def test_a_system_skips_what_it_lacks(platform: str, skipped: list[str]) -> None:
    names = {
        "copy": "test_a_copy_between_file_systems_is_read_and_written",
        "fork": "test_a_kill_at_any_moment_leaves_nothing_the_old_or_the_whole_new_file",
        "any": "test_paths_of_another_system_in_a_file_stay_text",
    }
    assert [short for short, name in names.items() if systems.missing_here(name, platform)] == skipped
