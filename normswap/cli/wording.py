"""Messages of the library in the words of the command line: Python's arguments as options.

The library names the arguments of its own functions (`trust=True`, `architecture='timm:resnet18'`), since it does not
know who calls it. Here each becomes the option that means the same (`--trust`, `--arch timm:resnet18`).
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple


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
    "architecture": _Option("--arch", _strip_quotes),
    "entry": _Option("--entry", _strip_quotes),
    "example_inputs": _Option("--input", _join_sizes),
    "exclude": _Option("--exclude", _join_words),
    "gate": _Option("--gate", _strip_quotes),
    "image_size": _Option("--input-size", _join_sizes),
    "include": _Option("--include", _join_words),
    "include_frozen": _Option("--include-frozen"),
    "kinds": _Option("--kinds", _join_words),
    "layer_by_layer": _Option("--layer-by-layer"),
    "overwrite": _Option("--force"),
    "overrides": _Option("--set", _join_words),
    "resume": _Option("--resume"),
    "tolerance": _Option("--tolerance", _strip_quotes),
    "trust": _Option("--trust"),
}
# A name with its value, which may be left out; and the option itself in brackets, where a message names both.
_VALUE = r"""('[^']*'|"[^"]*"|torch\.randn\([^)]*\)|\([^)]*\)|\[[^\]]*\]|[\w.\-]+)?(?: \(--[\w\-]+[^)]*\))?"""
_ARGUMENT = re.compile(rf"(?<![\w.\-])({'|'.join(OPTIONS)})(?:={_VALUE}|(?=: expected))")


def translate_arguments(message: str) -> str:
    """Return a message of the library with the arguments that it names as options of the command line."""
    return _ARGUMENT.sub(_to_option, message)


def _to_option(match: re.Match[str]) -> str:
    option, value = OPTIONS[match[1]], match[2]
    shown = option.value(value) if option.value and value else ""
    return f"{option.name} {shown}".rstrip()
