"""Identify every model of timm and torchvision from the shapes of its state dict (`make identify`).

Models are built on the meta device: with default arguments, with 10 classes, and with 1 input channel if the model
takes this argument. The true architecture with the right arguments must be among the candidates, and every candidate
must have exactly these tensors. Models that count as the same function are run and compared, unless they are too large.
"""

import argparse
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
from benchmarks.paths import PAGES
from benchmarks.provenance import provenance
from normswap.checkpoints.architecture.identification import Candidate, identify
from normswap.checkpoints.architecture.registry import parse_architecture

PAGE = PAGES / "identification.md"
CASES: Mapping[str, Mapping[str, int]] = {
    "default": {},
    "10 classes": {"num_classes": 10},
    "1 channel": {"in_chans": 1},
}
_MOST_PARAMETERS = 30_000_000
_SLOWEST = 1.0
_SIZE_LIMIT = 1_500_000

_METHOD = """
Each model is built on the meta device: with default arguments, with 10 classes, and with 1 input channel if it takes
this argument. Found: the true architecture with the right arguments is among the candidates. Exact: every candidate
has exactly these names and shapes, so tensors alone cannot reduce the set further. Functions: candidates count as one
function if they have the same fingerprint (classes, settings and attributes of every module) or, across zoos, the same
measured outputs, running statistics and gradients. A model with more than one function shares all its tensors with
another one and needs `--arch`; `normswap identify` shows the differences.
""".strip().splitlines()


@dataclass
class Case:
    """Results of one kind of build: sizes of the candidate sets, seconds, and failures."""

    models: int = 0
    found: int = 0
    exact: int = 0
    candidates: list[int] = field(default_factory=list)
    functions: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def main() -> None:
    """Identify all models, write the page; exit code 1 if any identification failed."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
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
    """Return the shapes of the model with these arguments, or None if it does not take them."""
    name = _name(architecture, keywords)
    if name not in known:
        try:
            known[name] = shapes_of(built(architecture, **keywords))
        except Exception:  # builders raise different errors for unknown arguments
            if not keywords:
                raise
            return None
    # Some builders accept any argument and ignore it.
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
        case.failures.append(f"{name}: expected among the candidates, got {sorted(names) or 'no candidates'}")
    wrong = [c.architecture for c in found.candidates if not _is_exact(c, shapes, known)]
    case.exact += not wrong
    case.failures += [f"{name}: the candidate {other} has different tensors" for other in wrong]
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
    """Run the members of each group and its first member; return rows of names and verdict."""
    rows = []
    known = json.loads(COMPARED.read_text()) if COMPARED.exists() else {}
    for first, *others in groups:
        for other in others:
            if known.get(f"run {first} {other}") == "":
                rows.append([f"`{first}`", f"`{other}`", "equal (measured when the index was built)"])
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
        found = difference(first, other, sizes=sizes)
        if not found.startswith("ran at"):
            return f"DIFFERS: {found}" if found else "equal"
    return "ran at none of the sizes tried"


def _start_seconds() -> float:
    """Return the seconds of the first identification in a fresh process, after the import of torch."""
    code = (
        "import torch, time; t = time.perf_counter(); "
        "from normswap.checkpoints.architecture.identification import identify; "
        "identify({'fc.weight': (10, 512)}); print(time.perf_counter() - t)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return statistics.median(float(run.stdout) for run in runs)


def _page(cases: Mapping[str, Case], ambiguous: Mapping[str, list[str]], ran: Sequence[Sequence[str]]) -> str:
    first, size = _start_seconds(), INDEX.stat().st_size
    functions = Counter(len(v) for v in ambiguous.values())
    parts = [
        "# Identification of every model of timm and torchvision from its tensors",
        "",
        "Written by `make identify` (`python -m benchmarks.architectures.identification`).",
        provenance(),
        "",
        *_METHOD,
        "",
        "| build | models | found | exact | one function | functions, mean | functions, most | candidates, most |",
        "|---|---|---|---|---|---|---|---|",
        *(_case_row(name, case) for name, case in cases.items()),
        "",
        "| | measured | target |",
        "|---|---|---|",
        f"| size of the index, bytes | {size:,} | at most {_SIZE_LIMIT:,} |",
        f"| first identification after `import torch`, s (median of 5) | {first:.2f} | below {_SLOWEST:g} |",
        *_seconds_rows(cases),
        "",
        f"## Several functions ({len(ambiguous)} models with default arguments)",
        "",
        f"Functions per set: {', '.join(f'{n}: {count} models' for n, count in sorted(functions.items()))}.",
        "",
        *dict.fromkeys(f"- {', '.join(f'`{n}`' for n in sorted(names))}" for names in ambiguous.values()),
        "",
        f"## Counted as one function and run ({len(ran)})",
        "",
        "Both models run in float64 with the same random parameters and statistics, in evaluation and training mode.",
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
        f"| later identifications, median, s | {statistics.median(seconds):.3f} | |",
        f"| slowest identification, s | {max(seconds):.2f} | below {_SLOWEST:g} |",
    ]


if __name__ == "__main__":
    main()
