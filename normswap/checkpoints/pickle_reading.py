"""Which code a pickle names beside plain data, for whoever has to decide whether to trust it."""

import re
from collections.abc import Iterable
from typing import IO

from normswap.checkpoints.opcodes import read_opcodes
from normswap.checkpoints.plain_globals import plain_names
from normswap.surgery.tracing import first_line

# Whose globals are listed last, since every pickled network names hundreds of them.
_EXPECTED_MODULES = {"torch", "timm", "torchvision", "normswap", "collections"}
_HARMLESS = (
    r"torch\._utils\._rebuild_|torch\.(storage\.)?\w*Storage$|collections\.OrderedDict$|torch\.Size$|"
    r"__builtin__\.set$|torch\.\w*\d+$|_codecs\.encode$"
)


def blocked_globals(pickles: Iterable[IO[bytes]]) -> list[str]:
    """Return the globals that these pickles name and that are not known to be harmless, the unexpected ones first."""
    found: set[str] = set()
    for pickle in pickles:
        found |= read_opcodes(pickle).names
    harmless = plain_names()
    blocked = (name for name in found if not re.match(_HARMLESS, name) and _modern(name) not in harmless)
    return sorted(blocked, key=lambda name: (name.partition(".")[0] in _EXPECTED_MODULES, name))


def told_by_torch(error: BaseException) -> str:
    """Return the heart of torch's long advice, in one line."""
    return first_line(Exception(str(error).partition("WeightsUnpickler error:")[2] or first_line(error)))


def _modern(name: str) -> str:
    """Pickles of protocol 2 use the module names of Python 2."""
    return name.replace("__builtin__.", "builtins.")
