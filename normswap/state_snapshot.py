"""Save the state of one object and restore it bit for bit: one function for each kind of object.

A forward pass may write anywhere: to buffers and parameters (also through `.data`, `set_` and `resize_`), to caches and
counters in attributes, lists, dicts and plain objects, and to random number generators. `model_state.Snapshot` follows
all objects that a module refers to. Restoring keeps every object the same object. Memory is copied by storage, so views
and tied tensors stay views and tied; memory that did not change is compared, not written. Variables that only a hook
uses are not part of the model.
"""

import logging
import operator
import random
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache, partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_logger = logging.getLogger(__name__)

# True for a tensor made of other tensors. The annotation is needed: mypy takes torch's function for a type guard that
# no Tensor passes.
_is_wrapper: Callable[[Tensor], bool] = is_traceable_wrapper_subclass

_OPAQUE = (ModuleType, BuiltinFunctionType)
# Plain objects of these packages are saved only if they are from these parts; other parts are caches of the library.
_FOLLOWED_SUBPACKAGES = {"torch": ("torch.nn.", "torch.optim.", "torch.distributions."), "normswap": ()}
_FOLLOWED_STDLIB = ("types", "collections")


# --- containers -------------------------------------------------------------------------------------------------------

CONTAINERS = (dict, list, set, deque)


class ContainerState:
    """The items of a dict, list, set or deque; `restore` puts the same objects back into the same container."""

    def __init__(self, container: Any) -> None:
        self._container = container
        self.items = container_items(container)

    def restore(self) -> None:
        """Put the items back if they changed."""
        container, items = self._container, self.items
        if same_items(container, container_items(container), items):
            return
        container.clear()
        if isinstance(container, dict):
            for key, item in zip(items[::2], items[1::2], strict=True):  # `update` of a Counter would add
                container[key] = item
        elif isinstance(container, set):
            container.update(items)
        else:
            container.extend(items)


def container_items(container: Any) -> list[Any]:
    """Return the items of a container in a flat list; those of a dict are its keys and values in turn."""
    return [part for item in container.items() for part in item] if isinstance(container, dict) else list(container)


def same_items(container: Any, first: list[Any], second: list[Any]) -> bool:
    """Return whether two lists contain the same objects, in the same order unless they are the items of a set."""
    if len(first) != len(second):
        return False
    if isinstance(container, set):
        return {*map(id, first)} == {*map(id, second)}
    return all(map(operator.is_, first, second))


# --- objects ----------------------------------------------------------------------------------------------------------


class ObjectState(NamedTuple):
    """A function that restores one object, if anything of it can change, and the objects that it refers to."""

    restore: Callable[[], None] | None
    children: Iterable[Any]


class StorageState:
    """The bytes of a storage, copied now or before the first write."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage
        self._size = storage.nbytes()
        self._copy: Tensor | None = None

    def copy(self) -> None:
        """Copy the bytes, unless that was done before."""
        if self._copy is None and self._size and self._storage.device.type != "meta":
            self._copy = _bytes_of(self._storage).clone()

    def restore(self) -> None:
        """Restore the size, and the bytes if they were copied and changed."""
        if self._storage.nbytes() != self._size:
            self._storage.resize_(self._size)
        if self._copy is not None and not torch.equal(now := _bytes_of(self._storage), self._copy):
            now.copy_(self._copy)


_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_NO_HOOKS: dict[str, dict[int, Any]] = {name: {} for name in _TENSOR_HOOKS}


# --- one function for each kind of object -----------------------------------------------------------------------------


def _snapshot_container(container: Any) -> ObjectState:
    state = ContainerState(container)
    return ObjectState(state.restore, state.items)


def _snapshot_immutable(value: Any) -> ObjectState:
    """Save nothing of a tuple or frozenset itself; its items may change."""
    return ObjectState(None, list(value))


def snapshot_tensor(tensor: Tensor) -> ObjectState:
    """Save view, `requires_grad`, gradient, hooks and attributes; `StorageState` saves the memory."""
    if is_lazy(tensor):
        return ObjectState(None, ())
    if _is_wrapper(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return ObjectState(None, [getattr(tensor, name) for name in names])
    if storage_of(tensor) is None:
        return _snapshot_non_strided_tensor(tensor)
    alias, view_metadata, leaf, needs_grad = tensor.data, _view_metadata(tensor), tensor.is_leaf, tensor.requires_grad
    grad = tensor.grad if leaf else None
    # A tensor can have hooks only if it requires a gradient.
    hooks = {name: dict(getattr(tensor, name, None) or {}) for name in _TENSOR_HOOKS} if needs_grad else _NO_HOOKS

    def restore() -> None:
        """Restore everything but the memory."""
        if leaf and not tensor.is_leaf:
            tensor.detach_()
        if _view_metadata(tensor) != view_metadata:
            tensor.data = alias
        if tensor.requires_grad != needs_grad:
            tensor.requires_grad_(needs_grad)
        if leaf and tensor.grad is not grad:
            tensor.grad = grad
        for name, before in hooks.items():
            now = getattr(tensor, name, None)
            if now and now != before:
                now.clear()
                now.update(before)

    return ObjectState(restore, (grad, vars(tensor)))


def _snapshot_non_strided_tensor(tensor: Tensor) -> ObjectState:
    """Save a tensor without strided memory, such as a sparse one."""
    try:
        copy = tensor.detach().clone()
    except Exception as error:  # noqa: BLE001 - code that cannot copy this kind of tensor will hardly write to it
        _logger.debug("a tensor of the layout %s cannot be copied, so it is not restored: %s", tensor.layout, error)
        return ObjectState(None, ())

    def restore() -> None:
        if not _equal(tensor, copy):
            tensor.data.copy_(copy)

    return ObjectState(restore, ())


def _snapshot_array(array: Any) -> ObjectState:
    before = array.copy()

    def restore() -> None:
        if array.tobytes() != before.tobytes():
            array[...] = before

    return ObjectState(restore, ())


def snapshot_function(function: Any) -> ObjectState:
    """Follow modules and tensors in the closure; other variables are not part of the model."""
    captured = [cell.cell_contents for cell in function.__closure__ or () if _has_contents(cell)]
    return ObjectState(None, [value for value in captured if isinstance(value, nn.Module | Tensor)])


def _snapshot_method(method: Any) -> ObjectState:
    return ObjectState(None, [value for value in (method.__self__,) if isinstance(value, nn.Module)])


def _snapshot_partial(function: Any) -> ObjectState:
    """Follow the function, and the modules and tensors among its arguments."""
    passed = (*function.args, *function.keywords.values())
    return ObjectState(None, (function.func, *(value for value in passed if isinstance(value, nn.Module | Tensor))))


def _snapshot_module(module: nn.Module) -> ObjectState:
    """Follow the attributes and, for TorchScript, the tensors that are not attributes."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return ObjectState(None, (vars(module), *((*module.parameters(), *module.buffers()) if scripted else ())))


