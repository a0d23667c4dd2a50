"""The names under which a file stores a model's tensors, and the model's own names for them.

Training code wraps models (`module.` by data parallelism, `_orig_mod.` by torch.compile, `model.` or `net.` by those
who hold the network as an attribute), in any order and nesting. Names go in, names come out, both ways; nothing here
reads tensors.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from normswap.errors import CheckpointError

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
_WRAPPER_PART = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# By so many of its longest names a model is looked for; if these give more prefixes, they are no names of its own.
_PROBES, _MAX_CANDIDATES = 3, 40
# A first part of names that is to be a prefix stands before so many of them; so many such parts are tried.
_MIN_KEYS, _MAX_PARTS = 4, 6


Rename = Callable[[str], str]


@dataclass(frozen=True)
class StoredNames:
    """How a file names the tensors of one model: `stored` by the model's own name, `foreign` those of something else
    (a criterion, a counter of averages), and the prefix before the model's own. `copies` are further copies of the
    whole model in the same file, which have the same names under other prefixes. `rename` makes the model's own name of
    one in the file without that prefix, for libraries that save under other names than a model has.
    """

    prefix: str
    stored: Mapping[str, str]
    foreign: tuple[str, ...]
    copies: "tuple[StoredNames, ...]" = ()
    rename: Rename | None = field(default=None, compare=False)

    def stored_key(self, name: str) -> str:
        """Return the name under which a new tensor `name` is stored beside those of the module that owns it."""
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
        """By module, what stands before the names of its own tensors in the file."""
        return {
            name.rpartition(".")[0]: key.removesuffix(name.rpartition(".")[2])
            for name, key in self.stored.items()
            if "." in name
        }


def find_prefixes(keys: Iterable[str]) -> list[str]:
    """Return every prefix that may stand before a model's own names in `keys`, the shortest ("") first."""
    found = {""}
    for whole in {match.group() for key in keys if (match := _PREFIX.match(key))}:
        parts = whole.split(".")[:-1]
        found |= {"".join(f"{part}." for part in parts[:count]) for count in range(1, len(parts) + 1)}
    return sorted(found, key=len)


def names_with_prefix(keys: Iterable[str], prefix: str, rename: Rename | None = None) -> StoredNames:
    """Return the names of those `keys` that begin with `prefix`, without what wrappers put in, and renamed."""
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
    """Return the names under the prefix that gives most of the `wanted` names of a model; the shortest of equals.

    Keys that no wanted name stands for stay among the model's own where everything has that prefix, so that a file
    which does not fit is told by its own names; beside a prefix they are foreign.

    Args:
        prefix: what the prefix has to begin with.
        rename: applied if it gives more of the wanted names.
    """
    wanted = set(wanted)
    renames = [None] if rename is None else [None, rename]

    def best(prefixes: Collection[str]) -> StoredNames:
        found = [
            names_with_prefix(keys, each, rename_option)
            for rename_option in renames
            for each in prefixes
            if each.startswith(prefix)
        ]
        return max(found or [names_with_prefix(keys, prefix)], key=lambda names: len(wanted & names.stored.keys()))

    candidates, wrappers = _candidate_prefixes(keys, wanted), find_prefixes(keys)
    chosen = best(candidates)
    disjoint = [each for each in candidates if not (each.startswith(chosen.prefix) or chosen.prefix.startswith(each))]
    # A single prefix that is no wrapper's is left to be told; copies of one model may have any.
    return chosen if prefix or chosen.prefix in wrappers or disjoint else best(wrappers)


def match_names_and_copies(
    tensors: Mapping[str, Any], wanted: Collection[str], *, prefix: str = "", rename: Rename | None = None
) -> StoredNames:
    """Return the names of a model as `match_names` does, and those of further copies of it under other prefixes.

    Args:
        tensors: a state dict by key; what has no shape is no tensor.
        wanted: the model's own names of its tensors.
        prefix: what the user says that the prefix begins with; other copies may then differ.
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
                f"holds two models, under {chosen.prefix!r} and {each!r}, that differ ({difference}): say which, such "
                f"as entry={first or second!r}"
            )
    if not copies:
        return chosen
    keys = {key for copy in copies for key in copy.stored.values()}
    stored = {name: key for name, key in chosen.stored.items() if key not in keys}
    foreign = tuple(key for key in chosen.foreign if key not in keys)
    return replace(chosen, stored=stored, foreign=foreign, copies=tuple(copies))


def find_leading_parts(keys: Collection[str]) -> list[str]:
    """Return the first parts of names that may each stand before a model's own: `student.`, `teacher.`."""
    counts = Counter(key.partition(".")[0] for key in keys if key.count(".") > 1)
    return [f"{part}." for part, count in counts.most_common(_MAX_PARTS) if count >= _MIN_KEYS]


def _candidate_prefixes(keys: Collection[str], wanted: Collection[str]) -> list[str]:
    """Every prefix that may stand before the wanted names, the shortest first: of wrappers, or of any other name."""
    probes = sorted(wanted, key=len)[-_PROBES:]
    bare = [_WRAPPER_PART.sub("", key) for key in keys]
    found = {
        key.removesuffix(probe)
        for probe in probes
        for key in bare
        if key.endswith(probe) and key.removesuffix(probe).endswith(".")
    }
    # Names such as `weight` end half of all keys and tell nothing.
    return sorted({*find_prefixes(keys), *(found if len(found) <= _MAX_CANDIDATES else ())}, key=lambda p: (len(p), p))


def _matched_shapes(
    names: StoredNames, wanted: Collection[str], tensors: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """The shapes under those of a model's names that are there."""
    return {name: _get_shape(tensors[key]) for name, key in names.stored.items() if name in wanted}


def _describe_difference(
    chosen: StoredNames,
    other: StoredNames,
    own_shapes: Mapping[str, tuple[int, ...]],
    other_shapes: Mapping[str, tuple[int, ...]],
    wanted: Collection[str],
    tensors: Mapping[str, Any],
) -> str | None:
    """What is different in two copies, or None: a name that only one has, or another shape."""
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
