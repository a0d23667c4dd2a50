"""README, docs and docstrings run: Python blocks, `normswap` commands, their outputs, and every docstring's example.

A `text` block directly after a Python block or commands is their output: pass `--update-snapshots` to write it again.
"""

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner

import normswap
from normswap.cli import main
from tests.cli.test_snapshots import normalised

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
WIDTH = 100
# Phrases that the pages must not contain: words that the project used before it used those of the field.
OLD_WORDS = (
    "anew|law 1|parity|proof|proves?|proved|told|tells|said|held|lies|is fed|are fed|the ground|alike|as ever|at hand"
    "|way out|kin|likelier|hangs? on|in place of|takes? the place|priced?|batch[ _]price|begun|beside|stands? for"
)


# --- blocks of the pages ----------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Statements to run, the output expected of them (None: not shown), and the place of that output in the page."""

    code: str
    output: str | None = None
    span: tuple[int, int] = (0, 0)


def steps(text: str) -> list[Step]:
    """Return a page as steps: Python blocks as they are, `normswap` commands as calls that must succeed."""
    blocks = list(BLOCK.finditer(text))
    found = []
    for number, block in enumerate(blocks):
        language, body = block[1], block[2]
        if language == "python":
            code = body
        elif language == "sh":
            commands = [line.removeprefix("$ ").split("#")[0].strip() for line in body.splitlines()]
            code = "".join(f"run({command!r})\n" for command in commands if command.startswith("normswap "))
        else:
            continue
        after = blocks[number + 1] if number + 1 < len(blocks) else None
        if code and after and after[1] == "text" and not text[block.end() : after.start()].strip():
            found.append(Step(code, after[2], after.span(2)))
        elif code:
            found.append(Step(code))
    return found


def run(command: str) -> None:
    """Run a command in this process; tests/cli/test_command_line.py covers its start."""
    done = CliRunner().invoke(main, shlex.split(command)[1:])
    assert done.exit_code == 0, f"{command}: exit code {done.exit_code}\n{done.output}"
    print(done.stdout, end="")


def run_steps(found: list[Step], folder: Path) -> list[str | None]:
    """Run the steps as one script; return the output of those with an expected one."""
    outputs: list[str | None] = [None] * len(found)
    printed = io.StringIO()

    def end_step(number: int) -> None:
        if found[number].output is not None:
            outputs[number] = "".join(f"{line.rstrip()}\n" for line in printed.getvalue().strip("\n").splitlines())
        printed.seek(0)
        printed.truncate()

    script = folder / "page.py"
    script.write_text("".join(f"{step.code}\nend_step({number})\n" for number, step in enumerate(found)))
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(script), {"run": run, "end_step": end_step}, "page")
    return outputs


def with_outputs(text: str, found: list[Step], outputs: list[str | None]) -> str:
    """Return the page with the outputs that differ replaced."""
    for step, output in reversed(list(zip(found, outputs, strict=True))):
        if output is not None and step.output is not None and normalised(output) != normalised(step.output):
            text = text[: step.span[0]] + output + text[step.span[1] :]
    return text


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning",  # pytorch-lightning 2.6 with torch 2.14
    "ignore::UserWarning:pytorch_lightning",  # its advice on workers and on the folder of logs
    "ignore:Secure RNG turned off:UserWarning",  # Opacus: torch's random numbers are enough for a page
    "ignore:Full backward hook is firing:UserWarning",  # Opacus' hook on the first layer, whose inputs are images
    "ignore:Optimal order is the:UserWarning",  # Opacus: its bound on epsilon could be tighter
    "ignore:.torch.jit:FutureWarning",  # fvcore 0.1.5 and torch-pruning 1.6 with torch 2.14
)
@pytest.mark.parametrize(
    "page", [p for p in PAGES if steps(p.read_text(encoding="utf-8"))], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_every_block_of_the_page_runs_and_prints_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    found = steps(text)
    outputs = run_steps(found, tmp_path)
    if request.config.getoption("--update-snapshots"):
        page.write_text(with_outputs(text, found, outputs), encoding="utf-8")
        return
    for step, output in zip(found, outputs, strict=True):
        if step.output is not None and output is not None:
            assert normalised(output) == normalised(step.output), "the output changed; if it should: --update-snapshots"


def test_steps_are_found_and_a_changed_output_is_noticed(tmp_path: Path) -> None:
    page = "```sh\n$ normswap --version  # short\nmake demo\n```\n\n```python\nprint(1)\n```\n\n```text\n2\n```\n"
    found = steps(page)
    assert [step.code for step in found] == ["run('normswap --version')\n", "print(1)\n"]
    outputs = run_steps(found, tmp_path)
    assert outputs == [None, "1\n"]
    assert with_outputs(page, found, outputs) == page.replace("2\n", "1\n")
    assert steps("```python\nprint(1)\n```\n\nWords.\n\n```text\nnormswap\n```\n")[0].output is None


# --- docstrings -------------------------------------------------------------------------------------------------------

EXAMPLE = re.compile(r"^\s*>>> ", re.M)
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "normswap").rglob("*.py"))
    if EXAMPLE.search(path.read_text(encoding="utf-8"))
]


