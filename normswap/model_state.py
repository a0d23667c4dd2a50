"""Context managers that change the state of a model for a while and always restore it, also after an error.

They cover training flags, attributes, buffers, hooks and the random state.
"""

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from normswap.errors import ModelError
from normswap.state_snapshot import (
    CONTAINERS,
    FOLLOWED_OBJECT_HANDLERS,
    ContainerState,
    ObjectState,
    StorageState,
    container_items,
    handler_for,
    same_items,
    snapshot_function,
    snapshot_object,
    snapshot_tensor,
    storage_of,
)

# --- training flags ---------------------------------------------------------------------------------------------------


def set_training_flags(flags: Iterable[tuple[nn.Module, bool]]) -> None:
    """Set the training flag of each module directly: a model may override `train()`."""
    for module, training in flags:
        if module.training != training:
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
def training_flags(modules: Iterable[nn.Module], *, training: bool | Mapping[int, bool]) -> Iterator[None]:
    """Set the training flag of every module, and restore the flags at the end.

    Args:
        training: one flag for all modules, or flags by the `id` of a module; a module without a flag there keeps its
            own.
    """
    modules = list(modules)
    flags = {id(module): training for module in modules} if isinstance(training, bool) else training
    with preserved_training_flags(modules):
        set_training_flags((module, flags.get(id(module), module.training)) for module in modules)
        yield


# --- snapshots --------------------------------------------------------------------------------------------------------

OnWrite = Literal["nothing", "weights", "everything"]
# Most gates and running statistics are smaller than this.
_LARGE_BYTES = 1 << 15
# The maximum nesting of plain objects: a counter in a cache in a queue is saved, a whole trainer is not.
_OBJECT_DEPTH = 3
_ATOMS = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size)
_EXACT_CONTAINERS = {*CONTAINERS, OrderedDict}


class Snapshot:
    """The state of `modules` and of everything they refer to.

    Args:
        modules: the modules that run.
        follow_objects: also save plain objects, hooks, closures and the modules found there; default is to save
            containers and tensors only.
        on_write: the tensors whose memory is copied only before a torch function writes to it (inside
            `copying_before_writes`): none, large trainable parameters, or all.
    """

    def __init__(
        self, modules: Iterable[nn.Module], *, follow_objects: bool = True, on_write: OnWrite = "nothing"
    ) -> None:
        self._restore_functions: list[Callable[[], None]] = []
        self._empty_containers: list[Any] = []  # most registries of a module are empty
        self._storages: dict[int, StorageState] = {}
        self._visited: dict[int, Any] = {}  # by id; the reference keeps the id valid
        self._on_write = on_write
        pending = [(module, 0) for module in modules]
        self._visited |= {id(module): module for module, _ in pending}
        with torch.no_grad():
            for obj, depth in pending:  # the loop appends to `pending`
                object_state, inner_depth = self._take_snapshot(obj, depth)
                if object_state.restore is not None:
                    self._restore_functions.append(object_state.restore)
                pending += [
                    (inner, inner_depth)
                    for inner in object_state.children
                    if self._is_new(inner, inner_depth, follow_objects)
                ]

    def restore(self) -> None:
        """Restore everything.

        Raises:
            ModelError: an object that changed cannot be restored; all others are.
        """
        failure: Exception | None = None
        for container in self._empty_containers:
            if container:
                container.clear()
        with torch.no_grad():
            for restore in (*self._restore_functions, *(storage.restore for storage in self._storages.values())):
                try:
                    restore()
                except Exception as error:  # noqa: BLE001 - code of another library; the other objects are restored
                    failure = failure or error
        if failure is not None:
            raise ModelError(
                f"the forward pass changed the model's state, which cannot be restored ({failure}): pass "
                "copy.deepcopy(model) instead of the model"
            ) from failure

    def copying_before_writes(self) -> TorchFunctionMode:
        """Return a context that copies memory before the first torch function that writes to it."""
        return _CopyBeforeWrite(self._storages)

    def _is_new(self, obj: Any, depth: int, follow_objects: bool) -> bool:
        if type(obj) in _ATOMS or id(obj) in self._visited:
            return False
        if type(obj) in _EXACT_CONTAINERS and not obj:
            self._visited[id(obj)] = obj
            self._empty_containers.append(obj)
            return False
        handler = handler_for(type(obj))  # type: ignore[arg-type]  # a class with a metaclass of its own is hashable too
        if handler is snapshot_function and obj.__module__ and obj.__module__.startswith("normswap."):
            return False  # our own hooks collect results, which must stay
        if handler is None or (not follow_objects and handler in FOLLOWED_OBJECT_HANDLERS) or depth > _OBJECT_DEPTH:
            return False
        self._visited[id(obj)] = obj
        return True

    def _copies_on_write(self, tensor: Tensor) -> bool:
        """Return whether memory is copied only before a write: C kernels write unseen, but not to weights."""
        if self._on_write == "weights":
            return isinstance(tensor, nn.Parameter) and tensor.requires_grad and tensor.nbytes >= _LARGE_BYTES
        return self._on_write == "everything"

    def _take_snapshot(self, obj: Any, depth: int) -> tuple[ObjectState, int]:
        handler = handler_for(type(obj))  # type: ignore[arg-type]  # a class with a metaclass of its own is hashable too
        assert handler is not None
        if handler is snapshot_tensor and (storage := storage_of(obj)) is not None:
            storage_state = self._storages.setdefault(storage._cdata, StorageState(storage))
            if not self._copies_on_write(obj):
                storage_state.copy()
        return handler(obj), depth + (handler is snapshot_object)


