"""Files of networks with matched branches, and of networks that start without batch statistics."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.checkpoints.content.state_dict import plan_from_names
from normswap.checkpoints.reading import read_record
from normswap.checkpoints.record import Record
from normswap.errors import ArgumentError, CheckpointError, NothingToDo
from normswap.layers.matching import MATCHING_BUFFERS, match_statistics

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(5)) * 2 + 1


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16, eps=1e-3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )


class Training:
    """A training checkpoint: a trained network, a copy with statistics of its own, an optimizer."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = network().train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(10):
            self.optimizer.zero_grad()
            self.model(2 * torch.randn(8, 3, 12, 12) + 1).square().mean().backward()
            self.optimizer.step()
        self.ema = copy.deepcopy(self.model)
        self.ema[1].running_mean += 0.5  # type: ignore[operator]
        self.model.eval()
        self.ema.eval()

    def save(self, path: Path) -> Path:
        content = {"model": self.model.state_dict(), "ema": self.ema.state_dict()}
        torch.save({**content, "optimizer": self.optimizer.state_dict(), "epoch": 3}, path)
        return path


@pytest.fixture(scope="module")
def training() -> Training:
    return Training()


@pytest.fixture
def file(training: Training, tmp_path: Path) -> Path:
    return training.save(tmp_path / "bn.pt")


def converted(file: Path, **options: Any) -> normswap.FileConversion:
    arguments: dict[str, Any] = {"architecture": network, "example_inputs": X, "overwrite": True}
    return normswap.convert_file(file, file.with_name("sn.pt"), **(arguments | options))


def loaded(result: normswap.FileConversion, entry: str | None = None) -> normswap.Loaded:
    return normswap.load(result.output, architecture=network, entry=entry)


# --- matched branches -------------------------------------------------------------------------------------------------


def test_each_copy_in_a_file_is_matched_to_its_own_statistics(file: Path, training: Training) -> None:
    result = converted(file)
    assert result.verification is not None
    assert result.verification.passed
    for entry, original in (("model", training.model), ("ema", training.ema)):
        layer, bn = loaded(result, entry).model[1], original[1]
        expected = match_statistics(bn.running_mean, bn.running_var, bn.eps)  # type: ignore[arg-type, union-attr]
        torch.testing.assert_close(layer.matching[:2], expected[:2])
        assert torch.equal(loaded(result, entry).model(X), normswap.convert(original, X).model.eval()(X))


