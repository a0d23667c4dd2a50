"""Walks over models, copies in float64, modes and calls: shared by several guarantees."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from normswap.surgery.plan import SwapPlan

LIMIT = 1e-9
NO_SWAPS = SwapPlan((), (), "")
MODES = ("evaluation", "training", "as it is")
GATES = ("mean_weight", "var_weight")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# The constants of matched branches, each with its branch.
CONSTANTS = {"ln_mean_shift": "ln", "ln_var_scale": "ln", "in_var_scale": "in"}
HOLDERS = (nn.Module, list, tuple, dict)


def paths(model: nn.Module) -> dict[str, nn.Module]:
    """Every path to every module, the root at "", also through lists, tuples and dicts in attributes."""
    found: dict[str, nn.Module] = {}

    def visit(path: str, value: Any, depth: int, above: tuple[nn.Module, ...]) -> None:
        if isinstance(value, nn.Module):
            if value in above:
                return
            found[path] = value
            dot, inside = f"{path}." if path else "", (*above, value)
            for name, child in value._modules.items():
                visit(dot + name, child, 3, inside)
            for name, item in [] if isinstance(value, torch.jit.ScriptModule) else list(vars(value).items()):
                holds = isinstance(item, HOLDERS)
                if holds and name not in ("_parameters", "_buffers", "_modules") and not name.endswith("_hooks"):
                    visit(dot + name, item, 3, inside)
        elif depth and isinstance(value, list | tuple):
            for index, item in enumerate(value):
                visit(f"{path}[{index}]", item, depth - 1, above)
        elif depth and isinstance(value, dict):
            for key, item in value.items():
                visit(f"{path}[{key!r}]", item, depth - 1, above)

    visit("", model, 3, ())
    return found


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of every path."""
    for path, module in paths(model).items():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield (f"{path}.{name}" if path else name), tensor


def twin_of(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters are leaves, also those of TorchScript."""
    with torch.no_grad():
        twin = copy.deepcopy(model)
    for own, copied in zip(model.parameters(), twin.parameters(), strict=True):
        copied.requires_grad_(own.requires_grad)
    return twin


def in_float64(model: nn.Module) -> nn.Module:
    twin = twin_of(model)
    for module in {id(m): m for m in paths(twin).values()}.values():
        module.double()
    return twin


def to_float64(inputs: Any) -> Any:
    return tree_map(lambda leaf: leaf.double() if is_floating(leaf) else leaf, inputs)


def set_mode(model: nn.Module, mode: str) -> None:
    for module in paths(model).values() if mode != "as it is" else ():
        module.training = mode == "training"


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
