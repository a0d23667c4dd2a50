"""Run the tests of tests/integrations (`make integrations`) -> docs/measured/integrations.md."""

import os
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from xml.etree import ElementTree

from benchmarks.paths import PAGES, ROOT
from benchmarks.provenance import provenance

# The file of each integration's tests: its title, and the packages whose versions count.
LIBRARIES = {
    "test_timm": ("timm", ("timm",)),
    "test_ultralytics": ("Ultralytics", ("ultralytics",)),
    "test_nnunet": ("nnU-Net", ("nnunetv2", "dynamic-network-architectures")),
    "test_mmengine": ("mmengine", ("mmengine", "mmcv-lite")),
    "test_hub": ("Hugging Face Hub", ("huggingface-hub",)),
}
_RESULTS = ("passed", "failed", "skipped")


class Result(NamedTuple):
    """One test: the file, what it states, and the result."""

    file: str
    statement: str
    result: str


def main() -> None:
    """Run the tests, write the page and print it; exit with 1 if a test failed."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "results.xml"
        # Warnings are no errors here: these libraries bring older versions of others.
        tests = ["tests/integrations", f"--junit-xml={report}", "-p", "no:cacheprovider", "-W", "default"]
        subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found = read_results(report)
    (PAGES / "integrations.md").write_text(page(found), encoding="utf-8")
    print(page(found))
    raise SystemExit(any(each.result == "failed" for each in found))


def read_results(report: Path) -> list[Result]:
    """Return the tests in a JUnit report."""
    return [_read_case(case) for case in ElementTree.parse(report).iter("testcase")]


def _read_case(case: ElementTree.Element) -> Result:
    name, _, parameter = case.attrib["name"].partition("[")
    path = f"{case.attrib['classname']}.{name}"  # a file that cannot be imported is the name of its only case
    file = next(part for part in path.split(".") if part.startswith("test_"))
    statement = name.removeprefix("test_").replace("_", " ") + (f": {parameter.rstrip(']')}" if parameter else "")
    kinds = {child.tag for child in case}
    result = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
    return Result(file, statement, result)


def page(found: list[Result]) -> str:
    """Return the page of the results."""
    parts = [
        "# Ways in, tested",
        f"Written by `make integrations` (`python -m benchmarks.integrations`).\n{provenance()}",
        "The tests of every library in [ways in](../how-to/ways-in.md). Training runs are a few steps on generated "
        "data; the Hub is replaced by a folder.",
        _summary(found),
        *(_section(file, [each for each in found if each.file == file]) for file in LIBRARIES),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(found: list[Result]) -> str:
    rows = []
    for file, (title, packages) in LIBRARIES.items():
        counts = Counter(each.result for each in found if each.file == file)
        cells = (title, ", ".join(map(_version, packages)), *(str(counts[name]) for name in _RESULTS))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(["| library | versions | passed | failed | skipped |", "|---|---|---|---|---|", *rows])


def _section(file: str, found: list[Result]) -> str:
    """Return what the tests of a library state, tests with several parameters on one line."""
    statements: dict[tuple[str, str], list[str]] = {}
    for each in found:
        statement, _, parameter = each.statement.partition(": ")
        statements.setdefault((statement, each.result), []).extend([parameter] if parameter else [])
    lines = [
        f"- {re.sub(r'^.', lambda first: first[0].upper(), statement)}{_parameters(values)}"
        + (f" - **{result}**" if result != "passed" else "")
        for (statement, result), values in statements.items()
    ]
    return "\n".join([f"## {LIBRARIES[file][0]}", "", *(lines or ["The tests were skipped."])])


def _parameters(values: list[str]) -> str:
    plain = [value for value in values if re.fullmatch(r"[\w-]+", value)]
    return f" ({', '.join(plain)})" if plain else ""


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"without {package}"


if __name__ == "__main__":
    main()
