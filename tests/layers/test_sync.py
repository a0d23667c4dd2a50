"""A batch in several processes: all results equal those of one process with the whole batch."""

import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from normswap import convert, revert, switch_norm, synchronize_statistics, verify
from normswap.errors import LayerError
from normswap.layers import functional
from normswap.layers.switch_norm import SwitchNorm, SwitchNorm1d, SwitchNorm2d
from tests.helpers import joint_processes, oracles
from tests.helpers.joint_processes import BACKENDS, CASES, EMPTY, SINGLE, UNEVEN, Case, problem

SCRIPT = Path(joint_processes.__file__)
# Limit of the relative L2 error of values and gradients.
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}

Results = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return the results of two processes; a deadlock ends them and fails all tests."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=180)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second


def truth(case: Case) -> dict[str, Tensor]:
    """Return the results of the oracle on the whole batch; one value uses the running statistics."""
    given = {name: tensor.double() for name, tensor in problem(case).items()}
    running = oracles.Constants(given.pop("running_mean"), given.pop("running_var"))
    single = given["x"].numel() == case.shape[1]
    after = running if single else oracles.updated_running(running, given["x"], 0.3)
    renews = case.statistics == "renorm"
    constants = after if single or renews else None
    options: dict[str, Any] = {"gate": case.gate, "branches": case.branches, "follows_batch": renews}
    options["layer"] = oracles.Layer(1e-3, case.num_groups, *joint_processes.matching_of(case))
    y, gradients = oracles.switch_norm(**given, constants=constants, **options)
    return {"y": y, **vars(gradients), "running_mean": after.mean, "running_var": after.var}


@pytest.mark.multiprocess
@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_the_parts_of_a_batch_give_what_the_whole_batch_gives(results: Results, index: int) -> None:
    case, expected = CASES[index], truth(CASES[index])
    first, second = (found["cases"][index] for found in results)
    assert first["num_batches_tracked"] == second["num_batches_tracked"] == (case.shape != (1, 3))
    # Means of thousands of deviations leave fewer digits to what is taken around them.
    limit = LIMITS[case.dtype] * (200 if case.offset > 100 else 1)
    for name in ("running_mean", "running_var"):
        assert first[name].equal(second[name])
        assert oracles.relative_error(first[name], expected[name]) < LIMITS[case.dtype]
    assert oracles.relative_error(torch.cat([first["y"], second["y"]]), expected["y"]) < limit
    for found, wanted, part in zip(
        (first, second), case.wanted, expected["x"].split([case.cut, case.shape[0] - case.cut]), strict=True
    ):
        assert (found["x"] is not None) == wanted
        assert not wanted or oracles.relative_error(found["x"], part) < limit
    for name in ("weight", "bias", "mean_weight", "var_weight"):
        assert oracles.relative_error(first[name].double() + second[name], expected[name]) < limit, name


@pytest.mark.multiprocess
def test_a_recomputed_segment_exchanges_again(results: Results) -> None:
    expected = truth(EMPTY)
    for first, second in zip(*(found["checkpointed"] for found in results), strict=True):
        assert first["y"].shape == first["x"].shape == (0, *EMPTY.shape[1:])
        for name in ("y", "x", "weight", "mean_weight"):
            assert oracles.relative_error(second[name], expected[name]) < 1e-12


