"""A whole converted model as one `GraphModule` that obeys `train()` and `eval()`.

The traces in training and in evaluation mode are merged into one graph. A flag that differs is read from a child at run
time. Modules whose own forward has another structure in training become leaves, and if the trace still fails, so do all
modules without norm sites. Optional arguments that decide what runs keep their defaults.
"""

import copy
import logging
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.errors import SwapError
from normswap.layers.gated_module import GatedModule
from normswap.model_state import call_model, preserved_on_write
from normswap.surgery.graphs.module_trace import control_flow_options, trace_module_forward
from normswap.surgery.graphs.tracing import copy_for_tracing, outputs_match, run_isolated, trace_copy
from normswap.surgery.module_tree import modules_by_name
from normswap.text import first_line, join_fqn

_logger = logging.getLogger(__name__)

_FLAG = "_training_flag"


class TrainingFlag(nn.Module):
    """Returns its own training flag, so that a graph can read the mode at run time."""

    def forward(self) -> bool:
        """Return True in training mode."""
        return self.training


def to_graph_module(model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    """Return the converted `model` as a GraphModule with the same submodules, parameters, buffers and hooks.

    Args:
        example_inputs: compare the graph with the model on these, in both modes; without them a trace that differs from
            the model is not noticed.

    Raises:
        SwapError: the model cannot be traced, its trace differs from it, or training and evaluation cannot be merged.
    """
    if isinstance(model, fx.GraphModule):
        return model
    if isinstance(model, GatedModule):
        raise SwapError(f"{type(model).__name__} is a single norm layer and has no graph: convert without as_graph")
    options = control_flow_options(model)
    reason = ""
    for leaves in (_is_leaf, _is_leaf_or_mode_dependent, _is_leaf_mode_dependent_or_without_sites):
        try:
            graph_module = _graph_module(model, leaves, options)
        except Exception as error:  # noqa: BLE001 - the copy and the model's state are the user's code
            _logger.debug("a graph of %s was dropped: %s", type(model).__name__, first_line(error))
            reason = reason or first_line(error)
            continue
        if example_inputs is None or _is_equivalent(model, graph_module, example_inputs):
            return graph_module
        reason = reason or "its traced forward differs from the real one"
    raise SwapError(f"{type(model).__name__} cannot be made one graph ({reason}): convert without as_graph")


def _is_equivalent(model: nn.Module, graph_module: fx.GraphModule, inputs: Any) -> bool:
    for training in (True, False):
        runs = [(module, partial(call_model, module, copy.deepcopy(inputs))) for module in (model, graph_module)]
        with redirect_stderr(StringIO()):  # a GraphModule prints its code there when it raises
            outputs = [run_isolated(module, run, training=training) for module, run in runs]
        if not outputs_match(*outputs):
            return False
    return True


def _is_leaf(module: nn.Module) -> bool:
    """Gates read their mode at run time, and a hook is called by its module, not by a graph."""
    return isinstance(module, GatedModule) or bool(module._forward_hooks or module._forward_pre_hooks)


def _is_leaf_or_mode_dependent(module: nn.Module) -> bool:
    return _is_leaf(module) or _is_mode_dependent(module)


def _is_leaf_mode_dependent_or_without_sites(module: nn.Module) -> bool:
    return _is_leaf_or_mode_dependent(module) or not any(isinstance(inner, GatedModule) for inner in module.modules())


def _is_mode_dependent(module: nn.Module) -> bool:
    """Whether the own forward of `module` has no single graph for both modes."""
    if type(module).__module__.startswith("torch.nn."):
        return False
    own = trace_module_forward(module)
    if own.training is None or own.evaluation is None:
        return True
    return _operations(own.training) != _operations(own.evaluation)


def _operations(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(node.op, node.target, node.name) for node in graph.nodes]


def _merge(training: fx.Graph, evaluation: fx.Graph) -> fx.Graph:
    """Return the graph of evaluation, in which every flag that differs in training is read from its owner."""
    if _operations(training) != _operations(evaluation):
        raise SwapError("training and evaluation run different operations")
    flags: dict[str, fx.Node] = {}

    def read_flag(target: str) -> fx.Node:
        if target not in flags:
            first = next(node for node in evaluation.nodes if node.op != "placeholder")
            with evaluation.inserting_before(first):
                flags[target] = evaluation.call_module(target)
        return flags[target]

    for train_node, eval_node in zip(list(training.nodes), list(evaluation.nodes), strict=True):
        read = partial(read_flag, join_fqn(_caller(eval_node), _FLAG))
        eval_node.args = _with_flags(train_node.args, eval_node.args, read)
        eval_node.kwargs = _with_flags(train_node.kwargs, eval_node.kwargs, read)
    return evaluation


def _caller(node: fx.Node) -> str:
    """The module whose forward made the node, and whose training flag the node received."""
    stack = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
    callers = stack[:-1] if node.op == "call_module" else stack
    return str(callers[-1]) if callers else ""


def _with_flags(training: Any, evaluation: Any, read_flag: Any) -> Any:
    if isinstance(evaluation, fx.Node):
        if getattr(training, "name", None) != evaluation.name:
            raise SwapError("training and evaluation use different values")
        return evaluation
    if isinstance(evaluation, tuple | list):
        merged = [_with_flags(t, e, read_flag) for t, e in zip(training, evaluation, strict=True)]
        return type(evaluation)(merged)
    if isinstance(evaluation, dict):
        return {key: _with_flags(training[key], value, read_flag) for key, value in evaluation.items()}
    if training is True and evaluation is False:
        return read_flag()
    if training != evaluation:
        raise SwapError(f"training uses {training!r} where evaluation uses {evaluation!r}")
    return evaluation


def _graph_module(model: nn.Module, leaves: Any, options: dict[str, Any]) -> fx.GraphModule:
    """Build a GraphModule on the model's own objects; constants that tracing created are taken from the copies."""
    copies, graphs = [], []
    for training in (True, False):
        copies.append(copy_for_tracing(model))
        with preserved_on_write(model.modules(), "everything"):
            trace = trace_copy(lambda: copies[-1], leaves, training=training, concrete=options)
        if trace.graph is None or trace.omission:
            raise SwapError(trace.reason or trace.omission)
        graphs.append(trace.graph)
    graph = _merge(*graphs)
    own = modules_by_name(model)
    root: dict[str, Any] = {}
    for node in graph.nodes:
        target = str(node.target)
        owner, _, name = target.rpartition(".")
        if node.op == "call_module":
            root[target] = TrainingFlag() if name == _FLAG else own[target]
        elif node.op == "get_attr":
            root[target] = getattr(own[owner], name) if hasattr(own.get(owner), name) else _constant(copies, name)
    module = fx.GraphModule(root, graph, type(model).__name__)
    # The same hook registries as the model's, so that a handle still removes its hook.
    module.__dict__.update({name: value for name, value in vars(model).items() if name.endswith(("_hooks", "_hook"))})
    for name, made in module.named_modules():
        if name not in own or made is not own[name]:  # containers that FX created, and the flags
            made.training = own[name.removesuffix(_FLAG).removesuffix(".")].training
    return module


def _constant(copies: list[nn.Module], name: str) -> Any:
    training, evaluation = (getattr(model_copy, name) for model_copy in copies)
    if not (isinstance(training, Tensor) and torch.equal(training, evaluation)):
        raise SwapError("training and evaluation use different constants")
    return evaluation
