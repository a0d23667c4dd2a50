"""The state of modules and of everything they refer to, kept while foreign code runs and put back bit for bit.

A forward pass may write anywhere: into buffers and parameters (also through `.data`, `set_` and `resize_`), caches and
counters in attributes, lists, dicts and plain objects, generators of random numbers. Every object stays the same
object. What a hook collects in variables of its own is not part of the model. Memory is copied by storage, so that
views and tied tensors stay views and tied; what a pass has not changed is compared and never written.
"""

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import lru_cache, partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from normswap.errors import ModelError

# A tensor made of other tensors; torch's own name for the question narrows the type to what no Tensor can be.
_is_wrapper: Callable[[Tensor], bool] = is_traceable_wrapper_subclass

# How many plain objects may stand one in another: a counter in a cache in a queue, but not all of a trainer.
_OBJECT_DEPTH = 3
_ATOMS = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size)
_CONTAINERS = (dict, list, set, OrderedDict, deque)
_OPAQUE = (ModuleType, BuiltinFunctionType)
# Of these packages, plain objects of a few parts only: the others hold caches and the state of an interpreter.
_FOLLOWED_SUBPACKAGES = {"torch": ("torch.nn.", "torch.optim.", "torch.distributions."), "normswap": ()}
_FOLLOWED_STDLIB = ("types", "collections")


OnWrite = Literal["nothing", "weights", "everything"]
# Gates and running statistics are smaller, or hardly larger.
_LARGE_BYTES = 1 << 15


class _ObjectState(NamedTuple):
    """How to put one object back, if there is anything to put back, and what it refers to."""

    restore: Callable[[], None] | None
    children: Iterable[Any]


class _StorageState:
    """The bytes of a storage, copied at once or before the first write."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage
        self._size = storage.nbytes()
        self._copy: Tensor | None = None

    def copy(self) -> None:
        if self._copy is None and self._size and self._storage.device.type != "meta":
            self._copy = _bytes_of(self._storage).clone()

    def restore(self) -> None:
        if self._storage.nbytes() != self._size:
            self._storage.resize_(self._size)
        if self._copy is not None and not torch.equal(now := _bytes_of(self._storage), self._copy):
            now.copy_(self._copy)


class Snapshot:
    """The state of `modules` and of what they refer to.

    Args:
        modules: the modules that run.
        reach: also follow plain objects, hooks, closures and the modules found there; without it only containers.
        on_write: whose memory is copied only before a function of torch writes to it, within `copying_before_writes`:
            of nothing, of large parameters that train, or of everything.
    """

    def __init__(
        self, modules: Iterable[nn.Module], *, follow_objects: bool = True, on_write: OnWrite = "nothing"
    ) -> None:
        self._restore_functions: list[Callable[[], None]] = []
        self._empty_containers: list[Any] = []  # containers, as most registries of a module are
        self._storages: dict[int, _StorageState] = {}
        self._visited: dict[int, Any] = {}  # objects by identity, which holding them keeps
        self._on_write = on_write
        pending = [(module, 0) for module in modules]
        self._visited |= {id(module): module for module, _ in pending}
        with torch.no_grad():
            for obj, depth in pending:  # which grows meanwhile
                object_state, inner_depth = self._take_snapshot(obj, depth)
                if object_state.restore is not None:
                    self._restore_functions.append(object_state.restore)
                pending += [
                    (inner, inner_depth)
                    for inner in object_state.children
                    if self._is_new(inner, inner_depth, follow_objects)
                ]

    def restore(self) -> None:
        """Put everything back.

        Raises:
            ModelError: something that was changed cannot be put back; all else is.
        """
        failure: Exception | None = None
        for container in self._empty_containers:
            if container:
                container.clear()
        with torch.no_grad():
            for restore in (*self._restore_functions, *(storage.restore for storage in self._storages.values())):
                try:
                    restore()
                except Exception as error:  # noqa: BLE001 - foreign objects: the others are still put back
                    failure = failure or error
        if failure is not None:
            raise ModelError(
                f"the forward pass changed the model's state, and it cannot be put back ({failure}): pass "
                "copy.deepcopy(model) instead of the model"
            ) from failure

    def copying_before_writes(self) -> TorchFunctionMode:
        """Return a context in which memory is copied before the first function of torch that writes to it."""
        return _CopyBeforeWrite(self._storages)

    def _is_new(self, obj: Any, depth: int, follow_objects: bool) -> bool:
        if type(obj) in _ATOMS or id(obj) in self._visited:
            return False
        if type(obj) in _CONTAINERS and not obj:
            self._visited[id(obj)] = obj
            self._empty_containers.append(obj)
            return False
        handler = _handler_for(type(obj))  # type: ignore[arg-type]  # a class with a metaclass of its own is hashable too
        if handler is _snapshot_function and obj.__module__ and obj.__module__.startswith("normswap."):
            return False  # hooks of a measurement, which collect its results
        if handler is None or (not follow_objects and handler in _FOLLOWED_OBJECT_HANDLERS) or depth > _OBJECT_DEPTH:
            return False
        self._visited[id(obj)] = obj
        return True

    def _copies_on_write(self, tensor: Tensor) -> bool:
        """Whether memory is copied only before a write; kernels of C, which nobody sees write, leave weights alone."""
        if self._on_write == "weights":
            return isinstance(tensor, nn.Parameter) and tensor.requires_grad and tensor.nbytes >= _LARGE_BYTES
        return self._on_write == "everything"

    def _take_snapshot(self, obj: Any, depth: int) -> tuple[_ObjectState, int]:
        handler = _handler_for(type(obj))  # type: ignore[arg-type]  # a class with a metaclass of its own is hashable too
        assert handler is not None
        if handler is _snapshot_tensor and (storage := _storage_of(obj)) is not None:
            storage_state = self._storages.setdefault(storage._cdata, _StorageState(storage))
            if not self._copies_on_write(obj):
                storage_state.copy()
        return handler(obj), depth + (handler is _snapshot_object)


class _CopyBeforeWrite(TorchFunctionMode):
    # Not a TorchDispatchMode, which would see more and imports the compiler at its first operator (torch 2.14).
    def __init__(self, storages: dict[int, _StorageState]) -> None:
        super().__init__()
        self._storages = storages

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _may_write(func, kwargs or {}):
            for leaf in tree_leaves((args, kwargs)):
                storage = _storage_of(leaf) if isinstance(leaf, Tensor) else None
                if storage is not None and storage._cdata in self._storages:
                    self._storages[storage._cdata].copy()
        return func(*args, **(kwargs or {}))


# What hands memory out to code that torch does not see, and what writes by an option.
_MEMORY_ACCESSORS = {"numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage"}
_WRITING_OPTIONS = ("out", "inplace", "max_norm")


def _may_write(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Say whether a function of torch may write to a tensor that it is given."""
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
    """Say whether a function of torch of this name writes to a tensor that it is given."""
    inplace = name.endswith("_") and not name.endswith("__")
    return inplace or name == "__setitem__" or name.startswith("__i")


