"""The command line as a program: help costs nothing, exit codees, interrupts, progress."""

import json
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import normswap
from normswap.checkpoints import file_conversion
from normswap.checkpoints.record import Step
from normswap.cli import console
from normswap.cli.commands import convert as convert_module
from normswap.cli.console import one_line_failures
from tests.helpers import files
from tests.helpers.command_line import ARCH, INPUT, names, ok, run


# Starting.
def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.multiprocess
def test_help_imports_nothing_heavy() -> None:
    heavy = python(
        "import sys, click.testing, normswap.cli\n"
        "for command in ([], ['inspect'], ['convert'], ['verify']):\n"
        "    assert click.testing.CliRunner().invoke(normswap.cli.main, [*command, '--help']).exit_code == 0\n"
        "print({'torch', 'timm', 'torchvision', 'rich', 'numpy', 'safetensors'} & set(sys.modules))"
    )
    assert heavy.strip() == "set()"


@pytest.mark.multiprocess
def test_help_is_fast() -> None:
    def cpu_seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "normswap", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        return after.children_user - before.children_user + after.children_system - before.children_system

    # Processor time, and the best of a few, since the machine may be busy with something else.
    assert min(cpu_seconds() for _ in range(5)) < 0.3


@pytest.mark.multiprocess
def test_bad_input_costs_no_import_of_torch(tmp_path: Path) -> None:
    code = (
        "import sys, click.testing, normswap.cli\n"
        "result = click.testing.CliRunner().invoke(normswap.cli.main, ['convert', 'nowhere.pt'])\n"
        "print(result.exit_code, 'torch' in sys.modules)"
    )
    assert python(code).split() == ["2", "False"]


def test_the_version_is_reported() -> None:
    assert ok("--version").stdout == f"normswap {normswap.__version__}\n"


COMMAND = Path(sys.executable).with_name("normswap")


@pytest.mark.multiprocess
def test_it_is_a_command_and_a_module() -> None:
    """As processes, where it costs no import of torch."""
    for command in ([str(COMMAND)], [sys.executable, "-m", "normswap"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"normswap {normswap.__version__}\n", "")
        done = subprocess.run([*command, "convert", "nowhere.pt"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: nowhere.pt: no such file")


@pytest.mark.parametrize(
    "start",
    [
        lambda: runpy.run_path(str(COMMAND), run_name="__main__"),
        lambda: runpy.run_module("normswap", run_name="__main__"),
    ],
    ids=["command", "module"],
)
def test_the_exit_status_is_the_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], start: Callable[[], Any]
) -> None:
    """By the very code that a process runs."""
    monkeypatch.setattr(sys, "argv", ["normswap", "inspect", "sn.pt"])
    with pytest.raises(SystemExit) as ended:
        start()
    shown = capsys.readouterr()
    assert (ended.value.code, shown.err) == (0, "")
    assert "Importance weights" in shown.out
    monkeypatch.setattr(sys, "argv", ["normswap", "convert", "sn.pt"])
    with pytest.raises(SystemExit) as ended:
        start()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: sn.pt: nothing to do")


# Failures and progress.
def _raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.slow
def test_an_interrupt_says_in_one_line_what_was_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = _raising(KeyboardInterrupt())
    for owner, name in (
        (convert_module, "_check_paths"),
        (file_conversion, "read_checkpoint"),
        (file_conversion, "convert_file_content"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, stopped)
            before = names(folder)
            result = run("convert", "bn.pt", *ARCH, *INPUT)
            assert (result.exit_code, names(folder)) == (130, before)
            assert result.stderr == "interrupted; nothing was written\n"
    monkeypatch.setattr(convert_module._Printer, "print_closing_lines", stopped)
    result = run("convert", "bn.pt", *ARCH, *INPUT)
    assert (result.exit_code, result.stderr) == (130, "interrupted; bn.normswap.pt was written\n")


def test_the_system_names_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "_check_paths", _raising(PermissionError(13, "Permission denied", "bn.pt")))
    result = run("convert", "bn.pt")
    assert (result.exit_code, result.output) == (2, "error: bn.pt: Permission denied\n")


@pytest.mark.parametrize("error", [RuntimeError("a defect"), OSError("no name")], ids=["defect", "nameless"])
def test_what_nobody_expected_keeps_its_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(convert_module, "_check_paths", _raising(error))
    assert run("convert", "bn.pt").exception is error


@pytest.mark.slow
def test_progress_is_shown_on_a_terminal_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ok("convert", "bn.pt", *ARCH, *INPUT).stderr == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    shown = run("convert", "bn.pt", *ARCH, *INPUT, "--force", "--json")
    for stage in ("reading bn.pt", "building the model", "finding norm sites", "comparing", "writing bn.normswap.pt"):
        assert stage in shown.stderr
    assert json.loads(shown.stdout)["written"]


def test_what_an_error_reports_cannot_rule_the_terminal(folder: Path) -> None:
    result = run("inspect", "a\x1b[31m\udcff.pt")
    assert result.stderr.startswith(r"error: a\x1b[31m\udcff.pt: no such file")


def test_markup_in_a_record_is_shown_as_it_is(folder: Path) -> None:
    loaded = normswap.load("sn.pt")
    steps = (Step("[/bold]", "[/x]", "[red]"),)
    normswap.save(loaded.model, "marked.pt", plan=loaded.plan, architecture=files.ARCH, history=steps)
    assert "[/bold]" in ok("inspect", "marked.pt").stdout


def test_own_warnings_are_one_line_with_options_and_others_keep_their_place() -> None:
    shown: dict[str, str] = {}

    @one_line_failures
    def command() -> None:
        for file in (str(console.__file__), "elsewhere.py"):
            shown[file] = warnings.formatwarning("pass trust=True", UserWarning, file, 7, "code")

    before = warnings.formatwarning
    command()
    assert warnings.formatwarning is before
    assert shown == {
        str(console.__file__): "warning: pass --trust\n",
        "elsewhere.py": "elsewhere.py:7: UserWarning: pass trust=True\n  code\n",
    }
