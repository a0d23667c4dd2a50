"""Statistics of `in` and `ln` measured once on a whole sample, with which a model predicts the sample tile by tile.

During the overview each layer records the moments of its inputs, call by call. For the tiles the layers use them in the
same order: the calls of a layer are counted from the start of each forward pass of the model.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import ArgumentError, ModelError
from normswap.layers.backends.custom_ops import is_recomputation
from normswap.layers.backends.reference import instance_moments
from normswap.layers.backends.sample_moments import SampleMoments
from normswap.layers.gated_module import GatedModule
from normswap.model_state import call_model, preserved_random_state, preserved_state, registered_hooks, training_flags
from normswap.surgery.arguments import describe_inputs
from normswap.surgery.importance import gated_modules
from normswap.surgery.module_tree import walk_modules
from normswap.surgery.wrappers import unwrap
from normswap.text import first_line, pluralize


class FixedStatistics:
    """The statistics that a model uses inside `normswap.fixed_sample_statistics`.

    Attributes:
        samples: number of samples of the overview.
        layers: the names of the layers whose statistics are fixed.

    Examples:
        >>> import torch, normswap
        >>> bn_model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8))
        >>> model = normswap.convert(bn_model, torch.randn(2, 3, 8, 8)).model.eval()
        >>> with normswap.fixed_sample_statistics(model, torch.randn(2, 3, 32, 32)) as statistics:
        ...     statistics.assign_tiles([0, 0, 1])
        ...     y = model(torch.randn(3, 3, 8, 8))
        >>> statistics.samples, statistics.layers
        (2, ('1',))
    """

    __module__ = "normswap"

    def __init__(self, calls: "Mapping[str, _LayerCalls]") -> None:
        self._calls = {name: layer for name, layer in calls.items() if layer.recorded}
        self.layers = tuple(self._calls)
        self.samples = _count_samples(self._calls)

    def assign_tiles(self, samples: Sequence[int] | Tensor) -> None:
        """Set the sample of each tile of a batch, until the next call; an overview of one sample does not need it.

        Args:
            samples: the position in the overview of the sample of each tile; as many as a batch has tiles.

        Raises:
            ArgumentError: there is no such sample.
        """
        rows = torch.as_tensor(samples).cpu()
        if rows.dim() != 1 or rows.dtype != torch.long or not bool(((rows >= 0) & (rows < self.samples)).all()):
            raise ArgumentError(
                f"samples: expected for each tile an integer from 0 to {self.samples - 1}, got {samples!r:.80}"
            )
        for layer in self._calls.values():
            layer.rows = rows


@contextmanager
def fixed_sample_statistics(model: nn.Module, overview: Any) -> Iterator[FixedStatistics]:
    """Let a model use the `in` and `ln` statistics of a whole sample for its tiles, inside a `with` block.

    In prediction by a sliding window each tile has its own statistics, so results jump between tiles. Here all
    converted layers take the moments of their inputs once, from `overview`, and use them as constants; gradients pass
    to the tiles, the parameters and the gates. Running statistics and the training of the `bn` branch are unaffected;
    without running statistics it uses the overview too. The overview runs in evaluation mode without gradients, and
    leaves no trace in the model. A compiled model runs uncompiled in the block.

    Args:
        model: a converted model, wrapped or not.
        overview: the whole sample, or a smaller version or a crop of it: a tensor (N, C, *spatial), a tuple of
            positional arguments or a dict of keyword arguments of the model. With several samples, say which tile is
            of which sample with `FixedStatistics.assign_tiles`.

    Returns:
        A context manager, whose value is a `FixedStatistics`. The model is restored at the end of the block.

    Raises:
        ModelError: the model has no SN layer, or fails on the overview; a block is open for it already; in the block,
            a layer is called that did not run in the overview, or more or less often.
        LayerError: in the block, a batch of tiles does not fit the samples.
        ArgumentError: `model` is not a module.

    Examples:
        >>> import torch, normswap
        >>> bn_model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8))
        >>> model = normswap.convert(bn_model, torch.randn(2, 3, 8, 8)).model.eval()
        >>> normswap.set_importance(model, {"1": {"in": 0.5, "ln": 0.5}})
        >>> image = torch.randn(1, 3, 32, 32)
        >>> with normswap.fixed_sample_statistics(model, image):
        ...     halves = [model(half) for half in image.chunk(2, dim=3)]
        >>> torch.allclose(torch.cat(halves, dim=3), model(image), atol=1e-5)
        True
    """
    inside = unwrap(model)
    layers = gated_modules(inside)
    _check_layers(layers)
    calls = {name: _LayerCalls(name) for name in layers}
    # A compiled model would not notice what is set here. If nothing is compiled, the compiler is not imported.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with eager:
        _run_overview(inside, layers, calls, overview)
        statistics = FixedStatistics(calls)
        try:
            _attach(layers, {name: call.replay for name, call in calls.items()})
            with registered_hooks(_PassHooks(calls).registrations(inside)):
                yield statistics
        finally:
            for layer in layers.values():
                vars(layer).pop("fixed_moments", None)


fixed_sample_statistics.__module__ = "normswap"


def _check_layers(layers: Mapping[str, GatedModule]) -> None:
    if not layers:
        raise ModelError(
            "the model has no SN layer whose statistics could be fixed: convert it with normswap.convert; of a baked "
            "network, pass the network before normswap.bake"
        )
    if any("fixed_moments" in vars(layer) for layer in layers.values()):
        raise ModelError(
            "the statistics of this model are fixed already: leave the first `with fixed_sample_statistics` block "
            "before the next"
        )


def _attach(layers: Mapping[str, GatedModule], sources: Mapping[str, Callable[[Tensor], SampleMoments | None]]) -> None:
    for name, layer in layers.items():
        layer.fixed_moments = sources[name]


def _run_overview(
    model: nn.Module, layers: Mapping[str, GatedModule], calls: "Mapping[str, _LayerCalls]", overview: Any
) -> None:
    """Record the moments of each call; the end of `preserved_state` removes the recording functions again."""
    modules = [entry.module for entry in walk_modules(model)]
    with torch.no_grad(), training_flags(modules, training=False), preserved_state(modules), preserved_random_state():
        _attach(layers, {name: call.record for name, call in calls.items()})
        try:
            call_model(model, overview)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"overview: the model fails on an input of {describe_inputs(overview)}: {first_line(error)}"
            ) from error


def _count_samples(calls: "Mapping[str, _LayerCalls]") -> int:
    """Return the number of samples, which all calls of all layers agree on."""
    counts = {name: {len(moments.mean) for moments in layer.recorded} for name, layer in calls.items()}
    if not counts:
        raise ModelError("overview: no SN layer ran on it: pass an input on which the model calls its layers")
    samples = min(next(iter(counts.values())))
    different = [f"{name!r} ({max(found)})" for name, found in counts.items() if found != {samples}]
    if different:
        raise ModelError(
            f"overview: layer {next(iter(counts))!r} got a batch of {samples}, but {', '.join(different[:3])} another "
            "one: layers that get parts of a sample as their batch have no statistics of the whole sample, so exclude "
            "them when you convert"
        )
    return samples


class _LayerCalls:
    """The moments of the inputs of one layer, call by call.

    Attributes:
        recorded: the moments of each call in the overview.
        used: number of calls in the current forward pass of the model; None between passes.
        rows: the sample of each tile; None: all tiles are of the only sample.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.recorded: list[SampleMoments] = []
        self.used: int | None = None
        self.rows: Tensor | None = None

    def record(self, x: Tensor) -> None:
        """Record the moments of x, and let the layer use them as usual."""
        mean, var = instance_moments(x.detach())
        if not bool((mean.isfinite() & var.isfinite()).all()):
            raise ModelError(
                f"overview: layer {self.name!r} got NaN or infinite values ({describe_inputs(x)}): check the overview"
            )
        self.recorded.append(SampleMoments(mean, var, prod(x.shape[2:])))

    def replay(self, x: Tensor) -> SampleMoments:
        """Return the moments of the next call. A part of the model that runs alone has no count of its calls."""
        count, number = len(self.recorded), None if is_recomputation() else self.used
        if count > 1 and number is None:
            raise ModelError(
                f"layer {self.name!r} runs {count} times per forward pass, and outside of one it is unknown which call "
                "this is: call the whole model, without activation checkpointing"
            )
        if (number or 0) >= count:
            raise ModelError(
                f"layer {self.name!r} ran {pluralize(count, 'time')} on the overview, and runs more often on a tile "
                f"({describe_inputs(x)}): pass an overview on which the model takes the same path"
            )
        if number is not None:
            self.used = number + 1
        return self.recorded[number or 0]._replace(rows=self.rows)

    def check_count(self) -> None:
        """Check that a forward pass that ends made every call or none."""
        if self.used not in (None, 0, len(self.recorded)):
            raise ModelError(
                f"layer {self.name!r} ran {len(self.recorded)} times on the overview, and {self.used} on a tile, so it "
                "may have used the statistics of another call: pass an overview on which the model takes the same path"
            )