_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_NO_HOOKS: dict[str, dict[int, Any]] = {name: {} for name in _TENSOR_HOOKS}


# --- one kind of object each ------------------------------------------------------------------------------------------


def _snapshot_dict(value: dict[Any, Any]) -> _ObjectState:
    before = list(value.items())

    def restore() -> None:
        if len(value) != len(before) or any(
            key is not old_key or item is not old
            for (key, item), (old_key, old) in zip(value.items(), before, strict=True)
        ):
            value.clear()
            for key, item in before:  # a Counter would count what `update` is given
                value[key] = item

    return _ObjectState(restore, [part for item in before for part in item])


def _snapshot_sequence(value: Any) -> _ObjectState:
    """Of a list or a deque."""
    before = list(value)

    def restore() -> None:
        if len(value) != len(before) or any(a is not b for a, b in zip(value, before, strict=True)):
            value.clear()
            value.extend(before)

    return _ObjectState(restore, before)


def _snapshot_set(value: set[Any]) -> _ObjectState:
    before = list(value)

    def restore() -> None:
        if len(value) != len(before) or {*map(id, value)} != {*map(id, before)}:
            value.clear()
            value.update(before)

    return _ObjectState(restore, before)


def _snapshot_immutable(value: Any) -> _ObjectState:
    """A tuple or frozenset stays; what it holds may change."""
    return _ObjectState(None, list(value))


def _snapshot_tensor(tensor: Tensor) -> _ObjectState:
    """Which memory it is a view of, its flag, gradient, hooks and attributes; the memory itself is kept by storage."""
    if is_lazy(tensor):
        return _ObjectState(None, ())
    if _is_wrapper(tensor):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return _ObjectState(None, [getattr(tensor, name) for name in names])
    if _storage_of(tensor) is None:
        return _snapshot_non_strided_tensor(tensor)
    alias, view_metadata, leaf, needs_grad = tensor.data, _view_metadata(tensor), tensor.is_leaf, tensor.requires_grad
    grad = tensor.grad if leaf else None
    # Only a tensor that requires a gradient may have hooks.
    hooks = {name: dict(getattr(tensor, name, None) or {}) for name in _TENSOR_HOOKS} if needs_grad else _NO_HOOKS

    def restore() -> None:
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

    return _ObjectState(restore, (grad, vars(tensor)))


