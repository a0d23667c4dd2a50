"""`read_report` and `write_report`: what they read, write and refuse."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.checkpoints.reading import read_record
from normswap.checkpoints.record import Step
from normswap.checkpoints.saving import write_content
from normswap.errors import ArgumentError, CheckpointError, NothingToDo
from normswap.reports.node_data import node_data
from normswap.surgery.importance import SiteWeights, decided_branch
from tests.helpers import files


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a converted file, the original, and the converted model as an exported program."""
    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    result = normswap.convert(files.scrambled(model).eval(), torch.randn(2, 3, 16, 16))
    result.model[1].mean_weight.data.copy_(torch.tensor([0.0, 0.5, 0.5]))
    normswap.save(result.model, folder / "sn.pt", plan=result.plan)
    torch.save(model.state_dict(), folder / "bn.pt")
    program = torch.export.export(result.model, (torch.randn(2, 3, 16, 16),))
    torch.export.save(program, folder / "sn.pt2")
    plain = torch.export.export(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), (torch.randn(2, 3, 16, 16),))
    torch.export.save(plain, folder / "plain.pt2")
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_report_prints_as_tables(folder: Path) -> None:
    report = normswap.read_report("sn.pt")
    assert repr(report) == "Report('sn.pt', 2 sites)"
    assert [(site.becomes, site.moved) for site in report.sites] == [("mix", 0.5), ("BatchNorm", 0.0)]
    text = str(report)
    for part in ("sn.pt", "Importance weights", "Predicted bake, tolerance", "0.05", "History"):
        assert part in text
    assert report.predicted_bake[0.0] == {"in": 0, "ln": 0, "bn": 1, "mix": 1}
    document = json.loads(json.dumps(report.to_dict()))
    assert document["sites"][0]["importance_weights"]["mean"] == {"in": 0.0, "ln": 0.5, "bn": 0.5}


@pytest.mark.parametrize(
    ("mean", "tolerance", "decided"),
    [
        ({"in": 0.0, "ln": 0.0, "bn": 1.0}, 0.0, "bn"),
        ({"in": 0.0, "ln": 0.04, "bn": 0.96}, 0.05, "bn"),
        ({"in": 0.0, "ln": 0.06, "bn": 0.94}, 0.05, None),
        ({"ln": 1.0}, 0.0, "ln"),
        ({"in": 0.99, "ln": 0.01}, 0.1, "in"),
        ({"in": 0.5, "ln": 0.5}, 0.1, None),
    ],
)
def test_a_site_is_decided_within_the_tolerance(mean: dict[str, float], tolerance: float, decided: str | None) -> None:
    weights = SiteWeights(mean, {branch: torch.tensor(value).item() for branch, value in mean.items()})
    assert decided_branch(weights, tolerance) == decided


def test_means_and_variances_must_agree() -> None:
    assert decided_branch(SiteWeights({"bn": 1.0, "ln": 0.0}, {"bn": 0.0, "ln": 1.0}), 0.1) is None


@pytest.mark.parametrize("tolerance", [-0.1, 0.5, 1, "0.1", None, True, float("nan")])
def test_a_tolerance_out_of_range_is_refused(folder: Path, tolerance: Any) -> None:
    with pytest.raises(ArgumentError, match=r"tolerance: expected a number from 0 to below 0\.5, got "):
        normswap.read_report("sn.pt", tolerance=tolerance)
    with pytest.raises(ArgumentError, match="tolerance: expected"):
        normswap.write_report("sn.pt", "new.html", tolerance=tolerance)


def test_the_log_of_a_run_belongs_to_the_files_that_it_wrote(folder: Path) -> None:
    Path("log.jsonl").write_bytes(b'{"step": 1, "loss": 0.5}\n\xff\n')
    assert not normswap.read_report("sn.pt").course
    path = Path("sn.pt")
    record = read_record(path)
    assert record is not None
    step = Step.now("finetuned", source="recipe")
    write_content(torch.load(path), Path("tuned.pt"), "torch zip", replace(record, history=(*record.history, step)))
    assert normswap.read_report("tuned.pt").course.losses == ((1, 0.5),)
    for damaged in (b"\xff\xfe", b"[]\n3\n", b"[" * 100_000, b""):
        Path("log.jsonl").write_bytes(damaged)
        assert not normswap.read_report("tuned.pt").course
    Path("log.jsonl").unlink()
    assert not normswap.read_report("tuned.pt").course


def test_all_outputs_are_written(folder: Path) -> None:
    report = normswap.write_report(
        "sn.pt", "r.html", png="r.png", node_data_file="r.json", graph="sn.pt2", against="sn.pt", entry=None
    )
    assert Path("r.html").read_text().startswith("<!DOCTYPE html>")
    assert Path("r.png").read_bytes().startswith(b"\x89PNG")
    assert {*json.loads(Path("r.json").read_text())} == {"graph"}
    assert [site.fqn for site in report.sites] == ["1", "4"]


