"""The HTML report: well-formed, complete, without links, the same each time, with every foreign text escaped."""

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import normswap
from normswap.reports.file_report import Report
from normswap.reports.page.html_page import render_page
from normswap.reports.training_course import read_course
from normswap.surgery.importance import SiteWeights
from tests.helpers import files

VOID = {"meta", "input"}
HOSTILE = "<script>alert(1)</script>\"'&\u202e"


class Page(HTMLParser):
    """The elements of a page; raises if an element is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.counts: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.attributes += attrs
        assert len({name for name, _ in attrs}) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted file with moved gates, a skipped site and a verification."""
    torch.manual_seed(0)
    model, x = files.small_model(), torch.randn(files.SHAPE)
    result = normswap.convert(model, x, exclude=["layer4.0.bn2"])
    verification = normswap.verify(model, result.model, [x])
    layer = result.model.get_submodule("layer1.0.bn1")
    layer.mean_weight.data.copy_(torch.tensor([0.25, 0.5, 0.25]))
    path = tmp_path_factory.mktemp("report") / "sn.pt"
    normswap.save(result.model, path, plan=result.plan, architecture=files.ARCH, verification=verification)
    return path


@pytest.fixture(scope="module")
def report(path: Path) -> Report:
    return normswap.read_report(path)


def run_records(steps: int = 3) -> list[dict[str, object]]:
    """The log of a run of a network with four sites."""
    weights = {"mean": {"in": 0.25, "ln": 0.25, "bn": 0.5}, "var": {"ln": 0.5, "bn": 0.5}}
    importance = {f"{HOSTILE}.{index}": weights for index in range(4)}
    records: list[dict[str, object]] = [
        {"step": 10 * step, "loss": 1 / (1 + step), "lr": 0.1, "importance": importance} for step in range(steps)
    ]
    return [*records, {"step": 10 * (steps - 1), "evaluation": {"accuracy": 50.0, "loss": 1.0, "images": 3}}]


def test_the_page_is_well_formed_and_shows_every_site(report: Report) -> None:
    page = Page(render_page(report))
    text = " ".join(page.text)
    assert page.counts["html"] == page.counts["head"] == page.counts["body"] == 1
    assert len(report.sites) == 14
    for site in report.sites:
        assert site.fqn in page.text
    for part in (
        "Importance weights over depth",
        "Predicted bake",
        "Sites",
        "Not converted",
        "Verification",
        "History",
    ):
        assert part in page.text
    assert "excluded by the pattern 'layer4.0.bn2'" in text
    assert "layer1.0.bn1: in 0.25, ln 0.50, bn 0.25" in page.text
    assert "13 of 14" in page.text
    assert "outputs in evaluation" in page.text
    assert page.counts["svg"] == 2
    assert page.counts["rect"] == 2 * 14


@pytest.mark.parametrize("with_run", [False, True], ids=["alone", "with a run"])
def test_the_page_loads_nothing(report: Report, with_run: bool) -> None:
    shown = replace(report, course=read_course(run_records())) if with_run else report
    text = render_page(shown, report)
    assert not re.search(r"https?:|//\w|@import|url\(|\bsrc\b=|href", text)
    page = Page(text)
    assert not page.counts.keys() & {"link", "img", "iframe", "a", "base", "object"}
    assert page.counts["script"] == page.counts["style"] == 1
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert ("content", policy) in page.attributes


