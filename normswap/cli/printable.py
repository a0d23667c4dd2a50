"""Output that every terminal takes: where its encoding lacks a letter, that letter is written another way."""

import codecs
import io
import sys

_ERRORS = "normswap_printable"
_PLAIN = {"…": "...", "\u2013": "-", "\u2014": "-"}


def make_output_printable() -> None:
    """Let stdout and stderr write what their encoding lacks as `...`, `-` or an escape instead of raising."""
    codecs.register_error(_ERRORS, _written_otherwise)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors=_ERRORS)


def _written_otherwise(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_PLAIN.get(letter, ascii(letter)[1:-1]) for letter in letters), error.end
