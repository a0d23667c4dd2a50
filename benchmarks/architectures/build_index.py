"""Build the index of architectures that comes with the package (`make index`).

    python benchmarks/architecture_index.py [--workers N]

Records of all architectures are made first (`build/architectures.jsonl`; a run that was stopped goes on), then those
that share all their tensors are compared: by their fingerprints, and two that are of different classes and take any
image size, by running both.
"""

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from torchvision import models as torchvision_models

from benchmarks.architectures.facts import setting_differences, tree_settings
from benchmarks.architectures.functions import difference, unsaved_difference
from benchmarks.architectures.records import COMMON_SIZES, built, catalog, describe_all, records
from benchmarks.paths import ROOT
from normswap.checkpoints.architecture.index import ArchitectureIndex, IndexedArchitecture, Symbol, encode_index

RECORDS = ROOT / "build" / "architectures.jsonl"
COMPARED = ROOT / "build" / "architectures-compared.json"
INDEX = ROOT / "normswap" / "checkpoints" / "architectures.bin"
_IMAGE_SIZES = ("img_size", "image_size")
# Above, two models (to run: in float64 with gradients) are too much for a small machine: they count as different.
_MOST_TO_BUILD, _MOST_TO_RUN = 500_000_000, 130_000_000
_MOST_SETTINGS = 3
# Differ wherever the default image size does, or say nothing to people.
_UNTELLING = re.compile(r"_traits|img_size|grid_size|num_patches|feat_shape|num_classes| tensors:")

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    describe_all(catalog(), RECORDS, workers)
    found = records(RECORDS)
    groups = tensor_groups(found)
    same, resized = compare(groups)
    add_settings(found, same | resized)
    INDEX.write_bytes(encode_index(index_of(found, same, resized)))
    several = [group for group in groups if len(group) > 1]
    sizes = Counter(len(_functions(group, same)) for group in groups)
    print(
        f"{len(found)} architectures, {len(several)} groups with the same tensors, functions per group: {dict(sizes)}"
    )
    print(f"{INDEX.relative_to(ROOT)}: {INDEX.stat().st_size} bytes")


