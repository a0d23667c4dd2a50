"""Identification of the architecture of a state dict by the names and shapes of its tensors.

`identify` compares them with the shipped index and imports no zoo. It accepts another number of classes or input
channels, another image size, a missing or additional head and missing `num_batches_tracked`, and reports them.
Candidates that compute the same function count as one. When unsure, candidates are kept apart: an extra candidate
costs one --arch flag, a wrong merge gives a wrong model. `identify_state_dict` also tries the prefixes of wrappers, and
uses the architecture names in a training checkpoint to choose among candidates.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from normswap.checkpoints.architecture import efficientnet_pytorch
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
from normswap.layers.matching import MATCHING_BUFFERS

_logger = logging.getLogger(__name__)

_NUM_NEAREST = 5
_MAX_NAMES = 3
_MAX_LISTED = 4
# Architectures that share less than this fraction of the tensors are not reported as nearest.
_MIN_SIMILARITY = 0.2
_MAX_UNEXPECTED = 10_000
_ADDED_TENSORS = frozenset((*GATE_PARAMETERS, *MATCHING_BUFFERS))
_IMAGE_SIZE_KEYWORDS = ("img_size", "image_size")
_CLASSES_KEYWORD = "num_classes"
_ARCHITECTURE_HINT = "pass architecture='timm:NAME', or architecture='path/file.py:function' for your own model"


@dataclass(frozen=True)
class TensorMismatch:
    """The number of differing tensors, and the names of the first few."""

    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """An architecture compared with the tensors of a file.

    Exact match: every shape agrees, only `num_batches_tracked` may be missing, and extra tensors are limited to heads
    and known tool leftovers.

    Attributes:
        architecture: the name for `architecture=`, with keywords.
        keywords: the arguments that the shapes and names show, if they differ from the defaults.
        missing: tensors of the architecture that are not in the file.
        unexpected: tensors in the file that are not in the architecture.
        misshaped: tensors with another shape.
        function: equal for candidates of one identification that compute the same function.
        facts: properties that distinguish the candidates.
    """

    architecture: str
    keywords: Mapping[str, float]
    missing: TensorMismatch
    unexpected: TensorMismatch
    misshaped: TensorMismatch
    function: int
    facts: Mapping[str, str]

    @property
    def num_mismatches(self) -> int:
        """The number of tensors that are missing, unexpected or misshaped."""
        return self.missing.count + self.unexpected.count + self.misshaped.count


@dataclass(frozen=True)
class Identification:
    """The result of an identification.

    Attributes:
        candidates: the exact matches.
        matches: the nearest architectures, if there is no exact match.
        origin: the zoos in the index, with their versions; models of others are unknown.
        layout: the package whose names the tensors have, if they were mapped to those of the architectures.
    """

    candidates: tuple[Candidate, ...]
    matches: tuple[Candidate, ...]
    origin: str
    layout: str | None = None

    @property
    def functions(self) -> tuple[tuple[Candidate, ...], ...]:
        """The candidates grouped by function; the first in each group is the preferred name of this function."""
        groups: dict[int, list[Candidate]] = {}
        for candidate in self.candidates:
            groups.setdefault(candidate.function, []).append(candidate)
        return tuple(tuple(sorted(group, key=_name_sort_key)) for group in groups.values())

    def differences(self) -> dict[str, dict[str, str]]:
        """Return how the functions differ: the first architecture of each function -> the facts that not all share."""
        chosen = [group[0] for group in self.functions]
        kinds = dict.fromkeys(kind for candidate in chosen for kind in candidate.facts)
        differing = [kind for kind in kinds if len({candidate.facts.get(kind) for candidate in chosen}) > 1]
        # The class is the least useful fact: it is listed only if no other fact differs.
        distinguishing = [kind for kind in differing if kind != "class" or len(differing) == 1]
        return {c.architecture: {kind: c.facts.get(kind, "none") for kind in distinguishing} for c in chosen}


def identify(shapes: Mapping[str, Shape], *, index: ArchitectureIndex | None = None) -> Identification:
    """Return the architectures that match the tensors of a state dict.

    Args:
        shapes: the shape of each tensor by its name in the model, without prefixes of wrappers.
        index: the known architectures; default the index in the package.

    Raises:
        ArchitectureError: the index cannot be read.
    """
    rename = efficientnet_pytorch.names_from_shapes(shapes)
    if rename is not None:
        return _identify_efficientnet({rename(name): shape for name, shape in shapes.items()}, index)
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


def _identify_efficientnet(shapes: Mapping[str, Shape], index: ArchitectureIndex | None) -> Identification:
    """The architectures that match tensors of efficientnet-pytorch under timm's names, and compute their function."""
    found = identify(shapes, index=index)
    candidates = tuple(
        _with_keywords(one, efficientnet_pytorch.KEYWORDS)
        for one in found.candidates
        if efficientnet_pytorch.has_same_function(one.facts)
    )
    return replace(found, candidates=candidates, layout=efficientnet_pytorch.LAYOUT)


