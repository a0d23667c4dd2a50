"""The keys of a model's tensors in a file, and the model's own names for them.

Training code wraps models, in any order and nesting: DataParallel adds `module.`, torch.compile `_orig_mod.`, a
LightningModule `model.` or `net.`. This module maps the keys in a file to the names in the model and back; it needs
shapes only to compare copies of a model in one file.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from normswap.errors import CheckpointError

# The attribute names under which wrappers store a model.
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
# Wrappers around parts of a model add these inside names, too; no network has a child with such a name.
_WRAPPER_PART = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The number of longest names that the search for a model uses; if they give more prefixes, they are too common.
_PROBES, _MAX_CANDIDATES = 3, 40
# The number of keys that a first part must have to be tried as a prefix, and the number of parts that are tried.
_MIN_KEYS, _MAX_PARTS = 4, 6


Rename = Callable[[str], str]


@dataclass(frozen=True)
class StoredNames:
    """The keys of one model's tensors in a file.

    Attributes:
        prefix: what the keys of the model start with.
        stored: the model's own name -> key in the file.
        foreign: keys of other objects (a criterion, a counter of averages).
        copies: further copies of the whole model in the file, with the same names under other prefixes.
        rename: returns the model's own name for a key without its prefix, for libraries that save under other names.
    """

    prefix: str
    stored: Mapping[str, str]
    foreign: tuple[str, ...]
    copies: "tuple[StoredNames, ...]" = ()
    rename: Rename | None = field(default=None, compare=False)

    def stored_key(self, name: str) -> str:
        """Return the key for a new tensor `name`, with the same prefix as the other tensors of its module."""
        owner, _, last = name.rpartition(".")
        tail = ""
        while owner:
            sibling = self._module_prefixes.get(owner)
            if sibling is not None:
                return f"{sibling}{tail}{last}"
            owner, _, child = owner.rpartition(".")
            tail = f"{child}.{tail}"
        return f"{self.prefix}{name}"

    @cached_property
    def _module_prefixes(self) -> dict[str, str]:
        """Module -> what the keys of its tensors start with."""
        return {
            name.rpartition(".")[0]: key.removesuffix(name.rpartition(".")[2])
            for name, key in self.stored.items()
            if "." in name
        }


def find_prefixes(keys: Iterable[str]) -> list[str]:
    """Return every prefix of wrappers in `keys`, the shortest (`""`) first."""
    found = {""}
    for whole in {match.group() for key in keys if (match := _PREFIX.match(key))}:
        parts = whole.split(".")[:-1]
        found |= {"".join(f"{part}." for part in parts[:count]) for count in range(1, len(parts) + 1)}
    return sorted(found, key=len)


def names_with_prefix(keys: Iterable[str], prefix: str, rename: Rename | None = None) -> StoredNames:
    """Return the model's own names of those `keys` that start with `prefix`, without parts of wrappers, and renamed."""
    stored: dict[str, str] = {}
    foreign: list[str] = []
    for key in keys:
        name = _WRAPPER_PART.sub("", key.removeprefix(prefix))
        name = rename(name) if rename is not None else name
        if key.startswith(prefix) and name not in stored:
            stored[name] = key
        else:
            foreign.append(key)
    return StoredNames(prefix, stored, tuple(foreign), rename=rename)


def match_names(
    keys: Collection[str], wanted: Collection[str], *, prefix: str = "", rename: Rename | None = None
) -> StoredNames:
    """Return the names under the prefix that matches most of the `wanted` names; the shortest of equal ones.

    Keys with the chosen prefix that match no wanted name stay in `stored`, so that error messages about a file that
    does not fit show its own names. Keys without the prefix are `foreign`.

    Args:
        keys: the keys in the file.
        wanted: the names of the model's tensors.
        prefix: what the prefix must start with.
        rename: applied if it matches more of the wanted names.
    """
    wanted = set(wanted)
    renames = [None] if rename is None else [None, rename]

    def choose_best(prefixes: Collection[str]) -> StoredNames:
        """The names under the prefix, and with or without `rename`, that match most."""
        found = [
            names_with_prefix(keys, each, rename_option)
            for rename_option in renames
            for each in prefixes
            if each.startswith(prefix)
        ]
        return max(found or [names_with_prefix(keys, prefix)], key=lambda names: len(wanted & names.stored.keys()))

    candidates, wrappers = _candidate_prefixes(keys, wanted), find_prefixes(keys)
    chosen = choose_best(candidates)
    disjoint = [each for each in candidates if not (each.startswith(chosen.prefix) or chosen.prefix.startswith(each))]
    # The user must name a single prefix that no wrapper has; several copies of one model may have any prefixes.
    return chosen if prefix or chosen.prefix in wrappers or disjoint else choose_best(wrappers)