class _PassHooks:
    """Hooks of the model that count the calls of each forward pass. Copies and pickles of the model do nothing."""

    def __init__(self, calls: "Mapping[str, _LayerCalls] | None" = None) -> None:
        self._calls = calls or {}

    def __reduce__(self) -> "tuple[type[_PassHooks], tuple[()]]":
        return _PassHooks, ()

    def registrations(self, model: nn.Module) -> Iterator[Callable[[], Any]]:
        """Yield functions that each register a hook on the model."""
        yield partial(model.register_forward_pre_hook, self.start)
        yield partial(model.register_forward_hook, self.check)
        yield partial(model.register_forward_hook, self.end, always_call=True)

    def start(self, module: nn.Module, _args: Any) -> None:
        """Count from 0."""
        several = [layer.name for layer in self._calls.values() if len(layer.recorded) > 1]
        if several and getattr(module, "_is_replica", False):
            raise ModelError(
                f"layer {several[0]!r} runs several times per forward pass, and replicas of DataParallel would mix up "
                "its calls: pass tiles to model.module"
            )
        for layer in self._calls.values():
            layer.used = 0

    def check(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Check the counts of a pass that succeeded."""
        for layer in self._calls.values():
            layer.check_count()

    def end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Stop counting, also after an error."""
        for layer in self._calls.values():
            layer.used = None