def _with_keywords(candidate: Candidate, keywords: Mapping[str, float]) -> Candidate:
    name = ",".join([candidate.architecture, *(f"{key}={value}" for key, value in keywords.items())])
    return replace(candidate, architecture=name, keywords={**candidate.keywords, **keywords})


def require_unique(found: Identification) -> str:
    """Return the name of the architecture if all candidates compute the same function.

    Raises:
        AmbiguityError: no candidate (the message lists the nearest architectures), or several with different functions
            (the message lists the differences).
    """
    functions = found.functions
    if len(functions) != 1:
        raise AmbiguityError(describe_ambiguity(found) if found.candidates else describe_no_match(found))
    return functions[0][0].architecture


def describe_ambiguity(found: Identification) -> str:
    """Return an error message with the differences of the candidates and what to type."""
    options = [
        f"architecture={name!r} ({'; '.join(f'{kind} {value}' for kind, value in facts.items()) or 'other settings'})"
        for name, facts in found.differences().items()
    ]
    more = f"; +{len(options) - _MAX_LISTED} more, see normswap identify" if len(options) > _MAX_LISTED else ""
    return (
        f"the tensors fit {len(options)} architectures that compute different functions: pass "
        f"{' or '.join(options[:_MAX_LISTED])}{more}"
    )


def describe_no_match(found: Identification) -> str:
    """Return an error message with the nearest architectures and what to type."""
    if not found.matches:
        return f"the tensors resemble no model of {found.origin}: {_ARCHITECTURE_HINT}"
    near = "; ".join(f"{match.architecture} ({describe_mismatches(match)})" for match in found.matches[:_MAX_NAMES])
    return f"the tensors fit no model of {found.origin}; nearest: {near}: {_ARCHITECTURE_HINT}"


def describe_mismatches(candidate: Candidate) -> str:
    """Return the differences of a candidate in words: `2 missing: fc.weight, fc.bias`."""
    kinds = {
        "missing": candidate.missing,
        "unexpected": candidate.unexpected,
        "with another shape": candidate.misshaped,
    }
    parts = [
        f"{mismatch.count} {kind}: {', '.join(mismatch.names)}{', ...' if mismatch.count > len(mismatch.names) else ''}"
        for kind, mismatch in kinds.items()
        if mismatch.count
    ]
    return "; ".join(parts) or "all tensors fit"


class _Counts(NamedTuple):
    """Numbers of tensors for each architecture: required but missing or misshaped, unexpected, fitting."""

    missing_required: NDArray[np.int64]
    unexpected: NDArray[np.int64]
    fitting: NDArray[np.int64]


def _count_matches(index: ArchitectureIndex, shapes: Mapping[str, Shape]) -> _Counts:
    given = np.full(len(index.names), -1, dtype=np.int64)  # the number of the shape; -2 for an unknown shape
    for name, shape in shapes.items():
        number = index.name_index.get(name)
        if number is not None:
            given[number] = index.shape_index.get(tuple(shape), -2)
    found = given[index.name_ids]
    present = found != -1
    # Dimensions that arguments set count as fitting here; `_compare_tensors` checks them if all others fit.
    fits = present & ((found == index.template_ids) | index.symbolic)
    missing_required = np.where(present, ~fits, ~(index.tracking | index.heads))
    compared = _per_architecture(index, present)
    return _Counts(_per_architecture(index, missing_required), len(shapes) - compared, _per_architecture(index, fits))


def _per_architecture(index: ArchitectureIndex, entries: NDArray[np.bool_]) -> NDArray[np.int64]:
    sums = np.concatenate([[0], np.cumsum(entries, dtype=np.int64)])
    result: NDArray[np.int64] = sums[index.bounds[1:]] - sums[index.bounds[:-1]]
    return result


