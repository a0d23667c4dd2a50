"""Functional sites of a `torch.fx.GraphModule`: its graph is its code, so the nodes themselves are swapped, and back.

Serves graphs that symbolic tracing made and those of exported programs, whose batch_norm nodes are ATen calls. What the
graph has frozen stays so: a graph traced in evaluation keeps using the running statistics in training.
"""

import copy
from typing import Any

import torch
from torch import fx

from normswap.layers.modules import FunctionalSwitchNorm
from normswap.surgery.calls import NORM_CALLS, as_results, call_name
from normswap.surgery.graph_rewrite import replace_node, swap_calls


def edit_graph(
    module: fx.GraphModule, gates: dict[str, FunctionalSwitchNorm], site_names: tuple[str | None, ...]
) -> None:
    """Put SN in place of batch_norm nodes of `module`'s graph.

    Args:
        gates: the new children by name.
        site_names: for each batch_norm node in order the name of its child, None for a node that stays.
    """
    for child_name, child in gates.items():
        module.add_module(child_name, child)
    module.graph = swap_calls(copy.deepcopy(module.graph), site_names)


def restore_graph(module: fx.GraphModule) -> None:
    """Undo `edit_graph`: the nodes call what they called before, and the children are gone."""
    calls = {call_name(call): call for call in NORM_CALLS}
    gates = _functional_gates(module)
    graph = copy.deepcopy(module.graph)
    for node in _calls_of(graph, gates):
        call = calls[gates[str(node.target)].replaced_call]
        args, kwargs = _arguments_of(node, NORM_CALLS[call].parameters)
        with graph.inserting_before(node):
            restored = graph.call_function(call, args, kwargs)
        packed = next((user for user in node.users if user.target is as_results), None)
        replace_node(graph, packed or node, restored)
        if packed is not None:
            restored.meta.pop("is_wrapped", None)
            graph.erase_node(node)
    for name in gates:
        module.delete_submodule(name)
    module.graph = graph


def _arguments_of(node: fx.Node, parameters: tuple[str, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the call that a gate stands for: by position up to the first that is not given."""
    cudnn = node.meta.get("cudnn_enabled", torch.backends.cudnn.enabled)
    given = {"input": node.args[0], "cudnn_enabled": cudnn, **node.kwargs}
    gap = next((index for index, name in enumerate(parameters) if name not in given), len(parameters))
    later = {name: given[name] for name in parameters[gap:] if name in given}
    return tuple(given[name] for name in parameters[:gap]), later


def edited_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes that call the gates of a functional site."""
    return _calls_of(module.graph, _functional_gates(module))


def _functional_gates(module: fx.GraphModule) -> dict[str, FunctionalSwitchNorm]:
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    return {n: m for n, m in module.named_modules() if n in called and isinstance(m, FunctionalSwitchNorm)}


def _calls_of(graph: fx.Graph, gates: dict[str, FunctionalSwitchNorm]) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_module" and str(node.target) in gates]
