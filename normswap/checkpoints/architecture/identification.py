"""Which architecture a bare state dict belongs to, told by the names and shapes of its tensors.

Holds them against the shipped index without importing a zoo or building a model. Another number of classes, other
input channels, another image size, a head left out, counters of batches left out and heads added are tolerated and
reported. Candidates that compute the same function count as one; what sets the others apart is told, never guessed.
Takes shapes, gives names; wrapper prefixes must be gone.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from normswap.checkpoints.architecture.index import (
    ArchitectureIndex,
    IndexedArchitecture,
    Shape,
    Symbol,
    Template,
    shipped_index,
)
from normswap.checkpoints.content.entries import read_architecture_hints
from normswap.checkpoints.content.key_prefixes import find_leading_parts, find_prefixes, names_with_prefix
from normswap.checkpoints.content.weight_loading import is_batch_counter, is_ignorable, top_level_modules
from normswap.errors import AmbiguityError, CheckpointError
from normswap.layers.in_place import GATE_PARAMETERS

# MERGED DOC: Which architecture the weights in a file belong to: their tensors first, then the words that the file has for it.


_NUM_NEAREST = 5
_MAX_NAMES = 3
_MAX_LISTED = 4
# Of a network, less than this share of the tensors is no resemblance worth telling.
_MIN_SIMILARITY = 0.2
_MAX_UNEXPECTED = 10_000
_IMAGE_SIZE_KEYWORDS = ("img_size", "image_size")
_CLASSES_KEYWORD = "num_classes"
_ARCHITECTURE_HINT = (
    "name the architecture with architecture='timm:NAME', or with architecture='path/file.py:function' if the model is "
    "your own"
)


@dataclass(frozen=True)
class TensorMismatch:
    """How many tensors, and the names of the first few."""

    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """An architecture held against the tensors of a file.

    `architecture` is what to type, with the `keywords` that the shapes show where they are not the default. Of its
    tensors some may be `missing` or `misshaped`; `unexpected` ones are in the file only. A tensor-identical candidate
    has no misshaped one, misses at most counters of batches, and is unexpectedly given heads or leftovers of tools.
    `function` is equal for candidates of one identification that compute the same function; `facts` tells them apart.
    """

    architecture: str
    keywords: Mapping[str, int]
    missing: TensorMismatch
    unexpected: TensorMismatch
    misshaped: TensorMismatch
    function: int
    facts: Mapping[str, str]

    @property
    def num_mismatches(self) -> int:
        """How many tensors are missing, unexpected or of another shape."""
        return self.missing.count + self.unexpected.count + self.misshaped.count


@dataclass(frozen=True)
class Identification:
    """What an identification found.

    `candidates` are the tensor-identical architectures; `matches` the nearest ones where there is none. `origin` names
    the zoos and versions that are known: models of others are not.
    """

    candidates: tuple[Candidate, ...]
    matches: tuple[Candidate, ...]
    origin: str

    @property
    def functions(self) -> tuple[tuple[Candidate, ...], ...]:
        """The candidates by function; of each group the first represents the others, which are other names for it."""
        groups: dict[int, list[Candidate]] = {}
        for candidate in self.candidates:
            groups.setdefault(candidate.function, []).append(candidate)
        return tuple(tuple(sorted(group, key=_name_sort_key)) for group in groups.values())

    def differences(self) -> dict[str, dict[str, str]]:
        """Return how the functions differ: per architecture that represents one, the facts that not all share."""
        chosen = [group[0] for group in self.functions]
        kinds = dict.fromkeys(kind for candidate in chosen for kind in candidate.facts)
        differing = [kind for kind in kinds if len({candidate.facts.get(kind) for candidate in chosen}) > 1]
        # The class says least: it is told where nothing else does.
        distinguishing = [kind for kind in differing if kind != "class" or len(differing) == 1]
        return {c.architecture: {kind: c.facts.get(kind, "none") for kind in distinguishing} for c in chosen}


def identify(shapes: Mapping[str, Shape], *, index: ArchitectureIndex | None = None) -> Identification:
    """Return the architectures that a state dict's tensors can belong to.

    Args:
        shapes: the shape of each tensor by its name in the model, without prefixes of wrappers.
        index: what is known; by default what comes with the package.

    Raises:
        ArchitectureError: the index cannot be read.
    """
    known = index or shipped_index()
    counts = _count_matches(known, shapes)
    possible = np.flatnonzero((counts.missing_required == 0) & (counts.unexpected <= _MAX_UNEXPECTED))
    compared = {number: _compare_tensors(known, number, shapes) for number in possible.tolist()}
    fitting = {number: one for number, one in compared.items() if _is_exact_match(known, number, one, shapes)}
    min_unexpected = min((one.unexpected.count for one in fitting.values()), default=0)
    candidates = _merge_equal_functions(
        known, {n: one for n, one in fitting.items() if one.unexpected.count == min_unexpected}
    )
    matches = () if candidates else _find_nearest(known, counts, shapes)
    return Identification(candidates, matches, known.origin)


def require_unique(found: Identification) -> str:
    """Return the name of the one architecture that fits, up to names for the same function.

    Raises:
        AmbiguityError: none fits, with the nearest; or several do that compute different functions, with how they
            differ. Both say what to type.
    """
    functions = found.functions
    if len(functions) != 1:
        raise AmbiguityError(describe_ambiguity(found) if found.candidates else describe_no_match(found))
    return functions[0][0].architecture


def describe_ambiguity(found: Identification) -> str:
    """Return one line that says how the candidates differ and what to type."""
    options = [
        f"architecture={name!r} ({'; '.join(f'{kind} {value}' for kind, value in facts.items()) or 'other settings'})"
        for name, facts in found.differences().items()
    ]
    more = f"; +{len(options) - _MAX_LISTED} more, see normswap identify" if len(options) > _MAX_LISTED else ""
    return (
        f"the tensors fit {len(options)} architectures that compute different functions, and do not say which: pass "
        f"{' or '.join(options[:_MAX_LISTED])}{more}"
    )


def describe_no_match(found: Identification) -> str:
    """Return one line that says what came nearest and what to type."""
    if not found.matches:
        return f"the tensors resemble no model of {found.origin}: {_ARCHITECTURE_HINT}"
    near = "; ".join(f"{match.architecture} ({describe_mismatches(match)})" for match in found.matches[:_MAX_NAMES])
    return f"the tensors fit no model of {found.origin}; nearest: {near}: {_ARCHITECTURE_HINT}"


def describe_mismatches(candidate: Candidate) -> str:
    """Return in words what is missing, unexpected and of another shape: `2 missing: fc.weight, fc.bias`."""
    kinds = {"missing": candidate.missing, "unexpected": candidate.unexpected, "of another shape": candidate.misshaped}
    parts = [
        f"{misfit.count} {kind}: {', '.join(misfit.names)}{', ...' if misfit.count > len(misfit.names) else ''}"
        for kind, misfit in kinds.items()
        if misfit.count
    ]
    return "; ".join(parts) or "all tensors fit"


class _Counts(NamedTuple):
    """Per architecture: tensors that must be there and are not or have another shape, that are not in it, that fit."""

    missing_required: NDArray[np.int64]
    unexpected: NDArray[np.int64]
    fitting: NDArray[np.int64]


def _count_matches(index: ArchitectureIndex, shapes: Mapping[str, Shape]) -> _Counts:
    given = np.full(len(index.names), -1, dtype=np.int64)  # the number of the shape; -2: one that no architecture has
    for name, shape in shapes.items():
        number = index.name_index.get(name)
        if number is not None:
            given[number] = index.shape_index.get(tuple(shape), -2)
    found = given[index.name_ids]
    present = found != -1
    # Dimensions that arguments set are looked at one by one where all the rest fits.
    fits = present & ((found == index.template_ids) | index.symbolic)
    missing_required = np.where(present, ~fits, ~(index.tracking | index.heads))
    compared = _per_architecture(index, present)
    return _Counts(_per_architecture(index, missing_required), len(shapes) - compared, _per_architecture(index, fits))


def _per_architecture(index: ArchitectureIndex, entries: NDArray[np.bool_]) -> NDArray[np.int64]:
    sums = np.concatenate([[0], np.cumsum(entries, dtype=np.int64)])
    result: NDArray[np.int64] = sums[index.bounds[1:]] - sums[index.bounds[:-1]]
    return result


def _compare_tensors(index: ArchitectureIndex, number: int, shapes: Mapping[str, Shape]) -> Candidate:
    """Hold one architecture against the tensors, with the arguments that their shapes show."""
    known = index.architectures[number]
    entries = range(*index.bounds[number : number + 2].tolist())
    templates = {index.names[index.name_ids[i]]: index.templates[index.template_ids[i]] for i in entries}
    heads = {index.names[index.name_ids[i]] for i in entries if index.heads[i]}
    arguments = _infer_arguments(known, templates, shapes)
    missing = [name for name in templates if name not in shapes]
    present = len(templates) - len(missing)
    if heads and heads.isdisjoint(shapes):
        arguments[_CLASSES_KEYWORD] = 0
        missing = [name for name in missing if name not in heads]
    keywords = {key: value for key, value in arguments.items() if value != known.defaults[key]}
    unexpected = (name for name in shapes if name not in templates)
    return Candidate(
        architecture=",".join([known.name, *(f"{key}={value}" for key, value in keywords.items())]),
        keywords=keywords,
        # Counters last, so that the first name tells whether anything else is missing.
        missing=_make_mismatch(sorted(missing, key=is_batch_counter)),
        unexpected=TensorMismatch(
            len(shapes) - present, tuple(islice(unexpected, min(_MAX_NAMES, len(shapes) - present)))
        ),
        misshaped=_make_mismatch(
            [n for n, t in templates.items() if n in shapes and not _shape_matches(t, shapes[n], arguments)]
        ),
        function=number,
        facts=known.facts,
    )


def _infer_arguments(
    known: IndexedArchitecture, templates: Mapping[str, Template], shapes: Mapping[str, Shape]
) -> dict[str, int]:
    """Return per argument the value that most of the dimensions it sets show."""
    votes: dict[str, Counter[int]] = {}
    for name, template in templates.items():
        shape = shapes.get(name, ())
        if len(shape) != len(template):
            continue
        for dimension, size in zip(template, shape, strict=True):
            value = dimension.solve(size) if isinstance(dimension, Symbol) else None
            if value is not None and isinstance(dimension, Symbol):
                votes.setdefault(dimension.keyword, Counter())[value] += 1
    return {key: votes[key].most_common(1)[0][0] for key in known.defaults if key in votes}


def _shape_matches(template: Template, shape: Shape, arguments: Mapping[str, int]) -> bool:
    return len(template) == len(shape) and all(
        dimension.solve(size) == arguments.get(dimension.keyword, -1)
        if isinstance(dimension, Symbol)
        else dimension == size
        for dimension, size in zip(template, shape, strict=True)
    )


def _make_mismatch(names: list[str]) -> TensorMismatch:
    return TensorMismatch(len(names), tuple(names[:_MAX_NAMES]))


def _is_exact_match(index: ArchitectureIndex, number: int, candidate: Candidate, shapes: Mapping[str, Shape]) -> bool:
    """Whether what is missing or unexpected is tolerated; which counters may be missing has been counted before."""
    if candidate.misshaped.count or not all(map(is_batch_counter, candidate.missing.names)):
        return False
    if not candidate.unexpected.count:
        return True
    own = {index.names[i] for i in index.name_ids[slice(*index.bounds[number : number + 2].tolist())]}
    # What is added inside a part that the network has, also inside its own head, is another network.
    parts = top_level_modules(name for name in own if name in shapes)
    return all(is_ignorable(name, parts) for name in shapes if name not in own)


def _merge_equal_functions(index: ArchitectureIndex, candidates: Mapping[int, Candidate]) -> tuple[Candidate, ...]:
    """Return the candidates with what makes two of them the same function, as they would be built."""
    found: dict[int, Candidate] = {}
    for number, candidate in candidates.items():
        same = next(
            (other for other in found if _is_same_function(index, number, candidate, other, found[other])), None
        )
        found[number] = replace(candidate, function=number if same is None else found[same].function)
    return tuple(found.values())


def _is_same_function(
    index: ArchitectureIndex, number: int, one: Candidate, other_number: int, other: Candidate
) -> bool:
    known, known_other = index.architectures[number], index.architectures[other_number]
    default_sizes = one.keywords.keys().isdisjoint(_IMAGE_SIZE_KEYWORDS) and other.keywords.keys().isdisjoint(
        _IMAGE_SIZE_KEYWORDS
    )
    if default_sizes and known.function == known_other.function:
        return True
    return known.function_at_sizes is not None and known.function_at_sizes == known_other.function_at_sizes


def _find_nearest(index: ArchitectureIndex, counts: _Counts, shapes: Mapping[str, Shape]) -> tuple[Candidate, ...]:
    """Return the architectures that share most with the tensors, best first, where they share enough to tell."""
    union_size = np.diff(index.bounds) + len(shapes) - counts.fitting
    similarity = counts.fitting / np.maximum(union_size, 1)
    best = np.argsort(-similarity, kind="stable")[:_NUM_NEAREST]
    compared = [
        _compare_tensors(index, number, shapes) for number in best.tolist() if similarity[number] >= _MIN_SIMILARITY
    ]
    return tuple(sorted(compared, key=lambda candidate: (candidate.num_mismatches, _name_sort_key(candidate))))


def _name_sort_key(candidate: Candidate) -> tuple[int, bool, int, str]:
    # timm's models bring the size of their input.
    name = candidate.architecture
    return len(candidate.keywords), not name.startswith("timm:"), len(name), name


def identify_state_dict(weights: Mapping[str, Any], content: Any = None, *, prefix: str = "") -> Identification:
    """Return which architectures the tensors in `weights` fit, under any prefix of wrappers.

    Args:
        content: all that the file holds, whose words decide among several.
        prefix: what the prefix has to begin with.

    Raises:
        CheckpointError: under two prefixes lie two architectures.
    """
    identifications: dict[str, Identification] = {}
    fitting: dict[str, Identification] = {}
    for each in dict.fromkeys([prefix, *find_prefixes(weights), *_find_equal_copies(weights)]):
        # Inside what fits, or around it, is no other model.
        if not each.startswith(prefix) or any(each.startswith(p) or p.startswith(each) for p in fitting):
            continue
        identifications[each] = identify(_shapes_with_prefix(weights, each))
        if identifications[each].candidates:
            fitting[each] = _filter_by_hints(identifications[each], read_architecture_hints(content))
    names = {p: found.candidates[0].architecture for p, found in fitting.items()}
    if len({*names.values()}) > 1:
        listed = " and ".join(f"{p!r} ({name})" for p, name in names.items())
        raise CheckpointError(
            f"holds several models, under {listed}: say which, such as entry={next(iter(names)).rstrip('.')!r}"
        )
    if fitting:
        return next(iter(fitting.values()))
    return min(
        identifications.values(),
        key=lambda found: min((match.num_mismatches for match in found.matches), default=len(weights) + 1),
    )


def _shapes_with_prefix(weights: Mapping[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    stored = names_with_prefix(weights, prefix).stored
    return {
        name: tuple(weights[key].shape)
        for name, key in stored.items()
        # Importance weights are what a conversion adds: the architecture is the original's.
        if isinstance(weights[key], Tensor) and name.rpartition(".")[2] not in GATE_PARAMETERS
    }


def _find_equal_copies(weights: Mapping[str, Any]) -> list[str]:
    """The first parts of all names, where each of them stands before the same tensors: copies of one model."""
    parts = find_leading_parts(weights)
    shape_sets = {frozenset(_shapes_with_prefix(weights, part).items()) for part in parts}
    return parts if len(shape_sets) == 1 else []


def get_state_dict(weights: Any) -> Mapping[str, Any]:
    """Return the tensors of what may be a module."""
    return weights.state_dict() if isinstance(weights, nn.Module) else weights


def _filter_by_hints(found: Identification, hints: tuple[str, ...]) -> Identification:
    """The candidates that the file itself names, where it names one of them."""
    for hint in hints:
        # `resnet50.a1_in1k` is a tag of weights on `resnet50`.
        hinted_name = hint.rpartition("/")[2].partition(".")[0]
        named = tuple(c for c in found.candidates if c.architecture.partition(":")[2].partition(",")[0] == hinted_name)
        if named:
            return replace(found, candidates=named)
    return found
