"""The shipped index of architectures: which tensors each has, which dimensions its arguments set, what it computes.

One file, read whole: names and shapes once each, and per architecture a run of pairs of their numbers, so that a state
dict is held against all of them with a few array operations and no zoo is imported. `python -m
benchmarks.architectures.build_index` writes it.
"""

import functools
import itertools
import json
import lzma
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normswap.errors import ArchitectureError

Shape = tuple[int, ...]

_MAGIC = b"normswap architectures 1\n"
_FILE = "architectures.bin"
# No argument of a network that fits a machine is larger: a shape that says so is no evidence for one.
_MAX_ARGUMENT = 2**31
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**24, "lc": 4, "lp": 0}]


class Symbol(NamedTuple):
    """A dimension that an argument sets: (a x^2 + b x + c) / d, with x the value of `keyword`."""

    keyword: str
    a: int
    b: int
    c: int
    d: int

    def solve(self, size: int) -> int | None:
        """Return the positive integer x that gives a dimension of `size`, or None."""
        rest = size * self.d - self.c
        if self.a == 0:
            value, remainder = divmod(rest, self.b)
        else:
            square = self.b * self.b + 4 * self.a * rest
            root = math.isqrt(max(square, 0))
            value, remainder = divmod(root - self.b, 2 * self.a)
            remainder = remainder or square - root * root
        return value if remainder == 0 and 0 < value < _MAX_ARGUMENT else None


Template = tuple[int | Symbol, ...]


@dataclass(frozen=True)
class IndexedArchitecture:
    """What the index knows of one architecture.

    `defaults` are the arguments that its shapes show, with the value of each in the plain model. `allows_no_head` tells
    whether num_classes=0 leaves its head out, `tracks` whether `num_batches_tracked` must be there (a detector without
    it was built with frozen norms). Equal `function`: the same function with equal arguments; equal
    `function_at_sizes` (None: unknown): also when built for another image size than the default. `facts` is what
    people tell it by.
    """

    name: str
    defaults: Mapping[str, int]
    allows_no_head: bool
    tracks: bool
    function: int
    function_at_sizes: int | None
    facts: Mapping[str, str]


@dataclass(frozen=True)
class ArchitectureIndex:
    """All architectures. Entry i is the tensor `names[name_ids[i]]` with the shape `templates[template_ids[i]]`;
    architecture k has the entries from `bounds[k]` to `bounds[k + 1]`; `heads` marks those that num_classes=0 omits.
    """

    versions: Mapping[str, str]
    architectures: tuple[IndexedArchitecture, ...]
    names: tuple[str, ...]
    templates: tuple[Template, ...]
    name_ids: NDArray[np.int32]
    template_ids: NDArray[np.int32]
    heads: NDArray[np.bool_]
    bounds: NDArray[np.int64]

    @functools.cached_property
    def name_index(self) -> Mapping[str, int]:
        """The number of each tensor name."""
        return {name: number for number, name in enumerate(self.names)}

    @functools.cached_property
    def shape_index(self) -> Mapping[Template, int]:
        """The number of each shape without symbols."""
        return {template: i for i, template in enumerate(self.templates) if not _is_symbolic(template)}

    @functools.cached_property
    def symbolic(self) -> NDArray[np.bool_]:
        """Which entries have a dimension that an argument sets."""
        return np.array([*map(_is_symbolic, self.templates)], dtype=bool)[self.template_ids]

    @functools.cached_property
    def tracking(self) -> NDArray[np.bool_]:
        """Which entries are `num_batches_tracked` that may be missing."""
        optional = np.array([not architecture.tracks for architecture in self.architectures], dtype=bool)
        counters = np.array([name.endswith("num_batches_tracked") for name in self.names], dtype=bool)
        result: NDArray[np.bool_] = counters[self.name_ids] & np.repeat(optional, np.diff(self.bounds))
        return result

    @property
    def origin(self) -> str:
        """Versions of the zoos, for messages: `timm 1.0.31, torchvision 0.29.1`."""
        return ", ".join(f"{zoo} {version}" for zoo, version in self.versions.items())


