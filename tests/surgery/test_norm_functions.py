"""The table of functions that normalize: every form in a graph becomes a site with the same function, and goes back."""

import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import normswap
from normswap.surgery.norms.functions import (
    NORM_CALLS,
    call_name,
    is_folded,
    norm_arguments,
    norm_nodes,
    unsupported_use,
)
from tests.helpers import guarantees, zoo

aten = torch.ops.aten
BATCH_NORMS = [function for function, call in NORM_CALLS.items() if call.kind == "bn"]
# Written back, their running statistics are changed before torch's own backward pass needs them.
WITHOUT_BACKWARD = {
    aten._native_batch_norm_legit_functional.default,
    aten._batch_norm_with_update_functional.default,
}
EACH = pytest.mark.parametrize("function", BATCH_NORMS, ids=call_name)


def program(function: Any, more: Callable[[fx.Graph, fx.Node, dict[str, Any]], Any] | None = None) -> fx.GraphModule:
    """A graph with one call of `function`, as a program has it: what it returns taken apart, statistics written back.

    Args:
        more: adds to the graph, given the call and its arguments, and returns what the program returns besides.
    """
    call, graph, root = NORM_CALLS[function], fx.Graph(), nn.Module()
    torch.manual_seed(7)
    own, root.conv = zoo.randomise(zoo.OwnTensors()), zoo.conv()
    for name, tensor in (*own.named_parameters(), *own.named_buffers()):
        (root.register_parameter if isinstance(tensor, nn.Parameter) else root.register_buffer)(name, tensor)
    x = graph.call_module("conv", (graph.placeholder("x"),))
    tensors = {name: graph.get_attr(name) for name in ("weight", "bias", "running_mean", "running_var")}
    numbers = {"training": True, "use_input_stats": True, "momentum": 0.2, "eps": 1e-3, "cudnn_enabled": False}
    arguments = {"input": x, **tensors, **numbers}
    node = graph.call_function(function, tuple(arguments[name] for name in call.parameters))
    y = node if call.results is None else graph.call_function(operator.getitem, (node, 0))
    besides = more(graph, node, arguments) if more else None
    if more is None:
        for index, name in call.updated.items():
            update = graph.call_function(operator.getitem, (node, index))
            graph.call_function(aten.copy_.default, (arguments[name], update))
    graph.output(y if besides is None else (y, besides))
    return fx.GraphModule(root, graph)


def listed(module: fx.GraphModule) -> list[tuple[Any, ...]]:
    numbers = {node: number for number, node in enumerate(module.graph.nodes)}
    return [
        (node.op, node.target, fx.map_arg((node.args, node.kwargs), lambda argument: numbers[argument]))
        for node in module.graph.nodes
    ]


@EACH
def test_every_form_is_a_site_and_the_same_function(function: Any) -> None:
    checked = guarantees.check_all(lambda: program(function), zoo.IMAGE())
    assert [swap.class_name for swap in checked.conversion.plan.swaps] == [call_name(function)]
    raised = all(error is None for error in checked.errors.values())
    assert raised == (function in WITHOUT_BACKWARD)
    assert checked.gates == 2


