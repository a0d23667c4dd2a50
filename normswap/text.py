"""Text and plain data: JSON values, names of modules, and results that print as tables.

A result class gets its table from `normswap.reports`, which imports the result classes. `printable_as` therefore
imports `normswap.reports` only when a result is printed, so that results do not depend on reports or on rich.
"""

import importlib
import io
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

_REPORTS = "normswap.reports.results"
_WIDTH = 100


def jsonable(value: Any) -> Any:
    """Return nested plain data with lists for tuples, and with None for infinity and NaN, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def pluralize(number: int, noun: str) -> str:
    """Return a number with its noun: `1 swap`, `20 swaps`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def join_fqn(owner: str, name: str) -> str:
    """Return the fully qualified name of `name` in the module named `owner`, which is "" for the model itself."""
    return f"{owner}.{name}" if owner else name


# --- results that print as tables -------------------------------------------------------------------------------------


def printable_as(table: str) -> Callable[[type[T]], type[T]]:
    """Return a class decorator that adds `__str__` and `_repr_html_`, which print a table.

    Args:
        table: the name of a function in `normswap.reports.results` that takes the result and returns an object that
            rich can print.
    """

    def decorate(cls: type[T]) -> type[T]:
        """Return the class, changed in place."""
        result_class: Any = cls
        result_class.__str__ = lambda result: _text(table, result)
        result_class._repr_html_ = lambda result: _html(table, result)
        return cls

    return decorate


def _text(table: str, result: object) -> str:
    _, file = _print_table(table, result)
    lines = (line.rstrip() for line in file.getvalue().splitlines())
    return "\n".join(lines).strip("\n")


def _html(table: str, result: object) -> str:
    console, _ = _print_table(table, result)
    page: str = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
    return page


def _print_table(table: str, result: object) -> tuple[Any, io.StringIO]:
    """Print the table of a result on a recording console; return the console and its output."""
    reports: Any = importlib.import_module(_REPORTS)
    file = io.StringIO()
    console = reports.recording_console(file, _WIDTH)
    console.print(getattr(reports, table)(result))
    return console, file