def match_names_and_copies(
    tensors: Mapping[str, Any], wanted: Collection[str], *, prefix: str = "", rename: Rename | None = None
) -> StoredNames:
    """Return the names of a model as `match_names` does, with further copies of the model under other prefixes.

    Args:
        tensors: a state dict.
        wanted: the names of the model's tensors.
        prefix: what the prefix must start with, as selected by the user; other copies may then differ.
        rename: as for `match_names`.

    Raises:
        CheckpointError: without `prefix`, two copies differ in names or shapes.
    """
    chosen = match_names(tensors, wanted, prefix=prefix, rename=rename)
    own_shapes = _matched_shapes(chosen, wanted, tensors)
    used_keys = {chosen.stored[name] for name in own_shapes}
    copies = []
    for each in _candidate_prefixes(tensors, set(wanted)) if own_shapes else ():
        other = names_with_prefix(tensors, each, chosen.rename)
        other_shapes = _matched_shapes(other, wanted, tensors)
        used = {other.stored[name] for name in other_shapes}
        if used & used_keys or 2 * len(other_shapes) < len(own_shapes) or not other_shapes:
            continue
        used_keys |= used
        difference = _describe_difference(chosen, other, own_shapes, other_shapes, wanted, tensors)
        if difference is None:
            copies.append(other)
        elif not prefix:
            first, second = (names.prefix.rstrip(".") for names in (chosen, other))
            raise CheckpointError(
                f"has two different models, under {chosen.prefix!r} and {each!r} ({difference}): select one, such as "
                f"entry={first or second!r}"
            )
    if not copies:
        return chosen
    keys = {key for copy in copies for key in copy.stored.values()}
    stored = {name: key for name, key in chosen.stored.items() if key not in keys}
    foreign = tuple(key for key in chosen.foreign if key not in keys)
    return replace(chosen, stored=stored, foreign=foreign, copies=tuple(copies))


def find_leading_parts(keys: Collection[str]) -> list[str]:
    """Return the first parts of keys that may be the prefix of a model, such as `student.` and `teacher.`."""
    counts = Counter(key.partition(".")[0] for key in keys if key.count(".") > 1)
    return [f"{part}." for part, count in counts.most_common(_MAX_PARTS) if count >= _MIN_KEYS]


def _candidate_prefixes(keys: Collection[str], wanted: Collection[str]) -> list[str]:
    """Every prefix before the wanted names, of wrappers or any other, the shortest first."""
    probes = sorted(wanted, key=len)[-_PROBES:]
    bare = [_WRAPPER_PART.sub("", key) for key in keys]
    found = {
        key.removesuffix(probe)
        for probe in probes
        for key in bare
        if key.endswith(probe) and key.removesuffix(probe).endswith(".")
    }
    # Half of all keys end with names such as `weight`, which identify no model.
    return sorted({*find_prefixes(keys), *(found if len(found) <= _MAX_CANDIDATES else ())}, key=lambda p: (len(p), p))


def _matched_shapes(
    names: StoredNames, wanted: Collection[str], tensors: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the wanted tensors in the file, by the model's own names."""
    return {name: _get_shape(tensors[key]) for name, key in names.stored.items() if name in wanted}


def _describe_difference(
    chosen: StoredNames,
    other: StoredNames,
    own_shapes: Mapping[str, tuple[int, ...]],
    other_shapes: Mapping[str, tuple[int, ...]],
    wanted: Collection[str],
    tensors: Mapping[str, Any],
) -> str | None:
    """The difference of two copies (a name that only one has, or another shape), or None."""
    unmatched = sorted(own_shapes.keys() ^ other_shapes.keys())
    if chosen.prefix:
        extra = [_extra_names(names, wanted, tensors) for names in (chosen, other)]
        unmatched += sorted(extra[0] ^ extra[1])
    if unmatched:
        more = f" and {len(unmatched) - 1} more" if len(unmatched) > 1 else ""
        return f"{unmatched[0]}{more} in one of them only"
    for name, shape in own_shapes.items():
        if other_shapes[name] != shape:
            sizes = [_format_shape(size) for size in (shape, other_shapes[name])]
            return f"{name} is {sizes[0]} in one and {sizes[1]} in the other"
    return None


def _extra_names(names: StoredNames, wanted: Collection[str], tensors: Mapping[str, Any]) -> set[str]:
    return {name for name, key in names.stored.items() if name not in wanted and _get_shape(tensors[key])}


def _get_shape(tensor: Any) -> tuple[int, ...]:
    return tuple(getattr(tensor, "shape", ()))


def _format_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"
