"""The names under which a file stores a model's tensors, and the model's own names for them.

Training code wraps models (`module.` by data parallelism, `_orig_mod.` by torch.compile, `model.` or `net.` by those
who hold the network as an attribute), in any order and nesting. Names go in, names come out, both ways; nothing here
reads tensors.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

# What a wrapper calls the model inside it.
WRAPPERS = (
    "module",
    "_orig_mod",
    "model",
    "net",
    "network",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "online_model",
    "ema_model",
    "encoder",
    "backbone",
)
_PREFIX = re.compile(rf"(?:(?:{'|'.join(WRAPPERS)})\.)*")
# Put inside names, too, by wrappers around parts of a model; no network calls a child so.
_INSIDE = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


Rename = Callable[[str], str]


@dataclass(frozen=True)
class StoredNames:
    """How a file names the tensors of one model: `stored` by the model's own name, `foreign` those of something else
    (a criterion, a counter of averages), and the prefix before the model's own. `rename` makes the model's own name of
    one in the file without that prefix, for libraries that save under other names than a model has.
    """

    prefix: str
    stored: Mapping[str, str]
    foreign: tuple[str, ...]
    rename: Rename | None = field(default=None, compare=False)

    def to_store(self, name: str) -> str:
        """Return the name under which a new tensor `name` is stored beside those of the module that owns it."""
        owner, _, last = name.rpartition(".")
        tail = ""
        while owner:
            sibling = self._places.get(owner)
            if sibling is not None:
                return f"{sibling}{tail}{last}"
            owner, _, child = owner.rpartition(".")
            tail = f"{child}.{tail}"
        return f"{self.prefix}{name}"

    @cached_property
    def _places(self) -> dict[str, str]:
        """By module, what stands before the names of its own tensors in the file."""
        return {
            name.rpartition(".")[0]: key.removesuffix(name.rpartition(".")[2])
            for name, key in self.stored.items()
            if "." in name
        }


def prefixes_of(keys: Iterable[str]) -> list[str]:
    """Return every prefix that may stand before a model's own names in `keys`, the shortest ("") first."""
    found = {""}
    for whole in {match.group() for key in keys if (match := _PREFIX.match(key))}:
        parts = whole.split(".")[:-1]
        found |= {"".join(f"{part}." for part in parts[:count]) for count in range(1, len(parts) + 1)}
    return sorted(found, key=len)


def names_under(keys: Iterable[str], prefix: str, rename: Rename | None = None) -> StoredNames:
    """Return the names of those `keys` that begin with `prefix`, without what wrappers put in, and renamed."""
    stored: dict[str, str] = {}
    foreign: list[str] = []
    for key in keys:
        name = _INSIDE.sub("", key.removeprefix(prefix))
        name = rename(name) if rename is not None else name
        if key.startswith(prefix) and name not in stored:
            stored[name] = key
        else:
            foreign.append(key)
    return StoredNames(prefix, stored, tuple(foreign), rename)


def names_for(keys: Collection[str], wanted: Collection[str], rename: Rename | None = None) -> StoredNames:
    """Return the names under the prefix that gives most of the `wanted` names of a model; the shortest of equals.

    They are renamed if that gives more.

    Keys that no wanted name stands for stay among the model's own where everything has that prefix, so that a file
    which does not fit is told by its own names; beside a prefix they are foreign.
    """
    wanted = set(wanted)
    ways = [None] if rename is None else [None, rename]
    candidates = [names_under(keys, prefix, way) for way in ways for prefix in prefixes_of(keys)]
    return max(candidates, key=lambda names: len(wanted & names.stored.keys()))