def test_the_same_file_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    for name in "ab":
        normswap.write_report(path, tmp_path / f"{name}.html", png=tmp_path / f"{name}.png", against=path)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_texts_of_a_file_are_escaped(report: Report) -> None:
    plan = report.plan
    assert plan is not None
    assert report.verification is not None
    hostile_swaps = tuple(replace(swap, fqn=f"{HOSTILE}.{i}", class_name=HOSTILE) for i, swap in enumerate(plan.swaps))
    hostile_skips = tuple(replace(skip, fqn=HOSTILE, reason=HOSTILE, class_name=HOSTILE) for skip in plan.skips)
    weights = {swap.fqn: SiteWeights({"bn": 1.0}, {"bn": 1.0}) for swap in hostile_swaps}
    hostile = replace(
        report,
        file=HOSTILE,
        facts=HOSTILE,
        plan=replace(plan, swaps=hostile_swaps, skips=hostile_skips, notes=(HOSTILE,)),
        weights=weights,
        verification=replace(
            report.verification, notes=(HOSTILE,), inputs=HOSTILE, judged_by=HOSTILE, precision=HOSTILE
        ),
        history=tuple(replace(step, action=HOSTILE, source=HOSTILE, detail=HOSTILE) for step in report.history),
        course=read_course(run_records()),
    )
    text = render_page(hostile, replace(hostile, file=f"{HOSTILE} before"))
    page = Page(text)
    assert page.counts["script"] == 1
    assert "<script>alert" not in text
    assert "\u202e" not in text
    assert text.count("alert(1)") > 30
    assert {name for name, _ in page.attributes} <= {
        *("lang", "charset", "name", "content", "http-equiv", "class", "viewbox", "preserveaspectratio", "role"),
        *("aria-label", "d", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height", "text-anchor"),
        *("points", "id", "type", "placeholder", "scope", "title", "data-v", "style"),
    }


def test_two_files_are_shown_side_by_side(report: Report, path: Path) -> None:
    moved = {fqn: SiteWeights({"in": 0.2, "bn": 0.8}, {"bn": 1.0}) for fqn in report.weights}
    only_before = {**moved, "gone": SiteWeights({"bn": 1.0}, {"bn": 1.0})}
    text = render_page(replace(report, file="after.pt"), replace(report, file="before.pt", weights=only_before))
    page = Page(text)
    assert page.counts["svg"] == 4
    assert page.text.index("before.pt") < page.text.index("layer1.0.bn1: in 0.20, bn 0.80")
    assert {"after.pt", "before.pt", "change", "gone", "not in the file"} <= {*page.text}
    same_name = render_page(replace(report, file="b/m.pt"), replace(report, file="a/m.pt"))
    assert {"a/m.pt", "b/m.pt"} <= {*Page(same_name).text}


@pytest.mark.parametrize("steps", [1, 2, 3, 30])
def test_the_course_of_a_run_is_drawn_from_step_0_without_a_line_between_two_points(report: Report, steps: int) -> None:
    text = render_page(replace(report, course=read_course(run_records(steps))))
    page = Page(text)
    assert "Training" in page.text
    assert page.text.count("step 0") == 2 + 2 * 3
    assert text.count("<polyline") == (1 if steps > 2 else 0)
    assert text.count("<polygon") == (18 if steps > 2 else 0)
    assert str(10 * (steps - 1)) in page.text


def test_a_network_whose_model_is_the_site_and_one_without_plan(tmp_path: Path) -> None:
    result = normswap.convert(nn.BatchNorm2d(8), torch.randn(2, 8, 4, 4))
    normswap.save(result.model, tmp_path / "one.pt", plan=result.plan)
    assert "(the model)" in Page(render_page(normswap.read_report(tmp_path / "one.pt"))).text
    model = normswap.convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))).model
    torch.save(model, tmp_path / "module.pt")
    report = normswap.read_report(tmp_path / "module.pt", trust=True)
    assert (report.plan, report.sites[0].becomes, report.sites[0].notes) == (None, "BatchNorm", ())
    assert "None is recorded in this file." in Page(render_page(report)).text


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"gate": "softmax"}, "softmax gate"),
        ({"start": "ln"}, "started at ln"),
        ({"start": "gn"}, "ln of 8 groups"),
        ({"bn_statistics": "batch"}, "batch statistics"),
        ({"match": False}, "raw branches"),
    ],
)
def test_what_is_unusual_about_a_site_is_noted(tmp_path: Path, options: dict[str, object], note: str) -> None:
    model = files.scrambled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))
    result = normswap.convert(model, torch.randn(2, 3, 4, 4), **options)
    normswap.save(result.model, tmp_path / "sn.pt", plan=result.plan)
    (site,) = normswap.read_report(tmp_path / "sn.pt").sites
    assert note in site.notes
    assert note in " ".join(Page(render_page(normswap.read_report(tmp_path / "sn.pt"))).text)
    if "start" in options:
        assert site.moved is None
        assert site.becomes == f"GroupNorm({8 if options['start'] == 'gn' else 1})"


def test_a_distance_is_shown_in_place_of_a_verification(report: Report) -> None:
    distance = normswap.Distance(0.25, 0.5, 4, "2x3x8x8")
    text = " ".join(Page(render_page(replace(report, distance=distance))).text)
    assert "Relative L2 error of the outputs: 0.25; 50.0% of predictions are the same (on 2x3x8x8)." in text
    assert "top1" not in " ".join(
        Page(render_page(replace(report, distance=replace(distance, top1_agreement=None)))).text
    )


def test_a_page_of_500_sites_stays_small(report: Report) -> None:
    assert report.plan is not None
    swap = report.plan.swaps[0]
    plan = replace(report.plan, swaps=tuple(replace(swap, fqn=f"stages.{i}.norm") for i in range(500)))
    weights = {each.fqn: SiteWeights({"in": 0.1, "bn": 0.9}, {"ln": 0.1, "bn": 0.9}) for each in plan.swaps}
    text = render_page(replace(report, plan=plan, weights=weights))
    assert len(text) < 1_000_000
    assert Page(text).text.count("stages.499.norm") >= 1
