"""Context managers that change the state of a model for a while and always restore it, also after an error.

They cover training flags, attributes, buffers, hooks and the random state.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle

from normswap.state_snapshot import CONTAINERS, ContainerState, OnWrite, Snapshot, container_items, same_items

# --- training flags ---------------------------------------------------------------------------------------------------


@contextmanager
def training_flags(modules: Iterable[nn.Module], *, training: bool | Mapping[int, bool]) -> Iterator[None]:
    """Set the training flag of every module, and restore all flags at the end.

    The flags are set directly: a model may override `train()`.

    Args:
        training: one flag for all modules, or flags by the `id` of a module; a module without a flag there keeps its
            own.
    """
    before = [(module, module.training) for module in modules]
    try:
        for module, flag in before:
            module.training = training.get(id(module), flag) if isinstance(training, Mapping) else training
        yield
    finally:
        for module, flag in before:
            if module.training != flag:
                module.training = flag


# --- attributes and tensors -------------------------------------------------------------------------------------------


@contextmanager
def preserved_state(modules: Iterable[nn.Module], *, follow_objects: bool = True) -> Iterator[None]:
    """Restore at the end everything that a forward pass changed in `modules` and in the objects they refer to.

    Every object stays the same object. The copies need as much memory as the tensors.

    Args:
        follow_objects: also restore plain objects, hooks, closures and other modules; without it only containers and
            tensors.

    Raises:
        ModelError: an object that changed cannot be restored; all others are.
    """
    snapshot = Snapshot(modules, follow_objects=follow_objects)
    try:
        yield
    finally:
        snapshot.restore()


@contextmanager
def preserved_on_write(modules: Iterable[nn.Module], on_write: OnWrite) -> Iterator[None]:
    """Restore everything at the end as `preserved_state` does, with less memory.

    Args:
        on_write: the tensors that are copied only if a torch function writes to them: large weights, or everything.
    """
    snapshot = Snapshot(modules, on_write=on_write)
    try:
        with snapshot.copying_before_writes():
            yield
    finally:
        snapshot.restore()


@contextmanager
def rollback_on_error(modules: Iterable[nn.Module]) -> Iterator[None]:
    """After an error inside the context, restore the class, the attributes and the registries of every module."""
    states = [(module, type(module), _container_states(module)) for module in modules]
    try:
        yield
    except BaseException:
        for module, cls, containers in states:
            module.__class__ = cls
            for state in containers:
                state.restore()
            if isinstance(module, fx.GraphModule):
                module.recompile()
        raise


def _container_states(module: nn.Module) -> list[ContainerState]:
    attributes = vars(module)
    return [ContainerState(attributes), *(ContainerState(v) for v in attributes.values() if isinstance(v, CONTAINERS))]


class ModuleState(NamedTuple):
    """The attributes of a module by name, and the items of those that are containers."""

    attributes: dict[str, Any]
    contents: dict[str, list[Any]]


def module_state(module: nn.Module) -> ModuleState:
    """Return the attributes of `module` and the items of its containers, for `changed_attributes`."""
    attributes = vars(module).copy()
    containers = {name: value for name, value in attributes.items() if isinstance(value, CONTAINERS) and value}
    return ModuleState(attributes, {name: container_items(value) for name, value in containers.items()})


def changed_attributes(before: ModuleState, after: ModuleState) -> list[str]:
    """Return the names of the attributes that are another object in `after`, or a container of other objects."""
    names = dict.fromkeys([*before.attributes, *after.attributes])
    return [name for name in names if not _is_unchanged(before, after, name)]


def _is_unchanged(before: ModuleState, after: ModuleState, name: str) -> bool:
    if name not in before.attributes or name not in after.attributes:
        return False
    value = before.attributes[name]
    same_contents = same_items(value, before.contents.get(name, []), after.contents.get(name, []))
    return value is after.attributes[name] and same_contents


# --- random state -----------------------------------------------------------------------------------------------------


@contextmanager
def seeded(seed: int, *, cpu_only: bool = False) -> Iterator[None]:
    """Seed torch (on every device in use), Python and NumPy, and restore the random state at the end.

    Args:
        cpu_only: leave other devices alone. A forked process needs this: it must not initialize them.
    """
    with preserved_random_state(cpu_only=cpu_only):
        # torch.manual_seed stores a stack trace of its caller for every kind of device that is absent.
        everywhere = not cpu_only and torch.accelerator.is_available()
        (torch.manual_seed if everywhere else torch.default_generator.manual_seed)(seed)
        random.seed(seed)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(seed)
        yield


@contextmanager
def preserved_random_state(*, cpu_only: bool = False) -> Iterator[None]:
    """Restore the random state of torch, Python and NumPy at the end.

    Args:
        cpu_only: as in `seeded`.
    """
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
    """Return the state of the generators of torch (CPU), Python and NumPy; compare two states with `==`."""
    numpy = sys.modules.get("numpy")
    numpy_state = (
        [part.tolist() if hasattr(part, "tolist") else part for part in numpy.random.get_state()] if numpy else []
    )
    return [torch.get_rng_state().tolist(), random.getstate(), numpy_state]


# --- hooks and calls --------------------------------------------------------------------------------------------------


@contextmanager
def registered_hooks(register: Iterable[Callable[[], RemovableHandle]]) -> Iterator[None]:
    """Call functions that each register one hook, and remove all these hooks at the end."""
    with ExitStack() as stack:
        for call in register:
            stack.callback(call().remove)
        yield


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call `model` with a tensor, a tuple of positional arguments or a dict of keyword arguments."""
    args, kwargs = call_arguments(inputs)
    return model(*args, **kwargs)


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs (a tensor, a tuple or a dict) as positional arguments and keyword arguments."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