@functools.cache
def shipped_index() -> ArchitectureIndex:
    """Return the index that comes with the package.

    Raises:
        ArchitectureError: it is missing or damaged.
    """
    try:
        return decode_index(files("normswap.checkpoints.architecture").joinpath(_FILE).read_bytes())
    except (OSError, lzma.LZMAError, ValueError, EOFError) as error:
        raise ArchitectureError(
            f"the index of architectures cannot be read ({error}): install normswap again, or name the architecture "
            "with architecture='timm:NAME'"
        ) from error


def encode_index(index: ArchitectureIndex) -> bytes:
    """Return the index as the bytes of its file."""
    fact_texts = sorted({text for entry in index.architectures for text in entry.facts.values()})
    number = {text: i for i, text in enumerate(fact_texts)}
    header = {
        "versions": dict(index.versions),
        "facts": fact_texts,
        "templates": [[list(d) if isinstance(d, Symbol) else d for d in template] for template in index.templates],
        "architectures": [_to_row(entry, number) for entry in index.architectures],
        "lengths": np.diff(index.bounds).tolist(),
    }
    parts = [json.dumps(header, separators=(",", ":")).encode(), "\n".join(index.names).encode()]
    parts += [_encode_deltas(index.name_ids), _encode_deltas(index.template_ids), np.packbits(index.heads).tobytes()]
    sizes = np.array([len(part) for part in parts], dtype="<u4").tobytes()
    return _MAGIC + lzma.compress(sizes + b"".join(parts), format=lzma.FORMAT_XZ, filters=_FILTERS)


def decode_index(data: bytes) -> ArchitectureIndex:
    """Return the index in the bytes of its file.

    Raises:
        ValueError, lzma.LZMAError, EOFError: they are not such a file.
    """
    if not data.startswith(_MAGIC):
        raise ValueError("another format")
    raw = memoryview(lzma.decompress(data[len(_MAGIC) :]))
    sizes = np.frombuffer(raw[:20], dtype="<u4").tolist()
    ends = np.cumsum([20, *sizes]).tolist()
    parts = [raw[start:end] for start, end in itertools.pairwise(ends)]
    header = json.loads(bytes(parts[0]))
    bounds = np.concatenate([[0], np.cumsum(header["lengths"])]).astype(np.int64)
    return ArchitectureIndex(
        versions=header["versions"],
        architectures=tuple(_from_row(row, header["facts"]) for row in header["architectures"]),
        names=tuple(bytes(parts[1]).decode().split("\n")),
        templates=tuple(tuple(Symbol(*d) if isinstance(d, list) else d for d in row) for row in header["templates"]),
        name_ids=_decode_deltas(parts[2]),
        template_ids=_decode_deltas(parts[3]),
        heads=np.unpackbits(np.frombuffer(parts[4], dtype=np.uint8), count=int(bounds[-1])).astype(bool),
        bounds=bounds,
    )


def _to_row(entry: IndexedArchitecture, number: Mapping[str, int]) -> list[Any]:
    fact_ids = {kind: number[text] for kind, text in entry.facts.items()}
    flags = entry.allows_no_head + 2 * entry.tracks
    return [entry.name, dict(entry.defaults), flags, entry.function, entry.function_at_sizes, fact_ids]


def _from_row(row: Sequence[Any], fact_texts: Sequence[str]) -> IndexedArchitecture:
    name, defaults, flags, function, at_sizes, fact_ids = row
    facts = {kind: fact_texts[i] for kind, i in fact_ids.items()}
    return IndexedArchitecture(name, defaults, bool(flags & 1), bool(flags & 2), function, at_sizes, facts)


def _encode_deltas(ids: NDArray[np.int32]) -> bytes:
    """Differences between neighbours, most of them 0 or 1, byte by byte: what a compressor sees best."""
    steps = np.diff(ids, prepend=np.int32(0)).astype("<i4")
    return steps.view(np.uint8).reshape(-1, 4).T.tobytes()


def _decode_deltas(data: memoryview) -> NDArray[np.int32]:
    planes = np.frombuffer(data, dtype=np.uint8).reshape(4, -1)
    steps = np.ascontiguousarray(planes.T).view("<i4").reshape(-1)
    return np.cumsum(steps, dtype=np.int32)


def _is_symbolic(template: Template) -> bool:
    return any(isinstance(dimension, Symbol) for dimension in template)