def needs_example(name: str) -> bool:
    """Return true for functions and classes, except errors: an error's example is the message."""
    value = getattr(normswap, name)
    return inspect.isroutine(value) or (inspect.isclass(value) and not issubclass(value, Exception))


@pytest.mark.slow
@pytest.mark.parametrize("name", normswap.__all__)
def test_a_public_name_has_a_docstring_with_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(normswap, name)) or ""
    assert text, f"normswap.{name} has no docstring"
    if needs_example(name):
        assert re.search(r"^Examples:\n(?:.*\n)*?\s+>>> ", text, re.M), f"normswap.{name} shows no example"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_every_example_in_the_docstrings_of_a_module_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    source = inspect.getsource(module)
    finder = doctest.DocTestFinder(exclude_empty=True)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    attempted = 0
    names = [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    public = {each: getattr(normswap, each) for each in normswap.__all__ if re.search(rf"\b{each}\b", source)}
    globs = {**public, "normswap": normswap, "torch": torch, **vars(module)}
    examples = finder.find(source_docstring(module), name, module=False, globs=globs)
    for each in names:
        examples += finder.find(getattr(module, each), each, module=False, globs=globs)
    for example in examples:
        report = io.StringIO()
        result = doctest.DocTestRunner(optionflags=flags, verbose=False).run(example, out=report.write)
        assert not result.failed, report.getvalue()
        attempted += result.attempted
    assert attempted == len(EXAMPLE.findall(source)), f"some examples in {name} are in no docstring"


def source_docstring(module: object) -> Callable[[], None]:
    """Return a function with the docstring of the module, since a finder would search everything in a module."""

    def holder() -> None:
        pass

    holder.__doc__ = module.__doc__
    return holder


# --- the pages --------------------------------------------------------------------------------------------------------


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_every_make_target_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for name in re.findall(r"`make ([a-z-]+)`", page.read_text(encoding="utf-8")):
            assert name in targets, f"{page.name} names make {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_has_none_of_the_old_words(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    assert re.findall(rf"\b(?:{OLD_WORDS})\b", prose, re.I) == []


def test_the_readme_is_short_and_starts_with_code_and_a_picture() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120
    assert any(line.startswith("![") for line in lines[:20])
    assert any(line == "```python" for line in lines[:60])


def demo_scores() -> dict[str, float]:
    """Return the accuracies of the demo, which the tutorial lists, by arm."""
    rows = table_rows((DOCS / "tutorial.md").read_text(encoding="utf-8").partition("`make demo`")[2])
    return {name.partition(",")[0]: float(score) for name, score in rows[1:]}


def test_the_picture_shows_the_records() -> None:
    """The scores in the records; as long as these are not complete, perhaps those of fewer seeds, or of the demo."""
    from benchmarks.finetuning import picture  # matplotlib takes a while
    from benchmarks.finetuning.evidence.plan import SEEDS

    drawn, shown = picture.read_values(), None
    with contextlib.suppress(SystemExit):  # no seed is complete
        shown = picture.shown_values()
    if shown is not None:
        pairs = [(drawn["arms"][arm]["scores"], values["scores"]) for arm, values in shown["arms"].items()]
        if len(pairs[0][1]) >= len(SEEDS):
            assert {name: value for name, value in drawn.items() if name in shown} == shown
        if all(ours and ours == theirs[: len(ours)] for ours, theirs in pairs):
            return
    assert {arm["title"]: [f"{score:.1f}" for score in arm["scores"]] for arm in drawn["arms"].values()} == {
        name: [f"{score:.1f}"] for name, score in demo_scores().items()
    }


def test_the_figures_of_the_evidence_are_those_of_its_records() -> None:
    """Every mean in the page is that of the first seeds of an arm in the records; the page may lack newer runs."""
    from benchmarks.finetuning.evidence.arms import ALL
    from benchmarks.finetuning.evidence.plan import BATCHES, SETTINGS
    from benchmarks.paths import RESULTS
    from benchmarks.records import read_lines

    runs: dict[tuple[str, str, int], dict[tuple[Any, ...], dict[int, float]]] = {}
    for record in read_lines(RESULTS / "evidence.jsonl", key="key").values():
        if record["test"] is not None:
            cell = ALL[record["arm"]].title, SETTINGS[record["setting"]].title, record["batch"]
            rates = record["rate"], record["gate_rate"], record["steps"]
            runs.setdefault(cell, {}).setdefault(rates, {})[record["seed"]] = record["test"]
    page = (DOCS / "measured" / "evidence.md").read_text(encoding="utf-8")
    for setting in SETTINGS.values():
        section = page.partition(f"\n## {setting.title[0].upper()}{setting.title[1:]}\n")[2].partition("\n## ")[0]
        assert section, f"the page has no section {setting.title}"
        for name, *cells in [row for row in table_rows(section.partition("\nDifference of")[0]) if row[0] != "arm"]:
            for batch, cell in zip(BATCHES, cells, strict=True):
                if cell != "-":
                    mean, count = cell.strip("*").split(" ")[0], int(cell.rpartition("(")[2].rstrip(")* "))
                    scores = [seeds for seeds in runs[name, setting.title, batch].values() if len(seeds) >= count]
                    means = [sum(seeds[seed] for seed in sorted(seeds)[:count]) / count for seeds in scores]
                    assert mean in {f"{value:.1f}" for value in means}, f"{name}, {setting.title}, batch {batch}"


def test_the_evidence_in_the_readme_is_that_of_its_page() -> None:
    """A row of the README whose name is that of an arm has only figures in the page's rows of this arm."""
    from benchmarks.finetuning.evidence.arms import ALL

    readme = README.read_text(encoding="utf-8")
    page = table_rows((DOCS / "measured" / "evidence.md").read_text(encoding="utf-8"))
    for arm in ALL.values():
        measured = {cell.strip("*").split(" ")[0] for row in page if row[0] == arm.title for cell in row[1:]}
        shown = {cell.strip("*") for row in table_rows(readme) if row[0] == arm.title for cell in row[1:]}
        assert shown <= measured, f"{arm.title}: not in docs/measured/evidence.md"
    for name, score in demo_scores().items():
        assert f"{name} {score:.1f}" in " ".join(readme.replace("*", "").split())


def test_the_numbers_of_the_readme_are_those_of_the_measured_pages() -> None:
    readme = README.read_text(encoding="utf-8")
    small = (DOCS / "measured" / "small-batch.md").read_text(encoding="utf-8")
    (single,) = [row for row in table_rows(small) if row[0] == "1"]
    recipe, bn = single[1].split()[0], single[-1].split()[0]
    assert f"At batch size 1 the recipe reaches {recipe} %, BN in training mode {bn} %" in " ".join(readme.split())
    coverage = (DOCS / "measured" / "coverage.md").read_text(encoding="utf-8")
    (total,) = [row for row in table_rows(coverage) if row[0] == "all"]
    (within,) = re.findall(r"(\d+) of the (\d+) models fit in 24 GB", readme)
    assert within == (total[3], total[2])
    assert re.findall(r"all (\d+) match", readme) == [total[8]]
    assert re.findall(r"\((\d+) of\s+them by the clause", readme) == re.findall(r"needed for (\d+) models", coverage)
    assert re.findall(r"(\d+) in float32;", readme) == re.findall(r"## Verified in float32 \((\d+)\)", coverage)


def test_the_speeds_of_the_readme_are_those_of_the_measured_page() -> None:
    readme = README.read_text(encoding="utf-8")
    page = (DOCS / "measured" / "speed.md").read_text(encoding="utf-8")
    rows = table_rows(page)
    shown = {row[0]: row[1:] for row in table_rows(readme)}
    for name, mode, length in (("a layer, training step", "train", 10), ("a layer, evaluation", "eval", 6)):
        means = [row for row in rows if len(row) == 12 and row[3] == mode]
        assert len(means) == 12
        for cell, column in zip(shown[name], (7, 9), strict=False):  # running; running, moved gates
            ratios = sorted(float(row[column]) for row in means)
            assert cell == f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
        shapes = [row for row in rows if len(row) == length and re.fullmatch(r"\d+(x\d+)+", row[0])]
        eager = sorted(float(row[-1].rstrip("?")) for row in shapes if row[-1])
        digits = 1 if mode == "train" else 0
        assert shown[name][2] == f"{eager[0]:.{digits}f}-{eager[-1]:.{digits}f}"
    (network,) = [cells for name, cells in shown.items() if name.startswith("`resnet50`")]
    times = [row[6].rstrip("?") for row in rows if row[:4] == ["resnet50", "contiguous", "fp32", "2"]]
    (peak,) = [row[3].split()[0] for row in rows if row[0] == "resnet50" and len(row) == 4]
    assert network[0].split(" / ") == [*times, peak]


def test_the_worst_shape_of_the_readme_is_that_of_the_measurements() -> None:
    from benchmarks.paths import RESULTS
    from benchmarks.speed.records import read_records

    *_, measured = read_records(RESULTS / "speed.json").values()  # of the processor measured last, as on the page
    arms = ("running", "running, moved gates")
    worst = max(each.ratios[arm].value for each in measured.layers if each.mode == "train" for arm in arms)
    assert f"{worst:.2f} for the worst shape in training" in README.read_text(encoding="utf-8")


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of every row of the Markdown tables in a text, without emphasis."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]