def test_a_fresh_process_computes_the_same_bits(file: Path) -> None:
    result = converted(file, start="gn", num_groups=4, data=[X])
    model = loaded(result).model
    torch.save({"x": X, "y": model(X).detach()}, file.with_name("expected.pt"))
    code = (
        "import torch, normswap\n"
        "from tests.checkpoints.test_starts_in_files import network\n"
        "found = torch.load('expected.pt')\n"
        "assert torch.equal(normswap.load('sn.pt', architecture=network).model(found['x']), found['y'])\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        subprocess.run([sys.executable, "-c", code], cwd=file.parent, check=True, env=environment)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["sn.pt", "sn.safetensors"])
def test_saving_and_loading_keeps_matched_branches_to_the_bit(tmp_path: Path, training: Training, name: str) -> None:
    conversion = normswap.convert(training.model, X, data=[X])
    normswap.save(conversion.model, tmp_path / name, plan=conversion.plan)
    again = normswap.load(tmp_path / name, architecture=network).model.state_dict()
    state = conversion.model.state_dict()
    assert list(again) == list(state)
    assert all(torch.equal(tensor, again[key]) for key, tensor in state.items())
    assert not torch.equal(state["1.in_var_scale"], torch.ones(8))


def test_by_names_a_file_is_matched_when_it_is_loaded(file: Path, training: Training) -> None:
    result = converted(file, architecture="none", example_inputs=None, verify=False)
    stored = torch.load(result.output, weights_only=True)["model"]
    assert not any(key.endswith(tuple(MATCHING_BUFFERS)) for key in stored)
    assert all(swap.matched for swap in result.plan.swaps)
    layer = loaded(result).model[4]
    expected = match_statistics(training.model[4].running_mean, training.model[4].running_var, 1e-3)  # type: ignore[arg-type, union-attr]
    torch.testing.assert_close(layer.matching[:2], expected[:2])
    assert normswap.verify(training.model, loaded(result).model, [X]).passed
    raw = converted(file, architecture="none", example_inputs=None, verify=False, match=False, bn_statistics="batch")
    assert [(swap.matched, swap.bn_statistics) for swap in loaded(raw).plan.swaps] == [(False, "batch")] * 2  # type: ignore[union-attr]
    assert not any(module.matched for module in loaded(raw).model if hasattr(module, "matched"))


def test_untrained_sites_are_found_by_names_too() -> None:
    plan = plan_from_names(network().state_dict())
    assert plan.untrained == ("1", "4")
    assert any("never updated" in note for note in plan.notes)


def test_a_file_of_a_plan_of_version_1_loads_as_raw_layers(tmp_path: Path, training: Training) -> None:
    conversion = normswap.convert(training.model, X, bn_statistics="batch", match=False)
    normswap.save(conversion.model, tmp_path / "sn.pt", plan=conversion.plan)
    record = json.loads(read_record(tmp_path / "sn.pt").to_json())  # type: ignore[union-attr]
    assert record["plan"]["version"] == 1  # which versions without matched branches read
    assert not {"start", "num_groups", "matched", "untrained"} & {*record["plan"]["swaps"][0]}
    assert Record.from_json(json.dumps(record)).plan == conversion.plan
    assert "distance" not in record


# --- networks without batch statistics --------------------------------------------------------------------------------


def test_the_distance_is_recorded_in_place_of_a_verification(file: Path, training: Training) -> None:
    result = converted(file, start="ln")
    (network_result,) = result.networks
    assert network_result.distance is not None
    assert (network_result.verification, network_result.unverified) == (None, None)
    record = read_record(result.output)
    assert record is not None
    assert (record.distance, record.verification) == (network_result.distance, None)
    assert record.history[-1].detail is None
    expected = normswap.measure_distance(training.model, loaded(result).model, [X])
    assert network_result.distance.relative_error == pytest.approx(expected.relative_error, rel=1e-4)
    assert result.to_dict()["distance"]["predictions"] == 4
    assert "Distance from the original" in str(result)


def test_running_statistics_leave_the_weights_and_their_copies(file: Path, training: Training) -> None:
    content = torch.load(converted(file, start="ln").output, weights_only=False)
    for entry in ("model", "ema"):
        assert not any("running" in key or "tracked" in key for key in content[entry])
    assert content["epoch"] == 3
    assert len(content["optimizer"]["param_groups"]) == 2
    for entry, original in (("model", training.model), ("ema", training.ema)):
        expected = normswap.convert(original, X, start="ln").model.eval()(X)
        torch.testing.assert_close(loaded(converted(file, start="ln"), entry).model(X), expected)


def test_data_are_read_once_and_used_for_both(file: Path) -> None:
    data = (batch for batch in [X, X + 0.1])
    result = converted(file, start="ln", data=data)
    distance = result.networks[0].distance
    assert distance is not None
    assert distance.predictions == 8
    assert not torch.equal(torch.load(result.output)["model"]["1.in_var_scale"], torch.ones(8))
    of_model = converted(file, start="ln", data=lambda model: [X[:, : model[0].in_channels]])
    assert of_model.networks[0].distance is not None
    assert of_model.networks[0].distance.predictions == 4


def test_a_module_in_a_file_starts_elsewhere_too(tmp_path: Path, training: Training) -> None:
    torch.save(training.model, tmp_path / "module.pt")
    result = normswap.convert_file(tmp_path / "module.pt", trust=True, example_inputs=X, start="ln")
    model = normswap.load(result.output, trust=True).model
    assert (model[1].branches, model[1].running_mean) == (("in", "ln"), None)
    assert torch.equal(model(X), normswap.convert(training.model, X, start="ln").model(X))


def test_an_exported_program_starts_elsewhere_too(tmp_path: Path, training: Training) -> None:
    torch.export.save(torch.export.export(training.model, (X,)), tmp_path / "program.pt2")
    result = normswap.convert_file(tmp_path / "program.pt2", trust=True, start="ln")
    assert result.networks[0].distance is not None
    assert result.written
    assert result.read_back_error is not None
    assert result.read_back_error < 1e-6


def test_a_converted_file_is_converted_already(file: Path) -> None:
    with pytest.raises(NothingToDo, match="2 sites are converted already"):
        normswap.convert_file(converted(file, start="ln").output, architecture=network, example_inputs=X)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"architecture": "none", "verify": False, "example_inputs": None, "start": "ln"},
            ArgumentError,
            "architecture='none' converts tensors by their names only: leave start= out",
        ),
        (
            {"architecture": "none", "verify": False, "example_inputs": None, "data": [X]},
            ArgumentError,
            "leave data= out",
        ),
        ({"data": X}, normswap.ModelError, r"data: expected a list of inputs, got one Tensor: pass \[x\]"),
        ({"data": []}, normswap.ModelError, "data: expected at least one input, got none"),
    ],
    ids=["start by names", "data by names", "one input", "no data"],
)
def test_arguments_without_a_meaning_are_refused(file: Path, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        converted(file, **options)
    assert not file.with_name("sn.pt").exists()


def test_a_damaged_distance_is_refused(file: Path) -> None:
    record = json.loads(read_record(converted(file, start="ln").output).to_json())  # type: ignore[union-attr]
    for changes in ({"relative_error": "far"}, {"worst": 1}):
        text = json.dumps(record | {"distance": record["distance"] | changes})
        with pytest.raises(CheckpointError, match=r"invalid normswap record \(record\.distance"):
            Record.from_json(text)


# --- state dicts without constants ------------------------------------------------------------------------------------


def moved(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for point in (layer.mean_weight, layer.var_weight):
            point.copy_(torch.tensor([0.2, 0.3, 0.5]))
    return layer


def test_gates_that_moved_in_a_raw_layer_keep_their_function(training: Training) -> None:
    raw = normswap.convert(training.model, X, match=False, bn_statistics="batch").model.eval()
    moved(raw[1])
    matched = normswap.convert(training.model, X).model.eval()
    matched.load_state_dict(raw.state_dict(), strict=True)
    assert torch.equal(matched[1].ln_var_scale, torch.ones(8))  # that of 4 has not moved
    assert not torch.equal(matched[4].ln_var_scale, torch.ones(16))
    torch.testing.assert_close(matched(X), raw(X))


def test_an_average_of_the_parameters_alone_gets_no_constants(tmp_path: Path, training: Training) -> None:
    average = {name: parameter.detach() + 1 for name, parameter in training.model.named_parameters()}
    torch.save({"model": training.model.state_dict(), "ema": average}, tmp_path / "bn.pt")
    content = torch.load(converted(tmp_path / "bn.pt").output, weights_only=True)
    assert content["ema"].keys() - average.keys() == {f"{n}.{w}_weight" for n in (1, 4) for w in ("mean", "var")}
