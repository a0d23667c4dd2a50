"""Context managers that change the state of a model and always restore it, also after an error.

They handle training flags, buffers, attributes, hooks and the random state. `set_training_flags` is the one place that
sets training flags without calling `train()`, which models override.
"""

import operator
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle

from normswap.state_snapshot import OnWrite, Snapshot

_CONTAINERS = (list, dict, set)


def set_training_flags(flags: Iterable[tuple[nn.Module, bool]]) -> None:
    """Set the training flag of each module, without calling `train()`."""
    for module, training in flags:
        module.training = training


@contextmanager
def preserved_training_flags(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the training flag of each module at the end."""
    flags = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        set_training_flags(flags)


@contextmanager
def training_flags(modules: Iterable[nn.Module], *, training: bool) -> Iterator[None]:
    """Set the training flag of every module to `training`, and restore the flags at the end."""
    modules = list(modules)
    with preserved_training_flags(modules):
        set_training_flags((module, training) for module in modules)
        yield


@contextmanager
def preserved_state(modules: Iterable[nn.Module], *, follow_objects: bool = True) -> Iterator[None]:
    """Restore at the end what a forward pass changed in `modules`, and in the objects that they refer to.

    Every object stays the same object. It needs the memory of a copy of the tensors.

    Args:
        follow_objects: also restore plain objects, hooks, closures and other modules; else only containers.

    Raises:
        ModelError: a changed object cannot be restored; all others are.
    """
    snapshot = Snapshot(modules, follow_objects=follow_objects)
    try:
        yield
    finally:
        snapshot.restore()


@contextmanager
def preserved_on_write(modules: Iterable[nn.Module], on_write: OnWrite) -> Iterator[None]:
    """Do what `preserved_state` does with less memory: copy tensors only when a function of torch writes to them.

    Args:
        on_write: the tensors that are copied only then: large weights, or everything.
    """
    snapshot = Snapshot(modules, on_write=on_write)
    try:
        with snapshot.copying_before_writes():
            yield
    finally:
        snapshot.restore()


@contextmanager
def rollback_on_error(modules: Iterable[nn.Module]) -> Iterator[None]:
    """After an error, restore the class, the attributes and the registries of every module."""
    states = [(module, type(module), module_state(module)) for module in modules]
    try:
        yield
    except BaseException:
        for module, cls, state in states:
            module.__class__ = cls
            _restore(module, state)
            if isinstance(module, fx.GraphModule):
                module.recompile()
        raise


class ModuleState(NamedTuple):
    """The attributes of a module by name, and the items of those that are lists, dicts or sets."""

    attributes: dict[str, Any]
    contents: dict[str, list[Any]]


def module_state(module: nn.Module) -> ModuleState:
    """Return the current attributes of `module`, and the items of its containers."""
    attributes = vars(module).copy()
    containers = {name: value for name, value in attributes.items() if isinstance(value, _CONTAINERS) and value}
    return ModuleState(attributes, {name: _items(value) for name, value in containers.items()})


def changed_attributes(before: ModuleState, after: ModuleState) -> list[str]:
    """Return the attributes that are other objects, or containers of other objects, in two states of a module."""
    names = dict.fromkeys([*before.attributes, *after.attributes])
    return [name for name in names if not _same(before, after, name)]


def _items(container: Any) -> list[Any]:
    """The items of a container, flat: keys and values of a dict in turn."""
    return [part for item in container.items() for part in item] if isinstance(container, dict) else list(container)


def _same(a: ModuleState, b: ModuleState, name: str) -> bool:
    if name not in a.attributes or name not in b.attributes or a.attributes[name] is not b.attributes[name]:
        return False
    first, second = a.contents.get(name, []), b.contents.get(name, [])
    return len(first) == len(second) and all(map(operator.is_, first, second))


def _restore(module: nn.Module, state: ModuleState) -> None:
    now = module_state(module)
    for name in changed_attributes(state, now):
        if name not in state.attributes:
            del vars(module)[name]
            continue
        value, contents = state.attributes[name], state.contents.get(name, [])
        vars(module)[name] = value
        if isinstance(value, dict):
            value.clear()
            value.update(zip(contents[::2], contents[1::2], strict=True))
        elif isinstance(value, set):
            value.clear()
            value.update(contents)
        elif isinstance(value, list):
            value[:] = contents


@contextmanager
def seeded(seed: int, *, cpu_only: bool = False) -> Iterator[None]:
    """Run with a fixed random state - torch's on every device in use, Python's, NumPy's - and restore the caller's.

    Args:
        cpu_only: leave the generators of other devices alone, which a forked process must not use.
    """
    with preserved_random_state(cpu_only=cpu_only):
        # torch.manual_seed stores, for each kind of missing device, the stack of its caller.
        everywhere = not cpu_only and torch.accelerator.is_available()
        (torch.manual_seed if everywhere else torch.default_generator.manual_seed)(seed)
        random.seed(seed)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(seed)
        yield


@contextmanager
def preserved_random_state(*, cpu_only: bool = False) -> Iterator[None]:
    """Restore the random state of torch, Python and NumPy at the end; arguments as in `seeded`."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy and numpy.random.get_state()
    with torch.random.fork_rng(devices=() if cpu_only else range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def random_state() -> list[Any]:
    """Return the state of the generators of torch (CPU), Python and NumPy, which `==` compares."""
    numpy = sys.modules.get("numpy")
    numpy_state = (
        [part.tolist() if hasattr(part, "tolist") else part for part in numpy.random.get_state()] if numpy else []
    )
    return [torch.get_rng_state().tolist(), random.getstate(), numpy_state]


@contextmanager
def registered_hooks(register: Iterable[Callable[[], RemovableHandle]]) -> Iterator[None]:
    """Register hooks, one per callable, and remove them all at the end."""
    with ExitStack() as stack:
        for call in register:
            stack.callback(call().remove)
        yield


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call `model` with a tensor, a tuple of positional or a dict of keyword arguments."""
    args, kwargs = call_arguments(inputs)
    return model(*args, **kwargs)


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments of a tensor, a tuple or a dict of inputs."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
