"""Build the index of architectures that the package contains (`make index`).

    python -m benchmarks.architectures.build_index [--workers N]

The program first records all architectures in `build/architectures.jsonl` and resumes if it was interrupted. It then
compares architectures with equal tensors: by fingerprint, and, if two have different classes and take any image size,
by running both.
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
INDEX = ROOT / "normswap" / "checkpoints" / "architecture" / "architectures.bin"
_IMAGE_SIZES = ("img_size", "image_size")
# Larger pairs do not fit on a small machine (runs are in float64 with gradients) and count as different.
_MOST_TO_BUILD, _MOST_TO_RUN = 500_000_000, 130_000_000
_MOST_SETTINGS = 3
# Settings that follow from the default image size or do not help people.
_UNINFORMATIVE = re.compile(r"_traits|img_size|grid_size|num_patches|feat_shape|num_classes| tensors:")

Record = dict[str, Any]


def main() -> None:
    """Record the architectures, compare them and write the index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", metavar="N", type=int, default=2, help="parallel processes (default 2)")
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
    """Group the records by tensors: names, and shapes for any number of classes and any image size."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in found:
        entries = sorted([name, [_dimension(d, record["defaults"]) for d in dims]] for name, dims in record["entries"])
        groups[json.dumps(entries)].append(record)
    return list(groups.values())


def _dimension(dimension: Any, defaults: Mapping[str, int]) -> Any:
    if not isinstance(dimension, list):
        return dimension
    keyword, a, b, c, d = dimension
    # torchvision has no argument for input channels, so the default is compared.
    return (b * defaults[keyword] + c) // d if keyword == "in_chans" else ["*", a, b, c, d]


def compare(groups: Sequence[Sequence[Record]]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the first equal architecture for each one: with default arguments, and at other image sizes.

    The second map contains only architectures whose shapes depend on the image size. Measurements are kept on disk.
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
        # Buffers outside the state dict can depend on arguments that no module stores.
        return not first["unsaved"] or not _measure("unsaved", names, measured)
    # In one class, different settings are different functions. Two classes (of two zoos) may compute the same function.
    sized = any(key in _IMAGE_SIZES for record in (first, second) for key in record["defaults"])
    facts, other_facts = ({k: v for k, v in r["facts"].items() if k != "input"} for r in (first, second))
    if sized or (facts["class"] == other_facts["class"] and facts != other_facts):
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
        except Exception as error:  # noqa: BLE001 - models that cannot be compared count as different
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
    """Add the first settings that differ to architectures with equal facts and different functions."""
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
            _add_differences([*functions.values()])


def _add_differences(functions: Sequence[Sequence[Record]]) -> None:
    trees = [tree_settings(built(records[0]["architecture"])) for records in functions]
    for records_, tree in zip(functions, trees, strict=True):
        other = next((t for t in trees if t is not tree and t != tree), tree)
        differing = [line for line in setting_differences(tree, other) if not _UNINFORMATIVE.search(line)]
        for record in records_ if differing else ():
            record["facts"]["settings"] = ", ".join(line.rpartition(" / ")[0] for line in differing[:_MOST_SETTINGS])


def index_of(found: Sequence[Record], same: Mapping[str, str], resized: Mapping[str, str]) -> ArchitectureIndex:
    """Return the records as an index. Names, shapes and functions are numbered in the order of first appearance."""
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