@pytest.mark.multiprocess
def test_second_derivatives_go_through_all_processes(results: Results) -> None:
    given = problem(UNEVEN)
    x = given["x"].requires_grad_()
    options: Any = {"training": True, "eps": 1e-3, "gate": UNEVEN.gate}
    y = switch_norm(x, given["mean_weight"], given["var_weight"], None, None, given["weight"], given["bias"], **options)
    (dx,) = torch.autograd.grad((y * given["dy"]).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(dx.square().sum(), x)
    for name in BACKENDS:
        found = torch.cat([result["second_derivatives"][name] for result in results])
        assert oracles.relative_error(found, expected) < 1e-11


@pytest.mark.multiprocess
def test_a_differentiable_gradient_includes_processes_that_need_none(results: Results) -> None:
    expected = truth(UNEVEN)["x"][: UNEVEN.cut]
    for name in BACKENDS[:2]:
        assert oracles.relative_error(results[0]["differentiable"][name], expected) < 1e-12


@pytest.mark.multiprocess
def test_running_statistics_that_were_used_may_change_before_the_backward_pass(results: Results) -> None:
    expected = truth(SINGLE)["x"]
    for name in BACKENDS:
        assert oracles.relative_error(results[0]["updated_between"][name], expected) < 1e-12


@pytest.mark.multiprocess
def test_a_compiler_leaves_the_exchange_outside_its_graphs(results: Results) -> None:
    expected = truth(UNEVEN)
    first, second = (found["compiled"] for found in results)
    for name in ("y", "x"):
        assert oracles.relative_error(torch.cat([first[name], second[name]]), expected[name]) < 1e-12
    assert "statistics are synchronized" in first["refused"]


@pytest.mark.multiprocess
def test_one_activation_and_small_tables_are_saved(results: Results) -> None:
    for found in results:
        for name in ("native", "plain"):
            assert found["kept"][name][-1] == 2 * 3 * 8 * 8
            assert found["kept"][name][-2] == 2 * 3


@pytest.mark.multiprocess
def test_a_group_selects_the_processes_and_copies_share_it(results: Results) -> None:
    for rank, found in enumerate(found["groups"] for found in results):
        assert found["groups"] == {"copied": True, "taken over": True}
        joint = truth(UNEVEN)["y"].split([1, 3])[rank]
        for name in ("both", "loaded"):
            assert oracles.relative_error(found[name], joint) < 1e-12
        assert found["alone"].equal(found["local"])
        assert found["copied"].equal(found["local"])
        assert oracles.relative_error(found["local"], joint) > 0.01


@pytest.mark.multiprocess
def test_a_deadlock_is_reported(results: Results) -> None:
    for found in results:
        assert re.search(
            "^Rank 1 runs without gradients while other ranks need them; the all-reduce would deadlock. Use the same",
            found["refused"],
        )


@pytest.mark.multiprocess
def test_without_gradients_the_batch_is_joint_and_evaluation_exchanges_nothing(results: Results) -> None:
    expected = truth(UNEVEN)["running_mean"]
    for found in results:
        assert oracles.relative_error(found["silent"], expected) < 1e-12


@pytest.mark.multiprocess
def test_a_network_in_ddp_or_sharded_trains_as_one_process_on_the_whole_batch(results: Results) -> None:
    model = convert(joint_processes.network(), torch.zeros(2, 3, 6, 6).double(), bn_statistics="batch").model
    expected = joint_processes.train(model, joint_processes.batches(), 1 / joint_processes.SAMPLES)
    start = dict(convert(joint_processes.network(), bn_statistics="batch").model.named_parameters())
    assert oracles.relative_error(expected["1.mean_weight"], start["1.mean_weight"].detach()) > 1e-3
    for found in results:
        for state in (*found["trained"], found["sharded"]):
            assert state.keys() == expected.keys()
            for name, tensor in state.items():
                assert oracles.relative_error(tensor, expected[name]) < 1e-10, name


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make layers see two processes."""
    monkeypatch.setattr(functional, "process_count", lambda group: 2)


# torch compiles its forward-mode formulas with its deprecated scripting compiler.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.usefixtures("several")
def test_what_has_no_real_values_is_refused() -> None:
    layer, x = SwitchNorm1d(3, branches=("ln", "bn"), synchronize=True), torch.randn(4, 3)
    before = copy.deepcopy(layer.state_dict())
    message = "^synchronized statistics in training need real values in every process; torch.export, torch.func"
    with pytest.raises(LayerError, match=r"^torch\.func\.vmap maps the input but not the running statistics"):
        torch.func.vmap(layer)(x[None])
    with pytest.raises(
        LayerError,
        match=r"^training updates running statistics in place, and the function that torch.func differentiates",
    ):
        torch.func.jvp(layer, (x,), (x,))
    with pytest.raises(LayerError, match=message), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer(mode.from_tensor(x))
    with pytest.raises(Exception, match="synchronized statistics in training need real values"):
        torch.export.export(layer, (x,), strict=False)
    assert all(value.equal(before[name]) for name, value in layer.state_dict().items())
    exported = torch.export.export(layer.eval(), (x,), strict=False).module()
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.usefixtures("several")
def test_meta_tensors_have_their_shapes_without_any_exchange() -> None:
    layer = SwitchNorm2d(3, synchronize=True, device="meta")
    assert layer(torch.empty(2, 3, 4, 4, device="meta")).shape == (2, 3, 4, 4)


@pytest.mark.usefixtures("several")
def test_a_graph_is_tried_alone() -> None:
    x = torch.randn(4, 3, 6, 6).double()
    graph = convert(joint_processes.network(), x, synchronize=True, as_graph=True)
    assert all(layer.synchronize for layer in graph.replaced.values())
    assert graph.model.get_submodule("1").synchronize


@pytest.mark.usefixtures("several")
def test_verification_exchanges_only_if_the_original_does() -> None:
    model, x = joint_processes.network(), torch.randn(4, 3, 6, 6).double()
    converted, plan, _ = convert(model, x, synchronize=True, bn_statistics="batch")
    assert verify(model, converted, [x]).passed
    assert converted[1].synchronize
    assert any(note.startswith("Synchronized although the old norms were not") for note in plan.notes)
    with pytest.raises(ValueError, match="process group has not been initialized"):
        converted.train()(x)


def test_in_one_process_a_synchronized_layer_equals_any_layer() -> None:
    layer = SwitchNorm2d(3, synchronize=True)
    twin = SwitchNorm2d(3)
    x = torch.randn(2, 3, 4, 4)
    assert layer(x).equal(twin(x))
    assert "synchronize=True" in repr(layer)
    assert "synchronize" not in repr(twin)
    assert layer.state_dict().keys() == twin.state_dict().keys()
    assert pickle.loads(pickle.dumps(layer)).synchronize
    assert copy.deepcopy(layer).synchronize


def test_layers_are_reported_in_place_and_say_which() -> None:
    model = nn.Sequential(SwitchNorm2d(3), SwitchNorm2d(3, branches=("in", "ln")), nn.BatchNorm2d(3))
    assert synchronize_statistics(model) == ["0"]
    assert synchronize_statistics(model) == []
    assert [getattr(layer, "synchronize", None) for layer in model] == [True, False, None]


def test_sync_batch_norm_comes_back_with_its_group() -> None:
    group = object()
    model = nn.Sequential(nn.SyncBatchNorm(3))
    vars(model[0])["process_group"] = group
    convert(model, inplace=True)
    assert isinstance(model[0], SwitchNorm)
    assert (model[0].synchronize, model[0].process_group) == (True, group)
    revert(model)
    assert type(model[0]) is nn.SyncBatchNorm
    assert model[0].process_group is group
