"""What a pickle names, read from its opcodes: nothing is imported or called for it."""

import pickletools
import re
from collections.abc import Iterable
from typing import IO, Any

from normswap.checkpoints.plain_globals import plain_names

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
        found |= _named_globals(pickle)
    harmless = plain_names()
    blocked = (name for name in found if not re.match(_HARMLESS, name) and _modern(name) not in harmless)
    return sorted(blocked, key=lambda name: (name.partition(".")[0] in _EXPECTED_MODULES, name))


def _modern(name: str) -> str:
    """Pickles of protocol 2 use the module names of Python 2."""
    return name.replace("__builtin__.", "builtins.")


def _named_globals(file: IO[bytes]) -> set[str]:
    """Read one pickle's opcodes without acting on them; a damaged rest is not read."""
    found: set[str] = set()
    strings: list[str] = []
    memo: dict[int, str] = {}
    try:
        argument: Any
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                found.add(".".join(argument.split(" ", 1)))
            elif opcode.name == "STACK_GLOBAL":
                found.add(".".join(strings[-2:]))
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = strings[-1] if strings else ""
            elif opcode.name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[int(argument)] = strings[-1] if strings else ""
            elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
                strings.append(memo.get(int(argument), ""))
            elif isinstance(argument, str):
                strings.append(argument)
    except Exception:  # noqa: BLE001 - as in decode
        return found
    return found
