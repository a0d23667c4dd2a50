"""Results that print themselves: `repr` in one line, `str` and notebooks as the tables of the command line.

The tables are made in `normswap/reports/`, which imports the classes of the results; it is imported by its name when a
result is printed, so that results know of no report and rich costs nothing before.
"""

import importlib
import io
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_REPORTS = "normswap.reports.results"
_WIDTH = 100


def printed_as(table: str) -> Callable[[type[T]], type[T]]:
    """Give a class of results `str()` and `_repr_html_()` by a function of `normswap.reports.results`.

    Args:
        table: the name of the function, which takes the result and returns something that rich prints.
    """

    def decorate(cls: type[T]) -> type[T]:
        result_class: Any = cls
        result_class.__str__ = lambda result: _text(table, result)
        result_class._repr_html_ = lambda result: _html(table, result)
        return cls

    return decorate


def counted(number: int, noun: str) -> str:
    """Return a number of things in words: `1 swap`, `20 swaps`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def _text(table: str, result: object) -> str:
    _, file = _console(table, result)
    lines = (line.rstrip() for line in file.getvalue().splitlines())
    return "\n".join(lines).strip("\n")


def _html(table: str, result: object) -> str:
    console, _ = _console(table, result)
    page: str = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    return page


def _console(table: str, result: object) -> tuple[Any, io.StringIO]:
    """A console on which the table of a result was printed, and what it printed."""
    reports: Any = importlib.import_module(_REPORTS)
    file = io.StringIO()
    console = reports.recording_console(file, _WIDTH)
    console.print(getattr(reports, table)(result))
    return console, file