@EACH
def test_every_form_writes_what_it_did_and_goes_back(function: Any) -> None:
    module = program(function).double()
    converted = normswap.convert(module, zoo.IMAGE().double(), bn_statistics="batch").model
    before = listed(module)
    with torch.no_grad():
        outputs = [model(zoo.IMAGE().double()) for model in (module, converted)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(converted.get_buffer(name), module.get_buffer(name), rtol=1e-9, atol=1e-9)
    assert listed(converted) != before
    assert listed(normswap.revert(converted)) == before


def test_a_form_that_returns_a_tuple_goes_back_after_a_pickle_as_well() -> None:
    module = program(aten._native_batch_norm_legit_functional.default)
    converted = pickle.loads(pickle.dumps(normswap.convert(module, zoo.IMAGE(), bn_statistics="batch").model))
    with torch.no_grad():
        expected = module(zoo.IMAGE())
        torch.testing.assert_close(normswap.revert(converted)(zoo.IMAGE()), expected)
    torch.testing.assert_close(converted.get_buffer("running_var"), module.get_buffer("running_var"))


def test_arguments_that_were_not_given_are_not_given_when_it_goes_back() -> None:
    module = program(F.batch_norm)
    node = norm_nodes(module.graph, "bn")[0]
    node.args, node.kwargs = node.args[:3], {"training": True, "eps": 1e-3}
    module.recompile()
    before = listed(module)
    converted = normswap.convert(module, zoo.IMAGE(), bn_statistics="batch").model
    torch.testing.assert_close(normswap.revert(converted)(zoo.IMAGE()), module(zoo.IMAGE()))
    assert [node for node in listed(converted) if node[0] == "call_function"] == [
        node for node in before if node[0] == "call_function"
    ]


def test_arguments_are_named_and_those_that_the_name_implies_are_added() -> None:
    for function in BATCH_NORMS:
        arguments = norm_arguments(norm_nodes(program(function).graph, "bn")[0])
        assert arguments.keys() == {
            *("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        } - ({"training"} - arguments.keys())
        assert isinstance(arguments["training"], bool)
        assert (arguments["momentum"], arguments["eps"]) == (0.2, 1e-3)


def saved_mean(graph: fx.Graph, node: fx.Node, _arguments: dict[str, Any]) -> fx.Node:
    return graph.call_function(operator.getitem, (node, 1))


def not_written_back(graph: fx.Graph, node: fx.Node, _arguments: dict[str, Any]) -> None:
    return None


def written_elsewhere(graph: fx.Graph, node: fx.Node, arguments: dict[str, Any]) -> None:
    for index in (3, 4):
        update = graph.call_function(operator.getitem, (node, index))
        graph.call_function(aten.copy_.default, (arguments["bias"], update))


def old_read_later(graph: fx.Graph, node: fx.Node, arguments: dict[str, Any]) -> fx.Node:
    for index, name in ((3, "running_mean"), (4, "running_var")):
        update = graph.call_function(operator.getitem, (node, index))
        graph.call_function(aten.copy_.default, (arguments[name], update))
    return graph.call_function(torch.neg, (arguments["running_mean"],))


FUNCTIONAL = aten._native_batch_norm_legit_functional.default
BOTH = "uses its updated running_mean and running_var for more than the update itself"
UNSERVED = {
    "a saved mean": (aten.native_batch_norm.default, saved_mean, "more than its first result is used"),
    "not written back": (FUNCTIONAL, not_written_back, BOTH),
    "written elsewhere": (FUNCTIONAL, written_elsewhere, BOTH),
    "the old statistic read": (
        FUNCTIONAL,
        old_read_later,
        "uses its updated running_mean for more than the update itself",
    ),
}


@pytest.mark.parametrize(("function", "more", "reason"), UNSERVED.values(), ids=UNSERVED)
def test_what_a_swap_could_not_serve_is_skipped_with_the_way_out(function: Any, more: Any, reason: str) -> None:
    plan = normswap.plan_swaps(program(function, more), zoo.IMAGE())
    assert [skip.reason for skip in plan.skips] == [
        f"{reason}: export the program again, and convert it without run_decompositions()"
    ]
    assert plan.swaps == ()


def chained(graph: fx.Graph, node: fx.Node, arguments: dict[str, Any]) -> fx.Node:
    """A second call of the same norm, which starts from the statistics that the first one returned."""
    mean, var = (graph.call_function(operator.getitem, (node, index)) for index in (3, 4))
    x = graph.call_function(operator.getitem, (node, 0))
    tensors = (x, arguments["weight"], arguments["bias"], mean, var)
    again = graph.call_function(FUNCTIONAL, (*tensors, True, 0.2, 1e-3))
    for index, name in ((3, "running_mean"), (4, "running_var")):
        update = graph.call_function(operator.getitem, (again, index))
        graph.call_function(aten.copy_.default, (arguments[name], update))
    return graph.call_function(operator.getitem, (again, 0))


@pytest.mark.parametrize("excluded", [(), ("batch_norm",), ("batch_norm_1",)], ids=str)
def test_a_norm_that_is_called_twice_hands_its_statistics_on(excluded: tuple[str, ...]) -> None:
    module = program(FUNCTIONAL, chained)
    conversion = normswap.convert(module, zoo.IMAGE(), exclude=excluded, bn_statistics="batch")
    assert len(conversion.plan.swaps) == 2 - len(excluded)
    with torch.no_grad():
        outputs = [model(zoo.IMAGE()) for model in (module, conversion.model)]
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(b, a)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(conversion.model.get_buffer(name), module.get_buffer(name))


@pytest.mark.parametrize("function", [F.instance_norm, torch.instance_norm, aten.instance_norm.default], ids=call_name)
def test_instance_norms_are_named_and_explained(function: Any) -> None:
    site = normswap.find_norm_sites(program(function), zoo.IMAGE())[0]
    assert (site.fqn, site.kind, site.class_name) == ("instance_norm", "in", call_name(function))
    assert site.problem is not None
    assert "those of each sample in training and the running ones in evaluation" in site.problem


@pytest.mark.parametrize(
    ("sizes", "shape", "folded"),
    [
        ((1, -1, 9, 9), None, True),
        ((1, 24, 9, 9), (3, 8, 9, 9), True),
        ((1, 8, 9, 9), (1, 8, 81), False),
        ((-1, 8), None, False),
    ],
)
def test_a_view_of_all_samples_as_one_is_folded(sizes: Any, shape: Any, folded: bool) -> None:
    for as_method in (True, False):
        graph = fx.Graph()
        x = graph.placeholder("x")
        if shape is not None:
            x.meta["val"] = torch.empty(shape, device="meta")
        view = graph.call_method("view", (x, *sizes)) if as_method else graph.call_function(torch.reshape, (x, sizes))
        assert is_folded(graph.call_function(F.batch_norm, (view, None, None))) is folded
        assert is_folded(graph.call_function(F.batch_norm, (x, None, None))) is False


def test_a_call_that_returns_a_tensor_has_no_other_use() -> None:
    assert unsupported_use(norm_nodes(program(F.batch_norm).graph, "bn")[0]) is None
