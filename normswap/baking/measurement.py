"""What a bake changed: the error of the outputs, and the time of a forward pass before and after."""

from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from normswap.baking.bake_plan import BakeMeasurement
from normswap.model_state import call_model, preserved_state, seeded
from normswap.surgery.module_tree import model_mode, walk_modules
from normswap.verification.distance import measure_distance

# Each round runs both networks, so that a change of the machine's load affects both.
_ROUNDS = 7


def measure_bake(before: nn.Module, after: nn.Module, example_inputs: Any) -> BakeMeasurement:
    """Return the relative error of a baked network and the time of both networks, in evaluation without gradients.

    Raises:
        ModelError: a network fails on the inputs.
    """
    distance = measure_distance(before, after, [example_inputs])
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad(), seeded(0), model_mode(before, training=False), model_mode(after, training=False):
        modules = [entry.module for model in (before, after) for entry in walk_modules(model)]
        with preserved_state(modules):
            for _ in range(_ROUNDS):
                for model, own in zip((before, after), seconds, strict=True):
                    own.append(_time_pass(model, example_inputs))
    first, second = map(median, seconds)
    return BakeMeasurement(distance.relative_error, first, second, distance.inputs)


def _time_pass(model: nn.Module, example_inputs: Any) -> float:
    _synchronize(example_inputs)
    start = perf_counter()
    call_model(model, example_inputs)
    _synchronize(example_inputs)
    return perf_counter() - start


def _synchronize(example_inputs: Any) -> None:
    if any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in tree_leaves(example_inputs)):
        torch.cuda.synchronize()