def snapshot_object(value: Any) -> ObjectState:
    """Save the slots, and follow `__dict__`."""
    slots = {name: getattr(value, name) for name in _slots_of(type(value)) if hasattr(value, name)}

    def restore() -> None:
        """Restore the slots that changed."""
        for name, content in slots.items():
            if getattr(value, name, None) is not content:
                object.__setattr__(value, name, content)

    return ObjectState(restore if slots else None, (*slots.values(), getattr(value, "__dict__", None)))


def _snapshot_generator(read: str, write: str, value: Any) -> ObjectState:
    """Save a random number generator through the methods named `read` and `write`."""
    return ObjectState(partial(getattr(value, write), getattr(value, read)()), ())


def _snapshot_numpy_generator(value: Any) -> ObjectState:
    return ObjectState(partial(setattr, value.bit_generator, "state", value.bit_generator.state), ())


_SNAPSHOT_HANDLERS: tuple[tuple[type | tuple[type, ...], Callable[[Any], ObjectState]], ...] = (
    (Tensor, snapshot_tensor),
    (nn.Module, _snapshot_module),
    (CONTAINERS, _snapshot_container),
    ((tuple, frozenset), _snapshot_immutable),
    (FunctionType, snapshot_function),
    (MethodType, _snapshot_method),
    (partial, _snapshot_partial),
    (torch.Generator, partial(_snapshot_generator, "get_state", "set_state")),
    (random.Random, partial(_snapshot_generator, "getstate", "setstate")),
)
# Used only with `follow_objects`.
FOLLOWED_OBJECT_HANDLERS = (
    _snapshot_module,
    snapshot_function,
    _snapshot_method,
    _snapshot_partial,
    snapshot_object,
)


@lru_cache(maxsize=4096)
def handler_for(cls: Hashable) -> Callable[[Any], ObjectState] | None:
    """Return the function that saves objects of a class, None if they are not saved."""
    assert isinstance(cls, type)
    numpy = sys.modules.get("numpy")
    numpy_handlers: tuple[tuple[type | tuple[type, ...], Callable[[Any], ObjectState]], ...] = (
        (
            (numpy.ndarray, _snapshot_array),
            (numpy.random.Generator, _snapshot_numpy_generator),
            (numpy.random.RandomState, partial(_snapshot_generator, "get_state", "set_state")),
        )
        if numpy
        else ()
    )
    storage_state = next(
        (handler for base, handler in (*_SNAPSHOT_HANDLERS, *numpy_handlers) if issubclass(cls, base)), None
    )
    if storage_state is not None:
        return storage_state
    return snapshot_object if not issubclass(cls, _OPAQUE) and _is_followed(cls) else None


def _is_followed(cls: type) -> bool:
    """Return whether the attributes of plain objects of a class can be part of a model's state."""
    package = cls.__module__.partition(".")[0]
    if package in _FOLLOWED_SUBPACKAGES:
        return cls.__module__.startswith(_FOLLOWED_SUBPACKAGES[package])
    library = package in sys.stdlib_module_names and package not in (*_FOLLOWED_STDLIB, "__main__")
    return not library and not issubclass(cls, type) and bool(_slots_of(cls) or cls.__dictoffset__)


def _slots_of(cls: type) -> list[str]:
    found = [vars(base).get("__slots__", ()) for base in cls.__mro__]
    names = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
    return [name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__")]


def _has_contents(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return the memory of a plain strided tensor, None for any other."""
    if is_lazy(tensor) or _is_wrapper(tensor) or tensor.layout is not torch.strided:
        return None
    try:
        return tensor.untyped_storage()
    except RuntimeError:
        return None


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """Return a storage as integers, of 8 bytes if its size allows it: these are compared fastest."""
    dtype = next(d for d in (torch.int64, torch.int32, torch.uint8) if storage.nbytes() % d.itemsize == 0)
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage)


def _view_metadata(tensor: Tensor) -> tuple[Any, ...]:
    """Return everything that defines a tensor as a view of its storage."""
    start = tensor.untyped_storage()._cdata, tensor.storage_offset()
    return *start, tensor.shape, tensor.stride(), tensor.dtype


def _equal(a: Tensor, b: Tensor) -> bool:
    try:
        return torch.equal(a, b)
    except RuntimeError:
        return False
