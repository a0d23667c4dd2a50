"""The shipped index of architectures: the tensors of each, the dimensions that arguments set, and which are equal.

The file has every tensor name and every shape once, and for each architecture a range of pairs of their numbers. So a
few array operations compare a state dict with all architectures, and no zoo is imported. `python -m
benchmarks.architectures.build_index` writes the file.
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
# Larger than any argument of a real network: a shape that would need a larger one is a mismatch.
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
    """One architecture in the index.

    Attributes:
        name: the architecture name, such as `timm:resnet50`.
        defaults: the arguments that affect its shapes -> their default values.
        allows_no_head: whether `num_classes=0` removes its head.
        tracks: whether `num_batches_tracked` is required (a detector without it has frozen norms).
        function: equal for architectures that compute the same function with equal arguments.
        function_at_sizes: equal for architectures that do so also at other image sizes than the default; None if
            unknown.
        facts: properties that distinguish architectures for users.
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
    """All known architectures.

    Entry i is the tensor `names[name_ids[i]]` with the shape `templates[template_ids[i]]`. Architecture k has the
    entries from `bounds[k]` to `bounds[k + 1] - 1`. `heads` marks entries that `num_classes=0` removes.
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
        """Tensor name -> its number."""
        return {name: number for number, name in enumerate(self.names)}

    @functools.cached_property
    def shape_index(self) -> Mapping[Template, int]:
        """Shape without symbols -> its number."""
        return {template: i for i, template in enumerate(self.templates) if not _is_symbolic(template)}

    @functools.cached_property
    def symbolic(self) -> NDArray[np.bool_]:
        """For each entry, whether an argument sets one of its dimensions."""
        return np.array([*map(_is_symbolic, self.templates)], dtype=bool)[self.template_ids]

    @functools.cached_property
    def tracking(self) -> NDArray[np.bool_]:
        """For each entry, whether it is a `num_batches_tracked` that may be missing."""
        optional = np.array([not architecture.tracks for architecture in self.architectures], dtype=bool)
        counters = np.array([name.endswith("num_batches_tracked") for name in self.names], dtype=bool)
        result: NDArray[np.bool_] = counters[self.name_ids] & np.repeat(optional, np.diff(self.bounds))
        return result

    @property
    def origin(self) -> str:
        """The versions of the zoos for messages: `timm 1.0.31, torchvision 0.29.1`."""
        return ", ".join(f"{zoo} {version}" for zoo, version in self.versions.items())


@functools.cache
def shipped_index() -> ArchitectureIndex:
    """Return the index in the package.

    Raises:
        ArchitectureError: the index is missing or damaged.
    """
    try:
        return decode_index(files("normswap.checkpoints.architecture").joinpath(_FILE).read_bytes())
    except (OSError, lzma.LZMAError, ValueError, EOFError) as error:
        raise ArchitectureError(
            f"the index of architectures cannot be read ({error}): install normswap again, or pass "
            "architecture='timm:NAME'"
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
        ValueError, lzma.LZMAError, EOFError: the bytes are not an index.
    """
    if not data.startswith(_MAGIC):
        raise ValueError("unknown format")
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
    """The differences of neighbours (most are 0 or 1), grouped by byte position, which compress best."""
    steps = np.diff(ids, prepend=np.int32(0)).astype("<i4")
    return steps.view(np.uint8).reshape(-1, 4).T.tobytes()


def _decode_deltas(data: memoryview) -> NDArray[np.int32]:
    planes = np.frombuffer(data, dtype=np.uint8).reshape(4, -1)
    steps = np.ascontiguousarray(planes.T).view("<i4").reshape(-1)
    return np.cumsum(steps, dtype=np.int32)


def _is_symbolic(template: Template) -> bool:
    return any(isinstance(dimension, Symbol) for dimension in template)
