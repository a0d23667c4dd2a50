"""The whole of a converted model as one `GraphModule` that still obeys `train()` and `eval()`.

Two traces, in training and in evaluation, must be one graph: where they differ in a flag, the flag is read from a
child when it runs. Where they differ in structure, the modules whose own forward does so stay whole, as leaves; where
the trace fails, so do all modules without norm sites.
"""

from typing import Any

from torch import fx, nn

from normswap.errors import SwapError
from normswap.layers.gates import GatedModule
from normswap.modes import training_flags
from normswap.surgery.tracing import first_line, sharing_twin, trace_own_forward, trace_with
from normswap.surgery.tree import modules_by_name

_FLAG = "training_flag"


class TrainingFlag(nn.Module):
    """Returns its own training flag, so that a graph can read the mode instead of freezing it."""

    def forward(self) -> bool:
        """Return whether the model is in training."""
        return self.training


def to_graph_module(model: nn.Module) -> fx.GraphModule:
    """Return `model`, converted, as a GraphModule on the same submodules, parameters and buffers.

    Raises:
        SwapError: it cannot be traced, or does different things in training and in evaluation at a norm site.
    """
    reason = ""
    for leaves in (_gated, _gated_or_forked, _forked_or_without_sites):
        try:
            twin = sharing_twin(model)
            graphs = []
            for training in (True, False):
                with training_flags(twin.modules(), training=training):
                    graphs.append(trace_with(twin, leaves))
            return _graph_module(model, twin, _merge(*graphs))
        except Exception as error:  # noqa: BLE001 - tracing runs the user's code on proxies: anything may come
            reason = first_line(error)
    raise SwapError(f"{type(model).__name__} cannot be made one graph ({reason}): convert without as_graph")


def _gated(module: nn.Module) -> bool:
    return isinstance(module, GatedModule)


def _gated_or_forked(module: nn.Module) -> bool:
    return _gated(module) or _is_forked(module)


def _forked_or_without_sites(module: nn.Module) -> bool:
    return _gated_or_forked(module) or not any(map(_gated, module.modules()))


def _is_forked(module: nn.Module) -> bool:
    """Say whether the module's own forward runs other operations in training than in evaluation."""
    trace = trace_own_forward(module)
    if trace.training is None or trace.evaluation is None:
        return False
    return _operations(trace.training) != _operations(trace.evaluation)


def _operations(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(node.op, node.target, node.name) for node in graph.nodes]


def _merge(training: fx.Graph, evaluation: fx.Graph) -> fx.Graph:
    """Return the evaluation graph with every flag that differs in training read at run time."""
    if _operations(training) != _operations(evaluation):
        raise SwapError("training and evaluation run different operations")
    flag: fx.Node | None = None

    def read_flag() -> fx.Node:
        nonlocal flag
        if flag is None:
            first = next(node for node in evaluation.nodes if node.op != "placeholder")
            with evaluation.inserting_before(first):
                flag = evaluation.call_module(_FLAG)
        return flag

    for train_node, eval_node in zip(list(training.nodes), list(evaluation.nodes), strict=True):
        eval_node.args = _with_flags(train_node.args, eval_node.args, read_flag)
        eval_node.kwargs = _with_flags(train_node.kwargs, eval_node.kwargs, read_flag)
    return evaluation


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


def _graph_module(model: nn.Module, twin: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Build on the model's own objects; constants that tracing made exist on the twin only."""
    own, traced = modules_by_name(model), modules_by_name(twin)
    root: dict[str, Any] = {}
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "call_module":
            root[target] = TrainingFlag() if target == _FLAG else own[target]
        elif node.op == "get_attr":
            owner, _, name = target.rpartition(".")
            root[target] = getattr(own[owner], name) if hasattr(own.get(owner), name) else getattr(traced[owner], name)
    module = fx.GraphModule(root, graph, type(model).__name__)
    module.train(model.training)
    return module