def tensor_groups(found: Iterable[Record]) -> list[list[Record]]:
    """Return the records by their tensors: names, and shapes for any number of classes and any image size."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in found:
        entries = sorted([name, [_dimension(d, record["defaults"]) for d in dims]] for name, dims in record["entries"])
        groups[json.dumps(entries)].append(record)
    return list(groups.values())


def _dimension(dimension: Any, defaults: Mapping[str, int]) -> Any:
    if not isinstance(dimension, list):
        return dimension
    keyword, a, b, c, d = dimension
    # torchvision takes no other input channels: the default ones compare.
    return (b * defaults[keyword] + c) // d if keyword == "in_chans" else ["*", a, b, c, d]


def compare(groups: Sequence[Sequence[Record]]) -> tuple[dict[str, str], dict[str, str]]:
    """Return per architecture the first one that computes the same as it is, and, where shapes follow an image size,
    when both are built for another one; what is measured is kept on disk.
    """
    measured: dict[str, str] = json.loads(COMPARED.read_text()) if COMPARED.exists() else {}
    same: dict[str, str] = {}
    resized: dict[str, str] = {}
    for group in groups:
        same |= _firsts(group, lambda first, other: _is_same(first, other, measured))
        sized = [record for record in group if record["function at sizes"] is not None]
        resized |= _firsts(sized, lambda first, other: _is_same_resized(first, other, measured))
    return same, resized


def _firsts(group: Sequence[Record], is_same: Callable[[Record, Record], bool]) -> dict[str, str]:
    firsts: list[Record] = []
    found = {}
    for record in group:
        known = next((first for first in firsts if is_same(first, record)), None)
        found[record["architecture"]] = (known or record)["architecture"]
        if known is None:
            firsts.append(record)
    return found


def _is_same(first: Record, second: Record, measured: dict[str, str]) -> bool:
    names = first["architecture"], second["architecture"]
    if first["function"] == second["function"]:
        # Values outside the state dict follow from arguments that a module need not keep.
        return not first["unsaved"] or not _measure("unsaved", names, measured)
    # Settings that differ within one class are a difference, unless a size is all that people are told; two classes,
    # as of two zoos, may yet be one function.
    sized = any(key in _IMAGE_SIZES for record in (first, second) for key in record["defaults"])
    told, told_second = ({k: v for k, v in r["facts"].items() if k != "input"} for r in (first, second))
    if sized or (told["class"] == told_second["class"] and told != told_second):
        return False
    return first["parameters"] <= _MOST_TO_RUN and not _measure("run", names, measured)


def _is_same_resized(first: Record, second: Record, measured: dict[str, str]) -> bool:
    if first["function at sizes"] != second["function at sizes"]:
        return False
    if not first["unsaved"]:
        return True
    (keyword,) = (key for key in first["defaults"] if key in _IMAGE_SIZES)
    pairs = (tuple(f"{r['architecture']},{keyword}={size}" for r in (first, second)) for size in COMMON_SIZES)
    return first["parameters"] <= _MOST_TO_BUILD and not any(_measure("unsaved", pair, measured) for pair in pairs)


def _measure(kind: str, names: tuple[str, str], measured: dict[str, str]) -> str:
    key = " ".join([kind, *names])
    if key not in measured:
        try:
            measured[key] = (difference if kind == "run" else unsaved_difference)(*names)
        except Exception as error:  # noqa: BLE001 - what cannot be compared is not the same
            measured[key] = f"{type(error).__name__}: {error}"
        COMPARED.write_text(json.dumps(measured, indent=1))
        print(f"{key}: {measured[key] or 'same'}", file=sys.stderr, flush=True)
    return measured[key]


def _functions(group: Sequence[Record], same: Mapping[str, str]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = defaultdict(list)
    for record in group:
        found[same[record["architecture"]]].append(record)
    return found


def add_settings(found: Sequence[Record], same: Mapping[str, str]) -> None:
    """Add what sets functions of one body apart where none of their facts does: the first settings that differ."""
    alike: dict[str, list[Record]] = defaultdict(list)
    for record in found:
        head = {*(record["head"] or ())}
        body = sorted(
            [name, [_dimension(d, record["defaults"]) for d in dims]]
            for i, (name, dims) in enumerate(record["entries"])
            if i not in head
        )
        facts = {kind: value for kind, value in record["facts"].items() if kind != "input"}
        alike[json.dumps([body, facts], sort_keys=True)].append(record)
    for group in alike.values():
        if len(functions := _functions(group, same)) > 1:
            _tell_apart([*functions.values()])


def _tell_apart(functions: Sequence[Sequence[Record]]) -> None:
    trees = [tree_settings(built(records[0]["architecture"])) for records in functions]
    for records_, tree in zip(functions, trees, strict=True):
        other = next((t for t in trees if t is not tree and t != tree), tree)
        differing = [line for line in setting_differences(tree, other) if not _UNTELLING.search(line)]
        for record in records_ if differing else ():
            record["facts"]["settings"] = ", ".join(line.rpartition(" / ")[0] for line in differing[:_MOST_SETTINGS])


def index_of(found: Sequence[Record], same: Mapping[str, str], resized: Mapping[str, str]) -> ArchitectureIndex:
    """Return the records as an index; numbers of names, shapes and functions in the order of first appearance."""
    names: dict[str, int] = {}
    templates: dict[Any, int] = {}
    functions: dict[str, int] = {}
    name_ids, template_ids, heads, lengths = [], [], [], []
    architectures = []
    for record in found:
        head = {*(record["head"] or ())}
        for position, (name, dims) in enumerate(record["entries"]):
            template = tuple(Symbol(*d) if isinstance(d, list) else d for d in dims)
            name_ids.append(names.setdefault(name, len(names)))
            template_ids.append(templates.setdefault(template, len(templates)))
            heads.append(position in head)
        lengths.append(len(record["entries"]))
        at_sizes = resized.get(record["architecture"])
        architectures.append(
            IndexedArchitecture(
                name=record["architecture"],
                defaults=record["defaults"],
                allows_no_head=bool(head),
                tracks=record["architecture"].removeprefix("torchvision:") in _detectors(),
                function=functions.setdefault(same[record["architecture"]], len(functions)),
                function_at_sizes=None
                if at_sizes is None
                else functions.setdefault(at_sizes + " resized", len(functions)),
                facts=record["facts"],
            )
        )
    return ArchitectureIndex(
        versions={zoo: version(zoo) for zoo in ("timm", "torchvision")},
        architectures=tuple(architectures),
        names=tuple(names),
        templates=tuple(templates),
        name_ids=np.array(name_ids, dtype=np.int32),
        template_ids=np.array(template_ids, dtype=np.int32),
        heads=np.array(heads, dtype=bool),
        bounds=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def _detectors() -> set[str]:
    return set(torchvision_models.list_models(module=torchvision_models.detection))


if __name__ == "__main__":
    main()
