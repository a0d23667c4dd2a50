"""Networks that normalize by function: all guarantees on each, and what is particular to some."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import normswap
from normswap.layers.gated_module import FunctionalSwitchNorm
from tests.helpers import functional_networks as networks
from tests.helpers import guarantees
from tests.helpers.zoo import Trap

BY_NAME = {trap.name: trap for trap in networks.NETWORKS}
EACH = pytest.mark.parametrize("trap", networks.NETWORKS, ids=lambda trap: trap.name)
pytestmark = pytest.mark.slow


def assert_decided(plan: normswap.SwapPlan, swaps: tuple[str, ...], reasons: Any) -> None:
    assert sorted(swap.fqn for swap in plan.swaps) == sorted(swaps)
    assert {skip.fqn for skip in plan.skips} == set(reasons)
    for skip in plan.skips:
        assert re.search(reasons[skip.fqn], skip.reason), f"{skip.fqn}: {skip.reason}"
        assert skip.kind == "in" or "cannot be rewritten" in skip.reason


@EACH
def test_each_site_is_decided_for_its_reason(trap: Trap) -> None:
    assert_decided(normswap.plan_swaps(trap.model(), trap.inputs()), trap.swaps, trap.skips)


@EACH
def test_without_an_input_nothing_is_lost_either(trap: Trap) -> None:
    assert_decided(normswap.plan_swaps(trap.model()), *(trap.blind or (trap.swaps, trap.skips)))


@EACH
def test_every_guarantee_holds(trap: Trap) -> None:
    checked = guarantees.check_all(trap.model, trap.inputs())
    assert tuple(mode for mode, error in checked.errors.items() if error is None) == trap.raises_in
    assert checked.gates == 2 * len(trap.swaps)


# --- the learner ------------------------------------------------------------------------------------------------------


def learner_pair() -> tuple[networks.Learner, Any]:
    learner = guarantees.in_float64(BY_NAME["a learner on its own weights"].model())
    return learner, normswap.convert(learner, guarantees.to_float64(networks.TASKS())).model  # type: ignore[return-value]


def statistics(learner: Any) -> Tensor:
    return torch.cat([statistic.detach() for statistic in learner.vars_bn])


def weights_of(learner: Any, form: str) -> Any:
    given = [weight.double() for weight in networks.fast_weights()]
    return {"none": None, "own": learner.vars, "list": given, "tuple": tuple(given), "module": nn.ParameterList(given)}[
        form
    ]


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("bn_training", [True, False])
@pytest.mark.parametrize("form", ["none", "own", "list", "tuple", "module"])
def test_a_learner_is_the_same_function_however_it_is_called(form: str, bn_training: bool, mode: bool) -> None:
    learner, converted = learner_pair()
    x = networks.TASKS().double()
    results = [model.train(mode)(x, weights_of(model, form), bn_training=bn_training) for model in (learner, converted)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(statistics(converted), statistics(learner), rtol=1e-9, atol=1e-9)
    results[1].sum().backward()
    sites = [module for module in converted.modules() if isinstance(module, FunctionalSwitchNorm)]
    assert all(site.mean_weight.grad is not None for site in sites)


def adapted_loss(learner: Any, x: Tensor) -> Tensor:
    """The loss after one step on the learner's weights, to be differentiated through that step."""
    gradients = torch.autograd.grad(learner(x, None, True).square().mean(), list(learner.vars), create_graph=True)
    fast = [weight - 0.1 * gradient for weight, gradient in zip(learner.vars, gradients, strict=True)]
    return learner(x + 0.1, fast, True).square().mean()


def test_an_outer_step_through_an_inner_one_is_the_same() -> None:
    learner, converted = learner_pair()
    x = networks.TASKS().double()
    for model in (learner, converted):
        adapted_loss(model, x).backward()
    for own, other in zip(learner.vars, converted.vars, strict=True):
        torch.testing.assert_close(other.grad, own.grad, rtol=1e-8, atol=1e-10)


