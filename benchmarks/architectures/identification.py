"""Identify every model of timm and torchvision from the shapes of its state dict (`make identify`).

Models are built on the meta device as they are, with 10 classes and with 1 input channel where they take that. The true
architecture must be among the candidates with the right arguments, and every candidate, built with its arguments, must
have exactly these tensors. Models counted as the same function are run, where they are not too large.
"""

import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.architectures.build_index import COMPARED, INDEX
from benchmarks.architectures.functions import difference
from benchmarks.architectures.records import EXCLUDED, Shapes, built, catalog, shapes_of
from benchmarks.paths import DOCS
from benchmarks.provenance import provenance
from normswap.checkpoints.architecture.identification import Candidate, identify
from normswap.checkpoints.architecture.registry import parse_architecture

PAGE = DOCS / "identification.md"
CASES: Mapping[str, Mapping[str, int]] = {
    "default": {},
    "10 classes": {"num_classes": 10},
    "1 channel": {"in_chans": 1},
}
_MOST_PARAMETERS = 30_000_000
_SLOWEST = 1.0
_SIZE_LIMIT = 1_500_000

_METHOD = """
Each model is built on the meta device: as it is, with 10 classes, and with 1 input channel where it takes that. Found:
the true architecture is among the candidates, with the right arguments. Exact: every candidate, built with its own
arguments, has exactly these names and shapes, so that the set is as small as tensors allow. Functions: candidates with
the same fingerprint (classes, settings and attributes of every module), or, across zoos, with the same measured
outputs, running statistics and gradients, count as one. Models with more than one function share all their tensors and
need `--arch`; `normswap identify` tells how they differ.
""".strip().splitlines()


@dataclass
class Case:
    """What came of one kind of build: sizes of the sets, seconds, and what did not hold."""

    models: int = 0
    found: int = 0
    exact: int = 0
    candidates: list[int] = field(default_factory=list)
    functions: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def main() -> None:
    shapes_by_build: dict[str, Shapes] = {}
    groups: set[tuple[str, ...]] = set()
    ambiguous: dict[str, list[str]] = {}
    cases = {name: Case() for name in CASES}
    for architecture in catalog():
        for name, keywords in CASES.items():
            shapes = _shapes(architecture, keywords, shapes_by_build)
            if shapes is None:
                continue
            _judge(cases[name], architecture, keywords, shapes, shapes_by_build, groups, ambiguous)
        print(architecture, file=sys.stderr, flush=True)
    PAGE.write_text(_page(cases, ambiguous, _run_groups(sorted(groups))))
    failures = [line for case in cases.values() for line in case.failures]
    print(PAGE.read_text())
    sys.exit("\n".join(failures) if failures else 0)


def _name(architecture: str, keywords: Mapping[str, int]) -> str:
    return ",".join([architecture, *(f"{key}={value}" for key, value in keywords.items())])


def _shapes(architecture: str, keywords: Mapping[str, int], known: dict[str, Shapes]) -> Shapes | None:
    """The shapes of the model with these arguments, or None where it does not take them."""
    name = _name(architecture, keywords)
    if name not in known:
        try:
            known[name] = shapes_of(built(architecture, **keywords))
        except Exception:  # what a builder raises for an argument that it does not take is anybody's guess
            if not keywords:
                raise
            return None
    # Some take any argument and pass it on to nobody.
    return None if keywords and known[name] == known.get(architecture) else known[name]


def _judge(
    case: Case,
    architecture: str,
    keywords: Mapping[str, int],
    shapes: Shapes,
    known: dict[str, Shapes],
    groups: set[tuple[str, ...]],
    ambiguous: dict[str, list[str]],
) -> None:
    started = time.perf_counter()
    found = identify(shapes)
    case.seconds.append(time.perf_counter() - started)
    case.models += 1
    case.candidates.append(len(found.candidates))
    case.functions.append(len(found.functions))
    name = _name(architecture, keywords)
    names = {candidate.architecture for candidate in found.candidates}
    case.found += name in names
    if name not in names:
        case.failures.append(f"{name}: not among {sorted(names) or 'no candidates'}")
    wrong = [c.architecture for c in found.candidates if not _is_exact(c, shapes, known)]
    case.exact += not wrong
    case.failures += [f"{name}: the candidate {other} has other tensors" for other in wrong]
    if not keywords:
        groups |= {tuple(sorted(c.architecture for c in group)) for group in found.functions if len(group) > 1}
        if len(found.functions) > 1:
            ambiguous[architecture] = [group[0].architecture for group in found.functions]