def test_node_data_names_the_nodes_of_a_program_in_its_sites(folder: Path) -> None:
    weights = normswap.read_report("sn.pt").weights
    (data,) = node_data(weights, Path("sn.pt2")).values()
    program = torch.export.load("sn.pt2")
    nodes = {node.name: node.meta["nn_module_stack"] for node in program.graph.nodes if "nn_module_stack" in node.meta}
    assert data["results"].keys() <= nodes.keys()
    found = {name: [*nodes[name].values()][-1][0] for name in data["results"]}
    assert {*found.values()} == {"1", "4"}
    for name, fqn in found.items():
        assert data["results"][name]["value"] == {"1": 0.75, "4": 1.0}[fqn]
    assert [each["stop"] for each in data["gradient"]] == [0, 0.5, 1]


GRAPHS = {
    "missing": ("nothing.pt2", "nothing.pt2: no such file"),
    "a checkpoint": ("sn.pt", r"sn.pt: expected an exported program .* of torch 2.9 or newer, got another archive"),
    "text": ("text.pt2", r"text.pt2: expected an exported program of torch.export.save \(.pt2\), got another file"),
    "a folder": ("folder.pt2", "got a folder"),
    "without sites": ("plain.pt2", "plain.pt2: no node of this program belongs to a converted site: export the"),
    "another graph": ("damaged.pt2", r"damaged.pt2: its graph cannot be read \(KeyError\): export it again"),
}


@pytest.mark.parametrize(("graph", "message"), GRAPHS.values(), ids=GRAPHS)
def test_a_bad_graph_is_refused_before_anything_is_written(folder: Path, graph: str, message: str) -> None:
    Path("text.pt2").write_text("hello")
    Path("folder.pt2").mkdir()
    with zipfile.ZipFile("damaged.pt2", "w") as archive:
        archive.writestr("damaged/models/model.json", "{}")
    with pytest.raises(CheckpointError, match=message):
        normswap.write_report("sn.pt", "new.html", node_data_file="new.json", graph=graph)
    assert not [path for path in folder.iterdir() if path.name.startswith("new")]


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "graph alone": ({"graph": "sn.pt2"}, ArgumentError, "graph= has no effect without node_data_file="),
    "no graph": ({"node_data_file": "n.json"}, ArgumentError, r"node_data_file= needs graph=, an exported program"),
    "input": ({"output": "sn.pt", "overwrite": True}, CheckpointError, "sn.pt: is read and cannot be written too"),
    "twice": ({"output": "n", "png": "./n"}, CheckpointError, "n: given as output= and png=: choose another name"),
    "exists": ({"output": "bn.pt"}, CheckpointError, "bn.pt: exists already: choose another name, or pass overwrite"),
    "no folder": ({"png": "no/n.png"}, CheckpointError, "no/n.png: expected an existing folder"),
    "against": ({"against": "bn.pt"}, NothingToDo, "bn.pt: contains no importance weights with a plan"),
    "entry": ({"entry": "ema"}, CheckpointError, "sn.pt: "),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSALS.values(), ids=REFUSALS)
def test_nothing_is_written_if_anything_is_wrong(
    folder: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(error, match=message):
        normswap.write_report("sn.pt", **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_picture_needs_matplotlib_and_a_page_does_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normswap.reports.report_files.find_spec", lambda _: None)
    with pytest.raises(ArgumentError, match=r"png= needs matplotlib, which is not installed: pip install 'normswap\["):
        normswap.write_report("sn.pt", "new.html", png="new.png")
    assert not Path("new.html").exists()
    normswap.write_report("sn.pt", "new.html")


def test_one_network_of_several_is_selected(folder: Path) -> None:
    content = {"g": torch.load("bn.pt"), "d": files.TiedNet().state_dict()}
    torch.save(content, "gan.pt")
    normswap.convert_file("gan.pt", "gan.sn.pt", entry=["g", "d"], architecture="none", verify=False)
    with pytest.raises(CheckpointError, match=r"contains several converted models .* choose one"):
        normswap.read_report("gan.sn.pt")
    assert len(normswap.read_report("gan.sn.pt", entry="g").sites) == 2


def test_a_pickled_model_needs_trust(folder: Path) -> None:
    torch.save(normswap.load("sn.pt", architecture=_network()).model, "module.pt")
    with pytest.raises(CheckpointError, match="trust=True"):
        normswap.read_report("module.pt")
    assert [site.becomes for site in normswap.read_report("module.pt", trust=True).sites] == ["mix", "BatchNorm"]


def _network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))


def test_a_functional_site_and_half_precision(folder: Path) -> None:
    result = normswap.convert(files.FunctionalNet().half().eval(), torch.randn(2, 3, 8, 8).half())
    normswap.save(result.model, "functional.pt", plan=result.plan)
    report = normswap.read_report("functional.pt")
    assert [site.becomes for site in report.sites] == ["BatchNorm", "BatchNorm"]
    assert "functional call" in {note for site in report.sites for note in site.notes}
