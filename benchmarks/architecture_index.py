"""Build the index of architectures that comes with the package (`make index`).

    python benchmarks/architecture_index.py [--workers N]

Records of all architectures are made first (`build/architectures.jsonl`; a run that was stopped goes on), then those
that share all their tensors are compared: by their fingerprints, and two that are of different classes and take any
image size, by running both.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from architecture_facts import setting_differences, tree_settings
from architecture_functions import difference, unsaved_difference
from architecture_records import built, catalog, describe_all, records
from torchvision import models as torchvision_models

from normswap.checkpoints.architecture_index import ArchitectureIndex, IndexedArchitecture, Symbol, encode_index

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "build" / "architectures.jsonl"
COMPARED = ROOT / "build" / "architectures-compared.json"
INDEX = ROOT / "normswap" / "checkpoints" / "architectures.bin"
_IMAGE_SIZES = ("img_size", "image_size")
_MOST_PARAMETERS = 250_000_000  # above, two models in float64 with gradients are too much for the machine
_MOST_SETTINGS = 3

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    describe_all(catalog(), RECORDS, workers)
    found = records(RECORDS)
    groups = tensor_groups(found)
    same = compare(groups)
    add_settings(found, same)
    INDEX.write_bytes(encode_index(index_of(found, same)))
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


def compare(groups: Sequence[Sequence[Record]]) -> dict[str, str]:
    """Return per architecture the name of the first one that computes the same; measured results are kept on disk."""
    measured: dict[str, str] = json.loads(COMPARED.read_text()) if COMPARED.exists() else {}
    same: dict[str, str] = {}
    for group in groups:
        firsts: list[Record] = []
        for record in group:
            known = next((first for first in firsts if _is_same(first, record, measured)), None)
            same[record["architecture"]] = (known or record)["architecture"]
            if known is None:
                firsts.append(record)
    return same


def _is_same(first: Record, second: Record, measured: dict[str, str]) -> bool:
    names = first["architecture"], second["architecture"]
    if first["function"] == second["function"]:
        # Values outside the state dict follow from arguments that a module need not keep.
        return not first["unsaved"] or not _measure("unsaved", names, measured)
    # Settings that differ within one class are a difference; two classes, as of two zoos, may yet be one function.
    sized = any(key in _IMAGE_SIZES for record in (first, second) for key in record["defaults"])
    if sized or first["facts"]["class"] == second["facts"]["class"]:
        return False
    if max(first["parameters"], second["parameters"]) > _MOST_PARAMETERS:
        return False
    return not _measure("run", names, measured)


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
    bodies: dict[str, list[Record]] = defaultdict(list)
    for record in found:
        head = {*(record["head"] or ())}
        entries = sorted(
            [name, [_dimension(d, record["defaults"]) for d in dims]]
            for i, (name, dims) in enumerate(record["entries"])
            if i not in head
        )
        bodies[json.dumps(entries)].append(record)
    for group in bodies.values():
        by_facts: dict[str, list[Record]] = defaultdict(list)
        for record in group:
            by_facts[json.dumps(record["facts"], sort_keys=True)].append(record)
        for alike in by_facts.values():
            if len(_functions(alike, same)) > 1:
                _tell_apart(alike)


def _tell_apart(alike: Sequence[Record]) -> None:
    trees = [tree_settings(built(record["architecture"])) for record in alike]
    for record, tree in zip(alike, trees, strict=True):
        other = next(t for t in trees if t != tree) if any(t != tree for t in trees) else tree
        differing = list(setting_differences(tree, other))[:_MOST_SETTINGS]
        record["facts"]["settings"] = ", ".join(line.rpartition(" / ")[0] for line in differing)


def index_of(found: Sequence[Record], same: Mapping[str, str]) -> ArchitectureIndex:
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
        at_sizes = record["function at sizes"]
        if at_sizes is not None and record["unsaved"]:
            # Values outside the state dict were compared at the default size only.
            at_sizes += same[record["architecture"]]
        architectures.append(
            IndexedArchitecture(
                name=record["architecture"],
                defaults=record["defaults"],
                has_headless=bool(head),
                tracks=record["architecture"].removeprefix("torchvision:") in _detectors(),
                function=functions.setdefault(same[record["architecture"]], len(functions)),
                function_at_sizes=None if at_sizes is None else functions.setdefault(at_sizes, len(functions)),
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
