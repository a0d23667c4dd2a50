"""One forward pass, watched: which modules ran, on what shapes, in which order, and who normalized by a function.

Runs in evaluation without gradients, on the model as it is; flags, buffers, attributes, hooks and the random state
are put back. It knows what tracing cannot: real shapes, real calls, modules that are in no registry. The model's own
error is passed on with the module that raised it and the shapes that were fed.
"""

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from normswap.errors import ModelError
from normswap.modes import call_model, hooked, preserved_state, seeded, training_flags
from normswap.output_leaves import leaf_list
from normswap.surgery.arguments import describe_inputs, describe_shapes
from normswap.surgery.calls import NORM_CALLS, NormCall
from normswap.surgery.norms import KNOWN_NORMS, Norms, is_norm_layer
from normswap.surgery.tracing import first_line
from normswap.surgery.tree import Place

Shape = tuple[int, ...]


@dataclass
class Observation:
    """What one forward pass showed, by first name of each module.

    `shapes` holds the input shapes of norm layers, call by call; `producers` the module or function that made it;
    `functional` the input shapes of batch_norm calls on activations by the module that made them, `instance` those of
    instance_norm and `tracked` who gave it running statistics; `runs` how often each module ran and `owner_inputs` what
    the first run with such a call was given; `calls` the norm layers and owners as they normalized, call by call, and
    `order` as they first did; `outputs` paths and leaves of what the model returned.
    """

    calls: list[str] = field(default_factory=list)
    order: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, list[Shape]] = field(default_factory=dict)
    producers: dict[str, str] = field(default_factory=dict)
    functional: dict[str, list[Shape]] = field(default_factory=dict)
    instance: dict[str, list[Shape]] = field(default_factory=dict)
    tracked: set[str] = field(default_factory=set)
    runs: dict[str, int] = field(default_factory=dict)
    owner_inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)


@dataclass
class _Call:
    place: Place
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Watcher(TorchFunctionMode):
    """Keeps the stack of running modules and takes notes; also sees calls of torch's functions."""

    def __init__(self, model: nn.Module, norms: Norms) -> None:
        super().__init__()
        self.notes = Observation()
        self.stack: list[_Call] = []
        self._norms = norms
        # By the storage object, not its address: those of meta tensors and of empty ones are all 0.
        self._kernels = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._makers: MutableMapping[Tensor, str] = WeakIdKeyDictionary()

    def enter(self, place: Place) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.stack.append(_Call(place, args, kwargs))
            name = place.names[0]
            self.notes.runs[name] = self.notes.runs.get(name, 0) + 1
            x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
            if x is not None and is_norm_layer(place.module, self._norms):
                self.notes.shapes.setdefault(name, []).append(tuple(x.shape))
                self._normalized(name)
                if x in self._makers:
                    self.notes.producers.setdefault(name, self._makers[x])

        return hook

    def leave(self, place: Place) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            # A child that failed and was caught is still on top.
            while any(call.place is place for call in self.stack):
                self.stack.pop()
            if isinstance(output, Tensor):
                self._makers[output] = place.names[0]

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = NORM_CALLS.get(func)
        if call and self.stack and not is_norm_layer(self.stack[-1].place.module, self._norms):
            self._functional_call(call, dict(zip(call.parameters, args, strict=False)) | (kwargs or {}))
        output = func(*args, **(kwargs or {}))
        if type(output) is Tensor and output not in self._makers:
            self._makers[output] = getattr(func, "__name__", "").strip("_")
        return output

    def _functional_call(self, call: NormCall, arguments: dict[str, Any]) -> None:
        x, owner = arguments["input"], self.stack[-1]
        if x.untyped_storage()._cdata in self._kernels:
            return
        name = owner.place.names[0]
        seen = self.notes.functional if call.kind == "bn" else self.notes.instance
        seen.setdefault(name, []).append(tuple(x.shape))
        if call.kind == "in" and arguments.get("running_mean") is not None:
            self.notes.tracked.add(name)
        self._normalized(name)
        self.notes.owner_inputs.setdefault(name, (owner.args, owner.kwargs))

    def _normalized(self, name: str) -> None:
        self.notes.calls.append(name)
        self.notes.order.setdefault(name, len(self.notes.order))


def observe_forward(
    model: nn.Module, example_inputs: Any, places: tuple[Place, ...], *, norms: Norms = KNOWN_NORMS
) -> Observation:
    """Run `model` once on `example_inputs` (tensor, tuple or dict) and return what was seen.

    Raises:
        ModelError: the forward pass failed.
    """
    watcher = _Watcher(model, norms)
    modules = [place.module for place in places]
    with (
        training_flags(modules, training=False),
        preserved_state(modules),
        seeded(0),
        torch.no_grad(),
        hooked(_registrations(watcher, places)),
        watcher,
    ):
        try:
            watcher.notes.outputs = leaf_list(call_model(model, example_inputs))
        except Exception as error:
            raise ModelError(_failure(watcher, example_inputs, error)) from error
    return watcher.notes


def _registrations(watcher: _Watcher, places: tuple[Place, ...]) -> Iterator[Callable[[], Any]]:
    for place in places:
        if not isinstance(place.module, torch.jit.ScriptModule):  # those take no hooks
            yield _pre_hook(watcher, place)
            yield _post_hook(watcher, place)


def _pre_hook(watcher: _Watcher, place: Place) -> Callable[[], Any]:
    return lambda: place.module.register_forward_pre_hook(watcher.enter(place), with_kwargs=True)


def _post_hook(watcher: _Watcher, place: Place) -> Callable[[], Any]:
    # Not always_call: after a failure the stack must still show where it happened.
    return lambda: place.module.register_forward_hook(watcher.leave(place))


def _failure(watcher: _Watcher, inputs: Any, error: Exception) -> str:
    where = "the model"
    if watcher.stack:
        call = watcher.stack[-1]
        name = call.place.names[0] or "the model"
        where = f"{name} ({type(call.place.module).__name__}, fed {describe_shapes((call.args, call.kwargs))})"
    return f"the model fails on an input of {describe_inputs(inputs)}, in {where}: {first_line(error)}"
