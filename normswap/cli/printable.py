"""Output that every terminal takes: where its encoding lacks a letter, that letter is written another way."""

import codecs
import io
import sys

_ERROR_HANDLER = "normswap_printable"
_ASCII_REPLACEMENTS = {"…": "...", "\u2013": "-", "\u2014": "-"}


def make_output_printable() -> None:
    """Let stdout and stderr write what their encoding lacks as `...`, `-` or an escape instead of raising."""
    codecs.register_error(_ERROR_HANDLER, _replace_unencodable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors=_ERROR_HANDLER)


def _replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_ASCII_REPLACEMENTS.get(letter, ascii(letter)[1:-1]) for letter in letters), error.end
