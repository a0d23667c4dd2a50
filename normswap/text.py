"""Results that print themselves: `repr` in one line, `str` and notebooks as the tables of the command line.

The tables are made in `normswap/reports/`, which imports the classes of the results; it is imported by its name when a
result is printed, so that results know of no report and rich costs nothing before.
"""

import importlib
import io
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

# MERGED DOC: Plain data as JSON knows it: mappings with text keys, lists, and no number that is none.


def jsonable(value: Any) -> Any:
    """Return nested plain data with tuples as lists, and with None in place of infinity and NaN."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


T = TypeVar("T")

_REPORTS = "normswap.reports.results"
_WIDTH = 100


def printable_as(table: str) -> Callable[[type[T]], type[T]]:
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


def pluralize(number: int, noun: str) -> str:
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


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def join_fqn(owner: str, name: str) -> str:
    """Return the fqn of `name` inside the module called `owner`, which is "" for the root."""
    return f"{owner}.{name}" if owner else name