class _CopyBeforeWrite(TorchFunctionMode):
    # A TorchDispatchMode would see more, but imports the compiler at its first operator (torch 2.14).
    def __init__(self, storages: dict[int, StorageState]) -> None:
        super().__init__()
        self._storages = storages

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ != "__get__" and _may_write(func, kwargs or {}):  # most calls only read an attribute
            for leaf in tree_leaves((args, kwargs)):
                storage = storage_of(leaf) if isinstance(leaf, Tensor) else None
                if storage is not None and storage._cdata in self._storages:
                    self._storages[storage._cdata].copy()
        return func(*args, **(kwargs or {}))


# Functions that give memory to code outside torch, and options that make a function write.
_MEMORY_ACCESSORS = {"numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage"}
_WRITING_OPTIONS = ("out", "inplace", "max_norm")


def _may_write(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a torch function may write to one of its arguments."""
    if kwargs:
        options = (kwargs.get(option) for option in _WRITING_OPTIONS)
        if any(option is not None and option is not False for option in options):
            return True
    if isinstance(func, OpOverload | OpOverloadPacket):
        names = () if isinstance(func, OpOverload) else func.overloads()  # type: ignore[no-untyped-call]
        overloads = [getattr(func, name) for name in names] or [func]
        arguments = (argument for overload in overloads for argument in overload._schema.arguments)
        return any(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments)
    name = getattr(func, "__name__", "")
    return _is_in_place_name(name) or name in _MEMORY_ACCESSORS


@lru_cache(maxsize=4096)
def _is_in_place_name(name: str) -> bool:
    """Return whether a torch function of this name writes to its first argument."""
    inplace = name.endswith("_") and not name.endswith("__")
    return inplace or name == "__setitem__" or name.startswith("__i")


# --- attributes and tensors -------------------------------------------------------------------------------------------


@contextmanager
def preserved_state(modules: Iterable[nn.Module], *, follow_objects: bool = True) -> Iterator[None]:
    """Restore at the end everything that a forward pass changed in `modules` and in all objects reached from them.

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
    # Without a GPU, counting them looks for a driver each time.
    devices = () if cpu_only or not torch.cuda.is_available() else range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
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