def test_gates_that_have_moved_count_in_every_call() -> None:
    _, converted = learner_pair()
    x, fast = networks.TASKS().double(), [weight.double() for weight in networks.fast_weights()]
    before = [converted(x), converted(x, fast)]
    converted.batch_norm_2.mean_weight.data = torch.tensor([1.0, 0.0, 0.0]).double()
    after = [converted(x), converted(x, fast)]
    assert not any(map(torch.allclose, before, after))
    torch.testing.assert_close(converted(x, list(converted.vars)), after[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copied_learner_uses_its_own_gates(copied: Any) -> None:
    _, converted = learner_pair()
    twin = copied(converted)
    x, fast = networks.TASKS().double(), [weight.double() for weight in networks.fast_weights()]
    assert torch.equal(twin(x, fast), converted(x, fast))
    twin.batch_norm.mean_weight.data = torch.tensor([1.0, 0.0, 0.0]).double()
    assert not torch.allclose(twin(x, fast), converted(x, fast))


def test_planning_leaves_running_statistics_that_are_parameters_alone() -> None:
    learner = BY_NAME["a learner on its own weights"].model()
    before = statistics(learner).clone()
    normswap.plan_swaps(learner, networks.TASKS())
    assert torch.equal(statistics(learner), before)


# --- exported programs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decompose", [False, True], ids=["exported", "decomposed"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_program_is_the_same_function_without_gradients(training: bool, decompose: bool) -> None:
    program = networks.exported_resnet(training=training, decompose=decompose).double()
    converted = normswap.convert(program, networks.PHOTOS().double()).model
    with torch.no_grad():
        outputs = [model(networks.PHOTOS().double()) for model in (program, converted)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)
    for name, buffer in program.named_buffers():
        torch.testing.assert_close(converted.get_buffer(name), buffer, rtol=1e-9, atol=1e-9)
    assert guarantees.norm_calls(converted, networks.PHOTOS().double(), "as it is") == 0


@pytest.mark.parametrize("decompose", [False, True], ids=["exported", "decomposed"])
@pytest.mark.parametrize(("training", "expected"), [(True, "batch"), (False, "running")])
def test_a_program_uses_running_statistics_in_both_modes_where_it_was_exported_in_evaluation(
    training: bool, expected: str, decompose: bool
) -> None:
    plan = normswap.plan_swaps(networks.exported_resnet(training=training, decompose=decompose), networks.PHOTOS())
    assert {swap.bn_statistics for swap in plan.swaps} == {expected}
    assert all(swap.train_gates for swap in plan.swaps)


def operations(program: Any) -> list[tuple[Any, ...]]:
    numbers = {node: number for number, node in enumerate(program.graph.nodes)}
    return [
        (node.op, node.target, fx.map_arg((node.args, node.kwargs), lambda argument: numbers[argument]))
        for node in program.graph.nodes
        if node.op != "output"
    ]


@pytest.mark.parametrize("decompose", [False, True], ids=["exported", "decomposed"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy], ids=["itself", "deepcopy"])
def test_reverting_restores_the_nodes_of_a_program(training: bool, decompose: bool, copied: Any) -> None:
    program = networks.exported_resnet(training=training, decompose=decompose)
    before = operations(program)
    converted = normswap.convert(program, networks.PHOTOS(), inplace=True).model
    assert operations(converted) != before
    assert operations(normswap.revert(copied(converted))) == before


def test_some_sites_of_a_program_can_be_left() -> None:
    program = networks.exported_resnet(training=True, decompose=True)
    converted = normswap.convert(program, networks.PHOTOS(), exclude=["batch_norm", "*_7"]).model
    with torch.no_grad():
        outputs = [model(networks.PHOTOS()) for model in (program, converted)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(converted.get_buffer("bn1.running_var"), program.get_buffer("bn1.running_var"))
    torch.testing.assert_close(
        converted.get_buffer("layer1.0.bn1.running_var"), program.get_buffer("layer1.0.bn1.running_var")
    )
