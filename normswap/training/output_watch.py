"""Find layers whose outputs died during training: the same for all samples, NaN or infinite.

Every so many steps the model runs on a few fixed samples in evaluation mode, with hooks on its gated layers. The first
run, before training, is the reference. In all other steps there are no hooks.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normswap.errors import WatchError
from normswap.model_state import call_model, preserved_random_state, registered_hooks, training_flags
from normswap.surgery.importance import gated_modules
from normswap.surgery.wrappers import unwrap

# A layer died if its outputs differ between samples by less than this fraction of what they did before training.
_LEAST_FRACTION = 0.01
_MODEL = "the model"


class OutputWatch:
    """Reports once when outputs of gated layers or of the model died.

    Args:
        model: a converted model, wrapped or not.
        inputs: one input of the model with at least two different samples.
        report: called with a sentence that names the step and the first dead layer.
        every: the number of steps between two measurements.

    Raises:
        WatchError: `inputs` has a single sample.
    """

    def __init__(self, model: nn.Module, inputs: Any, report: Callable[[str], object], *, every: int = 100) -> None:
        self._model = unwrap(model)
        self._inputs, self._report, self._every = inputs, report, every
        if any(isinstance(leaf, Tensor) and leaf.dim() and len(leaf) < 2 for leaf in tree_leaves(inputs)):
            raise WatchError("inputs: expected at least two samples, whose outputs can be compared, got one")
        self._reference: dict[str, float] = {}
        self._next = 0
        self._has_reported = False

    def on_step(self, step: int) -> None:
        """Measure after this step if it is due."""
        if self._has_reported or step < self._next:
            return
        self._next = step - step % self._every + self._every
        deviations = self._measure()
        dead = [name for name, deviation in deviations.items() if self._is_dead(name, deviation)]
        self._reference = {name: value for name, value in deviations.items() if value > 0} | self._reference
        if dead:
            self._has_reported = True
            self._report(_describe(step, dead, deviations[dead[0]]))

    def _is_dead(self, name: str, deviation: float) -> bool:
        return not math.isfinite(deviation) or deviation < _LEAST_FRACTION * self._reference.get(name, 0.0)

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Return by layer how much its outputs differ between samples, as a root mean square."""
        found: dict[str, Tensor] = {}

        def hook(_module: nn.Module, _args: Any, output: Any, *, name: str) -> None:
            y = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
            if y is not None and y.dim() > 1 and len(y) > 1 and y.is_floating_point():
                found[name] = y.float().var(0, correction=0).mean().sqrt()

        layers: dict[str, nn.Module] = {**gated_modules(self._model), _MODEL: self._model}
        hooks = (partial(layer.register_forward_hook, partial(hook, name=name)) for name, layer in layers.items())
        modules = list(self._model.modules())
        with training_flags(modules, training=False), preserved_random_state(), registered_hooks(hooks):
            call_model(self._model, self._inputs)
        # Read from the device at once.
        values = torch.stack([value.cpu() for value in found.values()]).tolist() if found else []
        return dict(zip(found, values, strict=True))


def _describe(step: int, dead: list[str], deviation: float) -> str:
    what = "are the same for all samples" if math.isfinite(deviation) else "are NaN or infinite"
    more = f" (and {len(dead) - 1} more)" if len(dead) > 1 else ""
    return (
        f"step {step}: the outputs of {dead[0]}{more} {what}, from which training seldom recovers: start again with a "
        "lower importance_lr or lr"
    )
