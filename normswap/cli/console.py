"""The terminal of the command line: progress, output in any encoding, errors in one line, several processes.

Importing it imports neither torch nor rich, so that `--help` is fast.
"""

import codecs
import functools
import importlib
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, ParamSpec, TextIO

import click

from normswap.errors import NormswapError
from normswap.text import jsonable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from normswap.surgery.plan import SwapPlan

P = ParamSpec("P")


# --- progress ---------------------------------------------------------------------------------------------------------


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Show `name`, a spinner and the seconds elapsed on stderr while the block runs, if stderr is a terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    spinner = SpinnerColumn("dots" if console.encoding.startswith("utf") else "line")
    columns = (spinner, TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(name, total=None)
        yield


class Bar:
    """A progress bar on stderr with lines above it; without a terminal only the lines."""

    def __init__(self, progress: "Progress", task: "TaskID") -> None:
        self._progress, self._task = progress, task

    def show(self, done: int, total: int | None, more: str = "") -> None:
        """Show how many steps of `total` (None if unknown) are done, and a text after the bar."""
        self._progress.update(self._task, completed=done, total=total, more=more)

    def print_line(self, line: str) -> None:
        """Print a permanent line above the bar."""
        self._progress.console.print(line, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(name: str) -> Iterator[Bar]:
    """Show `name` with a bar while the block runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, TextColumn("{task.fields[more]}"), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        yield Bar(progress, progress.add_task(name, total=None, more=""))


# --- output -----------------------------------------------------------------------------------------------------------

_ERROR_HANDLER = "normswap_printable"
_ASCII_REPLACEMENTS = {"…": "...", "\u2013": "-", "\u2014": "-"}


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document on stdout; infinity and NaN become null."""
    click.echo(json.dumps(jsonable(document), indent=2))


def make_output_printable() -> None:
    """Let stdout and stderr write letters that their encoding lacks as `...`, `-` or an escape instead of raising."""
    codecs.register_error(_ERROR_HANDLER, _replace_unencodable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors=_ERROR_HANDLER)


def _replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_ASCII_REPLACEMENTS.get(letter, ascii(letter)[1:-1]) for letter in letters), error.end


# --- errors -----------------------------------------------------------------------------------------------------------

_INTERRUPTED = 130  # the exit code that shells use for SIGINT


def one_line_failures(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command so that expected errors become one line on stderr and an exit code, and own warnings one line.

    Other errors are defects and keep their traceback.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        """Replaced by the text of the command."""
        try:
            with _one_line_warnings():
                command(*args, **kwargs)
        except NormswapError as error:
            _exit(translate_arguments(str(error)), error.exit_code)
        except OSError as error:
            if error.filename is None:
                raise
            _exit(f"{error.filename}: {error.strerror}", NormswapError.exit_code)
        except KeyboardInterrupt as stop:
            print_error(str(stop) or "interrupted")
            sys.exit(_INTERRUPTED)

    return run


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show warnings of this package without their place in its code while the block runs."""
    format_others, package = warnings.formatwarning, str(Path(__file__).parents[1])

    def format_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        """Return the text of a warning."""
        if filename.startswith(package):
            return f"warning: {translate_arguments(str(message))}\n"
        return format_others(message, category, filename, lineno, line)

    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = format_others


def _exit(message: str, status: int) -> NoReturn:
    # File names may contain control sequences, or letters that the terminal cannot show.
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(message.split()))
    print_error(click.style("error: ", fg="red") + shown)
    sys.exit(status)


@contextmanager
def report_interruption(written: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Add to an interruption of the block whether a file was written.

    Args:
        written: returns the name of the file that was written, None if there is none.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {written() or 'nothing'} was written") from None


# --- arguments in messages --------------------------------------------------------------------------------------------
# Messages of the library name its arguments (`trust=True`); the command line shows the option instead (`--trust`).


class _Option(NamedTuple):
    """An option of the command line, and how it writes the value of the argument; None if it takes none."""

    name: str
    value: Callable[[str], str] | None = None


def _strip_quotes(value: str) -> str:
    return value.strip("'\"")


def _join_words(value: str) -> str:
    return ",".join(word.strip(" '\"") for word in value.strip("()[]").split(",") if word.strip())


def _join_sizes(value: str) -> str:
    return "x".join(re.findall(r"\d+", value))


OPTIONS: Mapping[str, _Option] = {
    "against": _Option("--against", _strip_quotes),
    "architecture": _Option("--arch", _strip_quotes),
    "batch_size": _Option("--batch-size", _strip_quotes),
    "bn_statistics": _Option("--bn-statistics", _strip_quotes),
    "budget": _Option("--budget", _strip_quotes),
    "data": _Option("--data"),
    "discard": _Option("--discard"),
    "dry_run": _Option("--dry-run"),
    "dtype": _Option("--dtype", _strip_quotes),
    "entry": _Option("--entry", _strip_quotes),
    "example_inputs": _Option("--input", _join_sizes),
    "exclude": _Option("--exclude", _join_words),
    "fold": _Option("--no-fold"),
    "gate": _Option("--gate", _strip_quotes),
    "graph": _Option("--graph", _strip_quotes),
    "image_size": _Option("--input-size", _join_sizes),
    "include": _Option("--include", _join_words),
    "include_frozen": _Option("--include-frozen"),
    "kinds": _Option("--kinds", _join_words),
    "layer_by_layer": _Option("--layer-by-layer"),
    "match": _Option("--no-match"),
    "node_data_file": _Option("--node-data", _strip_quotes),
    "num_groups": _Option("--groups", _strip_quotes),
    "opset": _Option("--opset", _strip_quotes),
    "output": _Option("-o", _strip_quotes),
    "overwrite": _Option("--force"),
    "overrides": _Option("--set", _join_words),
    "plan": _Option("--plan", _strip_quotes),
    "png": _Option("--png", _strip_quotes),
    "resume": _Option("--resume"),
    "start": _Option("--start", _strip_quotes),
    "synchronize": _Option("--synchronize"),
    "tolerance": _Option("--tolerance", _strip_quotes),
    "to": _Option("--to", _strip_quotes),
    "trust": _Option("--trust"),
    "untrained": _Option("--untrained", _strip_quotes),
    "verify": _Option("--no-verify"),
    "weights_only": _Option("--weights-only"),
}
# A name with its value, which may be left out; and the option itself in brackets, if a message names both. The first
# argument of a call (`save(plan=...)`) is Python code, not an option.
_VALUE = r"""('[^']*'|"[^"]*"|torch\.randn\([^)]*\)|\([^)]*\)|\[[^\]]*\]|[\w.\-]+)?(?: \(--[\w\-]+[^)]*\))?"""
_ARGUMENT = re.compile(rf"(?<![\w.\-])(?<!\w\()({'|'.join(OPTIONS)})(?:={_VALUE}|(?=: expected))")


# Calls that notes recommend, as commands; empty where the commands do it anyway.
_CALLS: Mapping[str, str] = {
    " Measure the distance with normswap.measure_distance.": "",
    "normswap.calibrate(model, batches, only=...)": "normswap calibrate --data ... --only ...",
}


def translate_arguments(message: str) -> str:
    """Return a message of the library with the options of the command line instead of Python's arguments."""
    for call, command in _CALLS.items():
        message = message.replace(call, command)
    return _ARGUMENT.sub(_to_option, message)


def translate_plan(plan: "SwapPlan") -> "SwapPlan":
    """Return a plan whose notes and reasons name options of the command line instead of Python's arguments."""
    skips = tuple(replace(skip, reason=translate_arguments(skip.reason)) for skip in plan.skips)
    return replace(plan, skips=skips, notes=tuple(map(translate_arguments, plan.notes)))


def _to_option(match: re.Match[str]) -> str:
    option, value = OPTIONS[match[1]], match[2]
    shown = option.value(value) if option.value and value else ""
    return f"{option.name} {shown}".rstrip()


# --- several processes of one launcher --------------------------------------------------------------------------------
# torchrun starts the same command in every process: the first one prints, and an error is printed once.

# torchrun, and all programs that start processes through it, set this in each process. RANK alone may be a leftover.
_LAUNCHER_VARIABLE = "TORCHELASTIC_RUN_ID"
_MULTIPROCESS_COMMANDS = ("finetune",)
_STORE_TIMEOUT = timedelta(seconds=5)

# The stream for errors while the streams of this process are silenced.
_errors: TextIO | None = None


def rank() -> int | None:
    """Return the number of this process among those of a launcher, None without a launcher."""
    return int(os.environ.get("RANK", "0")) if _LAUNCHER_VARIABLE in os.environ else None


class LauncherAwareGroup(click.Group):
    """The command line. In processes of a launcher other than the first it prints errors only, or does nothing."""

    def main(self, args: Sequence[str] | None = None, *positional: Any, **options: Any) -> Any:
        """Run the command; a command for one process runs in the first process only."""
        args = list(sys.argv[1:] if args is None else args)
        if not rank():
            return super().main(args, *positional, **options)
        if not args or args[0] not in _MULTIPROCESS_COMMANDS:
            # Printed for a training script that starts a command of its own and waits for its output.
            command = " ".join(["normswap", *args[:1]])
            click.echo(
                f"process {rank()} of a launcher such as torchrun: nothing done, because only `normswap finetune` "
                "runs in all processes and every other command in process 0; to run it here: env -u "
                f"{_LAUNCHER_VARIABLE} {command} ...",
                err=True,
            )
            return None
        with _silence_output():
            return super().main(args, *positional, **options)


@contextmanager
def _silence_output() -> Iterator[None]:
    """Print nothing but errors while the block runs; an unexpected error leaves the block with its traceback."""
    global _errors
    streams = sys.stdout, sys.stderr
    _errors = sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as devnull:
        sys.stdout = sys.stderr = devnull
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            _errors = None


def print_error(message: str) -> None:
    """Print a message on stderr; if several processes of a launcher have the same message, once, with the rank."""
    number = rank()
    if number is None:
        click.echo(message, err=True)
    elif _is_first_to_report(message, os.environ):
        click.echo(f"[rank {number}] {message}", file=_errors or sys.stderr)


def _is_first_to_report(message: str, environment: Mapping[str, str]) -> bool:
    """Whether no process of this launcher has printed a message yet, according to the launcher's store."""
    if environment.get("WORLD_SIZE", "1") == "1":
        return True
    distributed: Any = importlib.import_module("torch.distributed")
    try:
        host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        store = distributed.TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT)
        digest = sha256(message.encode()).hexdigest()
        number = store.add(
            f"normswap/{environment[_LAUNCHER_VARIABLE]}/{environment.get('TORCHELASTIC_RESTART_COUNT')}/{digest}", 1
        )
    except (RuntimeError, KeyError, ValueError):
        return True  # twice is better than never
    return bool(number == 1)