def _is_exact(candidate: Candidate, shapes: Shapes, known: dict[str, Shapes]) -> bool:
    if candidate.architecture not in known:
        plain = parse_architecture(candidate.architecture)
        known[candidate.architecture] = shapes_of(built(f"{plain.scheme}:{plain.model}", **candidate.keywords))
    return known[candidate.architecture] == shapes


def _run_groups(groups: Sequence[tuple[str, ...]]) -> list[list[str]]:
    """Run the members of every group against its first: name, verdict."""
    rows = []
    known = json.loads(COMPARED.read_text()) if COMPARED.exists() else {}
    for first, *others in groups:
        for other in others:
            if known.get(f"run {first} {other}") == "":
                rows.append([f"`{first}`", f"`{other}`", "equal, when the index was built"])
                continue
            size = sum(p.numel() for p in built(first).parameters())
            if size > _MOST_PARAMETERS:
                verdict = f"not run, {size / 1e6:.0f} million parameters"
            else:
                verdict = _verdict(first, other)
            rows.append([f"`{first}`", f"`{other}`", verdict])
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _verdict(first: str, other: str) -> str:
    for sizes in (((128, 128), (97, 131)), ((224, 224),), ((256, 256),), ((384, 384),)):
        told = difference(first, other, sizes=sizes)
        if not told.startswith("ran at"):
            return f"DIFFERS: {told}" if told else "equal"
    return "runs at none of the sizes tried"


def _start_seconds() -> float:
    """Seconds from torch being imported to the first answer, in a fresh process."""
    code = (
        "import torch, time; t = time.perf_counter(); from normswap.checkpoints.architecture.identification import identify; "
        "identify({'fc.weight': (10, 512)}); print(time.perf_counter() - t)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return statistics.median(float(run.stdout) for run in runs)


def _page(cases: Mapping[str, Case], ambiguous: Mapping[str, list[str]], ran: Sequence[Sequence[str]]) -> str:
    first, size = _start_seconds(), INDEX.stat().st_size
    functions = Counter(len(v) for v in ambiguous.values())
    parts = [
        "# Identification: every model of timm and torchvision from its tensors alone",
        "",
        "Written by `make identify` (`benchmarks/identification.py`).",
        provenance(),
        "",
        *_METHOD,
        "",
        "| build | models | found | exact | one function | functions, mean | functions, most | candidates, most |",
        "|---|---|---|---|---|---|---|---|",
        *(_case_row(name, case) for name, case in cases.items()),
        "",
        "| | measured | wanted |",
        "|---|---|---|",
        f"| size of the index, bytes | {size:,} | at most {_SIZE_LIMIT:,} |",
        f"| first identification in a process, torch imported, s (median of 5) | {first:.2f} | below {_SLOWEST:g} |",
        *_seconds_rows(cases),
        "",
        f"## Several functions ({len(ambiguous)} models as they are)",
        "",
        f"Functions per set: {', '.join(f'{n}: {count} models' for n, count in sorted(functions.items()))}.",
        "",
        *dict.fromkeys(f"- {', '.join(f'`{n}`' for n in sorted(names))}" for names in ambiguous.values()),
        "",
        f"## Counted as one function, and run ({len(ran)})",
        "",
        "In float64, with the same random parameters and statistics, in evaluation and in training.",
        "",
        "| first | other | outputs, statistics, gradients |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in ran),
        "",
        "## Not in the index",
        "",
        *(f"- `{module}`: {reason}" for module, reason in EXCLUDED.items()),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _case_row(name: str, case: Case) -> str:
    one = sum(n == 1 for n in case.functions)
    return (
        f"| {name} | {case.models} | {case.found} | {case.exact} | {one} | {statistics.mean(case.functions):.2f} | "
        f"{max(case.functions)} | {max(case.candidates)} |"
    )


def _seconds_rows(cases: Mapping[str, Case]) -> list[str]:
    seconds = [s for case in cases.values() for s in case.seconds]
    return [
        f"| each further one, median, s | {statistics.median(seconds):.3f} | |",
        f"| slowest of all, s | {max(seconds):.2f} | below {_SLOWEST:g} |",
    ]


if __name__ == "__main__":
    main()