def _compare_tensors(index: ArchitectureIndex, number: int, shapes: Mapping[str, Shape]) -> Candidate:
    """Compare one architecture with the tensors, using the arguments that their shapes show."""
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
        # Counters last, so that the first name shows whether anything else is missing.
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
    """Return for each argument the value that most of its dimensions show."""
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
    """Whether all differences are tolerated; `_count_matches` has checked which counters may be missing."""
    if candidate.misshaped.count or not all(map(is_batch_counter, candidate.missing.names)):
        return False
    if not candidate.unexpected.count:
        return True
    own = {index.names[i] for i in index.name_ids[slice(*index.bounds[number : number + 2].tolist())]}
    # An additional tensor inside a module of the network, even inside its head, makes it another network.
    parts = top_level_modules(name for name in own if name in shapes)
    return all(is_ignorable(name, parts) for name in shapes if name not in own)


def _merge_equal_functions(index: ArchitectureIndex, candidates: Mapping[int, Candidate]) -> tuple[Candidate, ...]:
    """Return the candidates with equal `function` if they compute the same function with their keywords."""
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
    """Return the most similar architectures, best first."""
    union_size = np.diff(index.bounds) + len(shapes) - counts.fitting
    similarity = counts.fitting / np.maximum(union_size, 1)
    best = np.argsort(-similarity, kind="stable")[:_NUM_NEAREST]
    compared = [
        _compare_tensors(index, number, shapes) for number in best.tolist() if similarity[number] >= _MIN_SIMILARITY
    ]
    return tuple(sorted(compared, key=lambda candidate: (candidate.num_mismatches, _name_sort_key(candidate))))


def _name_sort_key(candidate: Candidate) -> tuple[int, bool, int, str]:
    # Names of timm first, since its models have an input size.
    name = candidate.architecture
    return len(candidate.keywords), not name.startswith("timm:"), len(name), name


def identify_state_dict(weights: Mapping[str, Any], content: Any = None, *, prefix: str = "") -> Identification:
    """Return the architectures that match the tensors in `weights`, under any prefix of wrappers.

    Args:
        weights: a state dict.
        content: the whole content of the file, whose architecture names choose among several candidates.
        prefix: what the prefix must start with.

    Raises:
        CheckpointError: two prefixes have different architectures.
    """
    identifications: dict[str, Identification] = {}
    fitting: dict[str, Identification] = {}
    for each in dict.fromkeys([prefix, *find_prefixes(weights), *_find_equal_copies(weights)]):
        # A prefix inside or around a fitting one has no other model.
        if not each.startswith(prefix) or any(each.startswith(p) or p.startswith(each) for p in fitting):
            continue
        identifications[each] = identify(_shapes_with_prefix(weights, each))
        if identifications[each].candidates:
            fitting[each] = _filter_by_hints(identifications[each], read_architecture_hints(content))
    names = {p: found.candidates[0].architecture for p, found in fitting.items()}
    if len({*names.values()}) > 1:
        listed = " and ".join(f"{p!r} ({name})" for p, name in names.items())
        raise CheckpointError(
            f"has several models, under {listed}: select one, such as entry={next(iter(names)).rstrip('.')!r}"
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
        # Without what a conversion adds, since the index has the original architectures.
        if isinstance(weights[key], Tensor) and name.rpartition(".")[2] not in _ADDED_TENSORS
    }


def _find_equal_copies(weights: Mapping[str, Any]) -> list[str]:
    """The first parts of all names if each has the same tensors: copies of one model."""
    parts = find_leading_parts(weights)
    shape_sets = {frozenset(_shapes_with_prefix(weights, part).items()) for part in parts}
    return parts if len(shape_sets) == 1 else []


def get_state_dict(weights: Any) -> Mapping[str, Any]:
    """Return the state dict of a module, or `weights` itself if it is a state dict."""
    return weights.state_dict() if isinstance(weights, nn.Module) else weights


def _filter_by_hints(found: Identification, hints: tuple[str, ...]) -> Identification:
    """Only the candidates that the file names, if it names any of them."""
    for hint in hints:
        # `resnet50.a1_in1k` is `resnet50` with a tag of weights.
        hinted_name = hint.rpartition("/")[2].partition(".")[0]
        named = tuple(c for c in found.candidates if c.architecture.partition(":")[2].partition(",")[0] == hinted_name)
        if named:
            _logger.info("the file names %r: chose %d of %d candidates", hint, len(named), len(found.candidates))
            return replace(found, candidates=named)
    return found