def _snapshot_non_strided_tensor(tensor: Tensor) -> _ObjectState:
    """Of a tensor without strided memory of its own, such as a sparse one."""
    try:
        copy = tensor.detach().clone()
    except Exception:  # noqa: BLE001 - a kind that cannot be copied can hardly be written either
        return _ObjectState(None, ())

    def restore() -> None:
        if not _equal(tensor, copy):
            tensor.data.copy_(copy)

    return _ObjectState(restore, ())


def _snapshot_array(array: Any) -> _ObjectState:
    before = array.copy()

    def restore() -> None:
        if array.tobytes() != before.tobytes():
            array[...] = before

    return _ObjectState(restore, ())


def _snapshot_function(function: Any) -> _ObjectState:
    """What a closure collects is its author's; modules and tensors that it uses are the model's."""
    captured = [cell.cell_contents for cell in function.__closure__ or () if _has_contents(cell)]
    return _ObjectState(None, [value for value in captured if isinstance(value, nn.Module | Tensor)])


def _snapshot_method(method: Any) -> _ObjectState:
    return _ObjectState(None, [value for value in (method.__self__,) if isinstance(value, nn.Module)])


def _snapshot_partial(function: Any) -> _ObjectState:
    """Its function, and the modules and tensors that it passes."""
    passed = (*function.args, *function.keywords.values())
    return _ObjectState(None, (function.func, *(value for value in passed if isinstance(value, nn.Module | Tensor))))


def _snapshot_module(module: nn.Module) -> _ObjectState:
    """Its attributes and, of TorchScript, the tensors that are no attributes."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return _ObjectState(None, (vars(module), *((*module.parameters(), *module.buffers()) if scripted else ())))


def _snapshot_object(value: Any) -> _ObjectState:
    """Attributes in a `__dict__`, which is a dict like any other, and in slots."""
    slots = {name: getattr(value, name) for name in _slots_of(type(value)) if hasattr(value, name)}

    def restore() -> None:
        for name, content in slots.items():
            if getattr(value, name, None) is not content:
                object.__setattr__(value, name, content)

    return _ObjectState(restore if slots else None, (*slots.values(), getattr(value, "__dict__", None)))


def _snapshot_generator(read: str, write: str, value: Any) -> _ObjectState:
    """Of a generator of random numbers: its state is read and written by the methods of these names."""
    return _ObjectState(partial(getattr(value, write), getattr(value, read)()), ())


def _snapshot_numpy_generator(value: Any) -> _ObjectState:
    return _ObjectState(partial(setattr, value.bit_generator, "state", value.bit_generator.state), ())


_SNAPSHOT_HANDLERS: tuple[tuple[type | tuple[type, ...], Callable[[Any], _ObjectState]], ...] = (
    (Tensor, _snapshot_tensor),
    (nn.Module, _snapshot_module),
    (dict, _snapshot_dict),
    ((list, deque), _snapshot_sequence),
    (set, _snapshot_set),
    ((tuple, frozenset), _snapshot_immutable),
    (FunctionType, _snapshot_function),
    (MethodType, _snapshot_method),
    (partial, _snapshot_partial),
    (torch.Generator, partial(_snapshot_generator, "get_state", "set_state")),
    (random.Random, partial(_snapshot_generator, "getstate", "setstate")),
)
# What is followed only with `reach`.
_FOLLOWED_OBJECT_HANDLERS = (
    _snapshot_module,
    _snapshot_function,
    _snapshot_method,
    _snapshot_partial,
    _snapshot_object,
)


@lru_cache(maxsize=4096)
def _handler_for(cls: Hashable) -> Callable[[Any], _ObjectState] | None:
    """What keeps objects of a class, None where they are left alone."""
    assert isinstance(cls, type)
    numpy = sys.modules.get("numpy")
    numpy_handlers: tuple[tuple[type | tuple[type, ...], Callable[[Any], _ObjectState]], ...] = (
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
    return _snapshot_object if not issubclass(cls, _OPAQUE) and _is_followed(cls) else None


def _is_followed(cls: type) -> bool:
    """Say whether the attributes of plain objects of a class may be part of a model's state."""
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


def _storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The memory of a plain strided tensor, None of any other."""
    if is_lazy(tensor) or _is_wrapper(tensor) or tensor.layout is not torch.strided:
        return None
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return None


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """All of a storage as whole numbers: of 8 bytes where its size allows, which are compared fastest."""
    dtype = next(d for d in (torch.int64, torch.int32, torch.uint8) if storage.nbytes() % d.itemsize == 0)
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage)


def _view_metadata(tensor: Tensor) -> tuple[Any, ...]:
    """What makes a tensor the view of its storage that it is."""
    where = tensor.untyped_storage()._cdata, tensor.storage_offset()
    return *where, tensor.shape, tensor.stride(), tensor.dtype


def _equal(a: Tensor, b: Tensor) -> bool:
    try:
        return torch.equal(a, b)
    except RuntimeError:
        return False
