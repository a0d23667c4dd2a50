"""`torch.export` as the second way to know a whole model: it runs the real code on tensors without data.

It gets through what symbolic tracing does not - sizes in control flow, type checks, keyword and dict inputs - but not
through decisions on values. Only facts are taken from its graph, which is of ATen operators: each node tells by its
stack of modules whose code made it. A failure is a value with a reason, and what torch logs or prints is kept in.
"""

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from normswap.modes import as_call, preserved_state, seeded, training_flags
from normswap.surgery.calls import norm_arguments, norm_call, reads_activation
from normswap.surgery.tracing import GraphFacts, first_line, sharing_twin, without_hooks


def export_facts(model: nn.Module, example_inputs: Any, is_norm_fqn: Callable[[str], bool]) -> GraphFacts | str:
    """Export `model` in evaluation on `example_inputs` and read its graph, or return the reason why it cannot be."""
    args, kwargs = as_call(example_inputs)
    with preserved_state(model.modules()), seeded(0), silence():
        try:
            twin = without_hooks(sharing_twin(model))
            with training_flags(twin.modules(), training=False):
                program = torch.export.export(twin, args, kwargs, strict=False)
            return read_program(program, is_norm_fqn)
        except Exception as error:  # noqa: BLE001 - it runs the user's code, and fails in many ways of its own
            return f"{type(error).__name__}: {first_line(error)}"


def read_program(program: torch.export.ExportedProgram, is_norm_fqn: Callable[[str], bool]) -> GraphFacts:
    """Read calls, producers and owners of functional calls off an exported program."""
    fed = frozenset(spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT)
    calls: list[str] = []
    producers: dict[str, str] = {}
    owners: dict[bool, list[str]] = {True: [], False: []}
    running = None  # the call of a norm layer that the nodes belong to
    for node in (node for node in program.graph.nodes if node.op == "call_function"):
        stack = _stack(node)
        layer = next((key for key, fqn in stack.items() if is_norm_fqn(fqn)), None)
        if layer is not None:
            calls += [stack[layer]] * (layer != running)
            _note_producer(node, layer, fed, producers)
        elif norm_call(node):
            owner, on_activation = list(stack.values())[-1], reads_activation(norm_arguments(node)["input"], fed)
            owners[on_activation].append(owner)
            calls += [owner] * on_activation
        running = layer
    return GraphFacts(tuple(calls), producers, tuple(dict.fromkeys(owners[True])), frozenset(owners[False]))


def _stack(node: fx.Node) -> dict[str, str]:
    """The modules whose code made a node, the root first: by call, which tells two of one module apart, their names."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return {key: _without_count(name) for key, (name, _) in stack.items()}


def _without_count(name: str) -> str:
    """The name of a module in a stack; from its second call on torch adds the number of the call."""
    return re.sub(r"@\d+$", "", name)


def _note_producer(node: fx.Node, layer: str, fed: frozenset[str], producers: dict[str, str]) -> None:
    """Note which module or function made the activation that comes into a norm layer, once that is read."""
    outside = [read for read in node.all_input_nodes if layer not in _stack(read) or read.op == "placeholder"]
    source = next((read for read in outside if reads_activation(read, fed)), None)
    if source is not None:
        producers.setdefault(_stack(node)[layer], _maker(source))


def _maker(source: fx.Node) -> str:
    """A layer of torch is named, as in a symbolic trace, where it is a leaf; of other code the function."""
    name, cls = list((source.meta.get("nn_module_stack") or {"": ("", "")}).values())[-1]
    if source.op != "placeholder" and str(cls).startswith("torch.nn.modules."):
        return _without_count(name)
    schema = getattr(source.target, "_schema", None)
    return schema.name.partition("::")[2] if schema is not None else str(source.target)


@contextmanager
def silence() -> Iterator[None]:
    """Keep in what torch logs, warns of and prints while it exports, saves or loads."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)
