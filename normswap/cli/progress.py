"""The stage that is running, and how far it has come, on stderr and only on a terminal; gone when it is through."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Show `name` with a spinner and the seconds gone by while the block runs."""
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
    """A bar on stderr, and lines above it; without a terminal the lines alone."""

    def __init__(self, progress: "Progress", task: "TaskID") -> None:
        self._progress, self._task = progress, task

    def show(self, done: int, total: int | None, more: str = "") -> None:
        """Show how much is done, of how much (None if that is unknown), and a text behind it."""
        self._progress.update(self._task, completed=done, total=total, more=more)

    def print_line(self, line: str) -> None:
        """Print a line that stays."""
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


@contextmanager
def report_interruption() -> Iterator[None]:
    """Say of an interruption of the block that nothing was written."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; nothing was written") from None
