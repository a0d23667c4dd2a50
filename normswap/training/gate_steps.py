"""Limit the steps of gates, whatever the optimizer and its learning rate.

An optimizer knows nothing of the scale of a gate: with Adam a gate moves by its learning rate in each of the first
steps, in all layers at once. At batch sizes of 1 or 2 and with a classifier that is not trained yet, the nearest way to
a lower loss is an output that does not depend on the input, and fast gates take it within some steps.
"""

from collections import defaultdict
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normswap.checkpoints.content.optimizer_state import default_gate_step
from normswap.errors import OptimizerError
from normswap.layers.gating import project_to_simplex
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.surgery.importance import gated_modules
from normswap.training.importance_watch import unwrap_optimizer

# The default number of first steps in which the limit rises from 0.
WARMUP_STEPS = 100


class GateStepLimit:
    """The handle that `normswap.limit_gate_steps` returns; `remove()` ends the limit.

    Args:
        points: the gate parameters.
        max_step, warmup_steps, step: as in `limit_gate_steps`.

    Examples:
        >>> import torch, normswap
        >>> model = normswap.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).model
        >>> optimizer = torch.optim.Adam(normswap.param_groups(model, lr=0.1))
        >>> limit = normswap.limit_gate_steps(model, optimizer)
        >>> limit.max_step, limit.step
        (0.1, 0)
        >>> limit.remove()
    """

    __module__ = "normswap"

    def __init__(self, points: list[nn.Parameter], *, max_step: float, warmup_steps: int, step: int) -> None:
        self.max_step, self.warmup_steps, self.step = max_step, warmup_steps, step
        # Points of equal size are computed together.
        self._stacks: dict[Any, list[Tensor]] = defaultdict(list)
        for point in points:
            self._stacks[point.shape, point.dtype, point.device].append(point)
        self._before: list[Tensor] = []
        self._handles: list[RemovableHandle] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> Self:
        """Limit the steps of an optimizer from now on."""
        self._handles += [
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._shorten),
        ]
        return self

    def remove(self) -> None:
        """End the limit."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _remember(self, _optimizer: Any, _args: Any, _kwargs: Any) -> None:
        self._before = [project_to_simplex(torch.stack(tuple(points))) for points in self._stacks.values()]

    @torch.no_grad()
    def _shorten(self, _optimizer: Any, _args: Any, _kwargs: Any) -> None:
        self.step += 1
        longest = self.max_step * min(1.0, self.step / self.warmup_steps if self.warmup_steps else 1.0)
        for points, before in zip(self._stacks.values(), self._before, strict=True):
            move = project_to_simplex(torch.stack(tuple(points))) - before
            length = move.abs().amax(-1, keepdim=True)
            # Between two points of a convex set: the result is on the simplex too.
            after = before + move * (longest / length.clamp_min(longest))
            torch._foreach_copy_([*points], [*after.unbind()])
        self._before = []


def limit_gate_steps(
    model: nn.Module, optimizer: Any, *, max_step: float | None = None, warmup_steps: int = WARMUP_STEPS, step: int = 0
) -> GateStepLimit:
    """Limit how far the gates of a model move in a step of an optimizer, by hooks on the optimizer.

    After each step every gate is projected to the simplex, and no importance weight has changed by more than the limit.
    `run_recipe` does this by default. Softmax gates are not limited. Steps that a gradient scaler skips do not count.

    Args:
        model: a converted model, wrapped or not.
        optimizer: the optimizer of the gates, also if accelerate, Lightning or timm's Lookahead wrap it.
        max_step: the largest change of an importance weight in a step; default: 0.5 divided by the number of sites
            whose gates train, at most 0.1, since changes of the function add up over the layers.
        warmup_steps: the number of first steps in which the limit rises linearly from 0 to `max_step`, so that a new
            classifier learns something before the gates leave the function that the network was trained with.
        step: the number of steps that a resumed run has taken before.

    Returns:
        A handle with `limit.step` and `limit.remove()`.

    Raises:
        OptimizerError: `optimizer` is not an optimizer, or a number is out of range.

    Examples:
        >>> import torch, normswap
        >>> model = normswap.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))).model
        >>> optimizer = torch.optim.Adam(normswap.param_groups(model, lr=0.1, importance_lr=0.5))
        >>> limit = normswap.limit_gate_steps(model, optimizer, warmup_steps=0)
        >>> model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        >>> optimizer.step()
        >>> 0.89 <= normswap.importance_weights(model)["1"].mean["bn"] <= 1
        True
    """
    if max_step is not None and not max_step > 0:
        raise OptimizerError(f"max_step: expected a number > 0, got {max_step!r}")
    for name, value in (("warmup_steps", warmup_steps), ("step", step)):
        if not isinstance(value, int) or value < 0:
            raise OptimizerError(f"{name}: expected a number of steps >= 0, got {value!r}")
    inner = unwrap_optimizer(optimizer)
    layers = [layer for layer in gated_modules(model).values() if layer.gate == "simplex"]
    found = [layer._parameters.get(name) for layer in layers for name in GATE_PARAMETERS]
    points = [point for point in found if point is not None and point.requires_grad]
    longest = default_gate_step(len(points)) if max_step is None else max_step
    return GateStepLimit(points, max_step=longest, warmup_steps=warmup_steps, step=step).attach(inner)
