"""Measure how far a model is from the original whose function it only approximates: `measure_distance`.

A network that starts without batch statistics computes another function than its original. `verify` would say so and
no more; here the distance is a number. Both models run in evaluation mode, in their own precision, and are left as they
are. Each converted site is measured alone too, on the inputs that the original site receives.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from normswap.errors import ModelError
from normswap.model_state import call_model, preserved_state, registered_hooks, seeded
from normswap.schema import read_record
from normswap.surgery.arguments import describe_inputs, describe_invalid_batches, describe_shapes, require_module
from normswap.surgery.importance import gated_modules
from normswap.surgery.model_outputs import Leaves, VectorDistance, read_leaves
from normswap.surgery.module_tree import model_mode, modules_by_name, walk_modules
from normswap.surgery.wrappers import unwrap
from normswap.text import first_line, pluralize, printable_as


@dataclass(frozen=True)
class SiteDistance:
    """The relative L2 error of the output of one site, on the inputs that the original site received."""

    fqn: str
    relative_error: float


@printable_as("distance")
@dataclass(frozen=True, repr=False)
class Distance:
    """The result of `measure_distance`; `print` shows it as a table.

    Attributes:
        relative_error: the relative L2 error of all outputs as one vector, over all inputs.
        top1_agreement: the share, from 0 to 1, of predictions (the largest entry along the channels of the first
            output) that are the same; None if no output is a floating tensor (N, C, ...) with C > 1.
        predictions: the number of predictions that were compared.
        inputs: the shapes of the inputs.
        sites: the error of each converted module site alone.

    Examples:
        >>> import torch, normswap
        >>> model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)), torch.randn(2, 3, 16, 16)
        >>> distance = normswap.measure_distance(model, normswap.convert(model, x).model, [x])
        >>> distance.top1_agreement, [site.fqn for site in distance.sites]
        (1.0, ['1'])
    """

    relative_error: float
    top1_agreement: float | None
    predictions: int
    inputs: str
    sites: tuple[SiteDistance, ...] = ()

    __module__ = "normswap"

    def __repr__(self) -> str:
        agreement = "" if self.top1_agreement is None else f", top1_agreement={self.top1_agreement:.3f}"
        sites = pluralize(len(self.sites), "site")
        return f"Distance(relative_error={self.relative_error:.2e}{agreement}, {sites}, inputs={self.inputs!r:.80})"

    def to_dict(self) -> dict[str, Any]:
        """Return the distance as plain lists, dicts, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Return the distance in plain data.

        Raises:
            SchemaError: a field is missing, unknown or of a wrong type.
        """
        return read_record(cls, data, "distance")


def measure_distance(original: nn.Module, converted: nn.Module, batches: Iterable[Any]) -> Distance:
    """Measure how far the outputs of a converted model are from those of the original, in evaluation.

    Args:
        original: the reference model.
        converted: the model to measure, such as one that was converted with `start="ln"`.
        batches: an iterable of inputs; each is a tensor, a tuple of positional or a dict of keyword arguments. For one
            input, pass `[x]`. Random inputs tell little about agreement: use real ones.

    Returns:
        A `Distance`: the relative error of the outputs, the share of equal predictions, and the error of each site.

    Raises:
        ModelError: `batches` is empty, a model raises on an input, or the outputs cannot be compared.
        ArgumentError: a model is not a module.

    Examples:
        >>> import torch, normswap
        >>> model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)), torch.randn(2, 3, 16, 16)
        >>> without_bn = normswap.convert(model, x, start="ln").model
        >>> 0 < normswap.measure_distance(model, without_bn, [x]).relative_error < 1
        True
    """
    original = unwrap(require_module(original, "original"))
    converted = unwrap(require_module(converted, "converted"))
    if problem := describe_invalid_batches(batches):
        raise ModelError(f"batches: {problem}")
    meter = _Meter(original, converted)
    inputs = [describe_shapes(batch) for batch in map(meter.add, batches)]
    if not inputs:
        raise ModelError("batches: expected at least one input, got none")
    return meter.result("; ".join(dict.fromkeys(inputs)))


class OutputDistance:
    """The distance between the outputs of two models, or of one model in two states, batch by batch.

    Attributes:
        predictions: the number of predictions that were compared.
    """

    def __init__(self) -> None:
        self._outputs = VectorDistance()
        self._equal = self.predictions = 0

    @property
    def relative_error(self) -> float:
        """The relative L2 error of all outputs as one vector."""
        return self._outputs.result()

    @property
    def top1_agreement(self) -> float | None:
        """The share, from 0 to 1, of equal predictions; None if the outputs are no predictions."""
        return self._equal / self.predictions if self.predictions else None

    def add(self, reference: Leaves, value: Leaves, batch: Any) -> None:
        """Add the outputs of a batch.

        Raises:
            ModelError: the outputs cannot be compared.
        """
        pairs = [
            (leaf, value.values.get(path))
            for path, leaf in reference.values.items()
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        if not pairs or any(not isinstance(b, Tensor) or a.shape != b.shape for a, b in pairs):
            raise ModelError(
                f"the outputs of both models cannot be compared on an input of {describe_inputs(batch)}: expected "
                "floating tensors of the same shapes"
            )
        for a, b in pairs:
            assert isinstance(b, Tensor)
            self._outputs.add(a, b.to(a.dtype))
        classified = next(((a, b) for a, b in pairs if a.dim() > 1 and a.shape[1] > 1), None)
        if classified is not None:
            same = classified[0].argmax(1) == classified[1].argmax(1)  # type: ignore[union-attr]
            self._equal, self.predictions = self._equal + int(same.sum()), self.predictions + same.numel()


def run_model(model: nn.Module, batch: Any, name: str = "") -> Leaves:
    """Return the outputs of a model on a batch.

    Args:
        name: how an error calls the model, such as `original`.

    Raises:
        ModelError: the model raises.
    """
    modules = frozenset(id(entry.module) for entry in walk_modules(model))
    try:
        return read_leaves(call_model(model, batch), model=modules).detached()
    except Exception as error:
        subject = f"the {name} model" if name else "the model"
        raise ModelError(f"{subject} fails on an input of {describe_inputs(batch)}: {first_line(error)}") from error


class _Meter:
    """Runs both models batch by batch and accumulates their differences."""

    def __init__(self, original: nn.Module, converted: nn.Module) -> None:
        self._models = {"original": original, "converted": converted}
        self._outputs = OutputDistance()
        modules, layers = modules_by_name(original), gated_modules(converted)
        self._sites = {name: (modules[name], layer) for name, layer in layers.items() if name in modules}
        self._site_outputs = {name: VectorDistance() for name in self._sites}

    def add(self, batch: Any) -> Any:
        """Run both models on a batch and return it."""
        original, converted = self._models.values()
        with evaluation_mode(converted), registered_hooks(self._registrations()):
            reference = self._run("original", original, batch)
        value = self._run("converted", converted, batch)
        self._outputs.add(reference, value, batch)
        return batch

    def result(self, inputs: str) -> Distance:
        """Return the distance over all batches."""
        sites = tuple(SiteDistance(name, found.result()) for name, found in self._site_outputs.items())
        outputs = self._outputs
        return Distance(outputs.relative_error, outputs.top1_agreement, outputs.predictions, inputs, sites)

    def _registrations(self) -> Iterator[Callable[[], Any]]:
        for name, (old, new) in self._sites.items():
            yield self._registration(old, new, self._site_outputs[name])

    def _registration(self, old: nn.Module, new: nn.Module, found: VectorDistance) -> Callable[[], Any]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.add(output, new(*args, **kwargs))

        return lambda: old.register_forward_hook(hook, with_kwargs=True)

    def _run(self, name: str, model: nn.Module, batch: Any) -> Leaves:
        with evaluation_mode(model):
            return run_model(model, batch, name)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and with a fixed seed; the state of the model is restored at the end."""
    modules = [entry.module for entry in walk_modules(model)]
    with preserved_state(modules), model_mode(model, training=False), seeded(0), torch.no_grad():
        yield
