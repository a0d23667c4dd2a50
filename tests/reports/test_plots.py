"""The pictures: importance weights over depth, and the course of a run."""

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import normswap
from normswap.reports import plots
from normswap.reports.training_course import read_course
from normswap.surgery.importance import SiteWeights

MIX = SiteWeights({"in": 0.2, "ln": 0.3, "bn": 0.5}, {"ln": 0.4, "bn": 0.6})


@pytest.fixture(autouse=True)
def close_figures() -> Any:
    yield
    pyplot.close("all")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are turned into files."""
    drawn: list[Figure] = []
    to_png = plots._to_png
    monkeypatch.setattr(plots, "_to_png", lambda figure: drawn.append(figure) or to_png(figure))
    return drawn


def record(step: int, sites: int = 6) -> dict[str, Any]:
    importance = {f"layer{index}": MIX._asdict() for index in range(sites)}
    return {"step": step, "loss": 1.0 + step, "lr": 0.1, "importance": importance}


def evaluation(step: int) -> dict[str, Any]:
    return {"step": step, "evaluation": {"accuracy": 50.0, "loss": 2.0}}


def heights(axis: Any, collection: int) -> list[float]:
    """The heights of the bars of one branch."""
    boxes = [path.vertices for path in axis.collections[collection].get_paths()]
    return [float(box[:, 1].max() - box[:, 1].min()) for box in boxes]


def test_the_bars_are_the_importance_weights_of_a_model() -> None:
    model = normswap.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8))).model
    model[2].mean_weight.data.copy_(torch.tensor([0.25, 0.5, 0.25]))
    mean, var = normswap.plot_importance(model)
    assert mean.get_title(loc="left") == "importance weights of means"
    assert [heights(mean, i) for i in range(3)] == [[1, 0.25], [0, 0.5], [0, 0.25]]
    assert heights(var, 0) == [1, 1]
    assert [label.get_text() for label in var.get_xticklabels()] == ["1", "2"]
    assert [collection.get_label() for collection in mean.collections] == ["bn", "ln", "in"]  # from the bottom
    assert [text.get_text() for text in mean.get_legend().get_texts()] == ["in", "ln", "bn"]  # from the top


def test_it_draws_into_given_axes_and_takes_weights() -> None:
    _, given = pyplot.subplots(1, 2)
    assert normswap.plot_importance({"a": MIX}, axes=given) is given
    assert heights(given[0], 0) == [0.5]
    assert len(normswap.plot_importance(nn.Linear(2, 2))[0].collections[0].get_paths()) == 0


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(normswap.ArgumentError, match=r"model: expected a torch\.nn\.Module"):
        normswap.plot_importance("model.pt")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["$\\frac{$", "层.bn", "a_b^c", "x" * 300, ""])
def test_names_of_sites_are_drawn_as_they_are(name: str) -> None:
    with warnings.catch_warnings(), Image.open(io.BytesIO(plots.importance_png({name: MIX}))) as image:
        warnings.simplefilter("error")
        assert image.size[0] > 1000


def test_500_sites_have_a_number_and_no_names(figures: list[Figure]) -> None:
    plots.importance_png({f"layer.{index}": MIX for index in range(500)})
    assert len(heights(figures[0].axes[1], 0)) == 500
    assert figures[0].axes[1].get_xlabel() == "site, in the order of the network"


def test_the_course_has_a_panel_per_depth_and_starts_at_step_0(tmp_path: Path, figures: list[Figure]) -> None:
    plots.plot_run([evaluation(0), *map(record, (10, 20, 30)), evaluation(30)], tmp_path / "course.png")
    titles = [axis.get_title(loc="left") for axis in figures[0].axes]
    assert titles == [
        *("loss", "first 2 sites, means", "middle 2 sites, means", "last 2 sites, means"),
        *("accuracy, %", "first 2 sites, variances", "middle 2 sites, variances", "last 2 sites, variances"),
    ]
    assert {axis.get_xlim() for axis in figures[0].axes} == {(0, 30)}
    legend = figures[0].axes[3].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["in", "ln", "bn"]
    assert (tmp_path / "course.png").read_bytes().startswith(b"\x89PNG")


def test_two_points_get_no_line(tmp_path: Path, figures: list[Figure]) -> None:
    plots.plot_run([evaluation(0), record(0, 1), record(10, 1), evaluation(10)], tmp_path / "course.png")
    axes = figures[0].axes
    lines = [line for axis in axes for line in axis.get_lines()]
    assert len(lines) == 3
    assert {(line.get_linestyle(), line.get_marker()) for line in lines} == {("None", "o")}
    assert [axis.get_title(loc="left") for axis in axes][1] == "all site: layer0, means"
    assert all(not axis.collections and len(axis.patches) == 6 for axis in (axes[1], axes[3]))
    plots.plot_run([record(0), record(10), record(20)], tmp_path / "course.png")
    assert [line.get_linestyle() for line in figures[1].axes[0].get_lines()] == ["-"]


@pytest.mark.parametrize("records", [[], [{"step": 0, "notes": []}]])
def test_an_empty_log_is_drawn_as_empty_panels(tmp_path: Path, records: list[Any]) -> None:
    plots.plot_run(records, tmp_path / "course.png")
    assert (tmp_path / "course.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "bad",
    [
        *(3, None, [], {}, {"step": "1", "loss": 1.0}, {"step": -1, "loss": 1.0}, {"step": True, "loss": 1.0}),
        *({"step": 1, "loss": "low"}, {"step": 1, "loss": float("nan")}, {"step": 1, "evaluation": 3}),
        *({"step": 1, "importance": 3}, {"step": 1, "importance": {"a": 3}}, {"step": 1, "importance": {"a": {}}}),
        {"step": 1, "importance": {"a": {"mean": {"xn": 1}, "var": {"bn": 1}}}},
        {"step": 1, "importance": {"a": {"mean": {"bn": "all"}, "var": {"bn": 1}}}},
    ],
)
def test_a_record_in_another_form_is_left_out(bad: Any) -> None:
    good = record(1)
    assert read_course([bad, good, bad]) == read_course([good])


def test_depths_are_thirds_of_the_sites() -> None:
    groups = {count: list(read_course([record(0, count)]).depths()) for count in (0, 1, 2, 3, 7)}
    assert groups[0] == []
    assert groups[1] == ["all site: layer0"]
    assert groups[2] == ["first site: layer0", "last site: layer1"]
    assert groups[3] == ["first site: layer0", "middle site: layer1", "last site: layer2"]
    assert groups[7] == ["first 2 sites", "middle 3 sites", "last 2 sites"]
