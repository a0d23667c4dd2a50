"""The precisions that a model can be verified in, widest first, and the model cast to one of them for a while.

Every floating tensor of every module is cast: parameters, buffers, and those kept as plain attributes or in lists.
Casting back is exact, since float64 holds every value of the narrower types.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from normswap.model_state import call_model, preserved_state, seeded
from normswap.surgery.module_tree import model_mode, walk_modules

# What one site, and a whole model that does not amplify rounding, may differ by (relative L2).
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}
_CONTAINERS = (list, tuple, dict)


@dataclass(frozen=True)
class Precision:
    """A precision: its dtype, and whether tensors are cast to it or stay what they are."""

    dtype: torch.dtype
    casts: bool = True

    @property
    def name(self) -> str:
        """Its name, such as `float64`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def eps(self) -> float:
        """The relative size of one unit in the last place."""
        return torch.finfo(self.dtype).eps

    @property
    def limit(self) -> float:
        """The relative L2 that counts as the same in this precision."""
        return LIMITS.get(self.dtype, LIMITS[torch.bfloat16])

    def cast(self, value: Any) -> Any:
        """Return nested inputs in this precision."""
        return tree_map_only(Tensor, self._cast_tensor, value) if self.casts else value

    def _cast_tensor(self, tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(_COMPLEX[self.dtype])
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def apply(self, models: Iterable[nn.Module]) -> Callable[[], None]:
        """Cast all tensors of the models, and return what undoes that."""
        undo: list[Callable[[], None]] = []
        if self.casts:
            cast = _Cast(self._cast_tensor)
            modules = {id(entry.module): entry.module for model in models for entry in walk_modules(model)}
            for module in modules.values():  # also those in no registry, which model.double() does not reach
                undo += _cast_module(module, cast)

        def undo_all() -> None:
            for step in reversed(undo):
                step()

        return undo_all


def precisions(model: nn.Module) -> list[Precision]:
    """Return the precisions to try, the widest first, that of the model as it is last."""
    model_precision = model_dtype(model)
    wider = [
        Precision(dtype)
        for dtype in (torch.float64, torch.float32)
        if torch.finfo(dtype).eps < torch.finfo(model_precision).eps
    ]
    return [*wider, Precision(model_precision, casts=False)] if wider else [Precision(torch.float64)]


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the narrowest floating dtype of the parameters and buffers of `model`, float32 if it has none."""
    tensors = [t for p in walk_modules(model) for t in (*p.module._parameters.values(), *p.module._buffers.values())]
    dtypes = {t.dtype.to_real() for t in tensors if t is not None and (t.is_floating_point() or t.is_complex())}
    return max(dtypes & LIMITS.keys(), key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def uses_narrower_dtype(model: nn.Module, batch: Any, dtype: torch.dtype) -> bool:
    """Say whether a forward pass of `model` in evaluation computes something in a narrower precision than `dtype`."""
    modules = [entry.module for entry in walk_modules(model)]
    detector = _NarrowDtypeDetector(torch.finfo(dtype).eps)
    with preserved_state(modules), model_mode(model, training=False), seeded(0), torch.no_grad(), detector:
        try:
            call_model(model, batch)
        except Exception:  # noqa: BLE001 - the model's own code: what was seen so far counts
            return detector.found
    return detector.found


class _NarrowDtypeDetector(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, eps: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._eps, self.found = eps, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        narrow = (t for t in tree_leaves(output) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()))
        self.found = self.found or any(torch.finfo(t.dtype).eps > self._eps for t in narrow)
        return output


class _Cast:
    """Casts tensors, the same one to the same one: several modules may share a buffer."""

    def __init__(self, cast: Callable[[Tensor], Tensor]) -> None:
        self._cast = cast
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._cache:
            cast_tensor = self._cast(tensor)
            if cast_tensor.dtype == tensor.dtype:
                return tensor
            self._cache[id(tensor)] = tensor, cast_tensor
        return self._cache[id(tensor)][1]

    def cast_uncached(self, tensor: Tensor) -> Tensor:
        """Return a tensor cast, which is not met again."""
        return self._cast(tensor)

    def cast_value(self, value: Any) -> Any:
        """Return a tensor, or a plain container of some, cast; anything else, also a parameter, as it is."""
        if isinstance(value, Tensor):
            is_parameter_like = isinstance(value, nn.Parameter) or value.requires_grad
            return value if is_parameter_like or value.is_quantized or value.is_nested else self(value)
        if type(value) not in _CONTAINERS or not value:
            return value
        items = list(value.values()) if isinstance(value, dict) else list(value)
        cast_tensor = [self.cast_value(item) for item in items]
        if all(map(operator.is_, items, cast_tensor)):
            return value
        return dict(zip(value, cast_tensor, strict=True)) if isinstance(value, dict) else type(value)(cast_tensor)


def _cast_module(module: nn.Module, cast: _Cast) -> list[Callable[[], None]]:
    """Cast what one module itself holds, and return the steps that undo it."""
    undo: list[Callable[[], None]] = []
    for parameter in module._parameters.values():
        if parameter is not None and not parameter.is_quantized:
            dtype, cast_tensor = parameter.dtype, cast.cast_uncached(parameter.data)
            if cast_tensor.dtype != dtype:
                undo.append(_recast(parameter, dtype))
                parameter.data, parameter.grad = cast_tensor, None
    registries: list[Any] = [module._buffers]
    if not isinstance(module, torch.jit.ScriptModule):
        registries.append(vars(module))
    for registry in registries:
        for name, value in list(registry.items()):
            cast_tensor = value if name in _REGISTRIES else cast.cast_value(value)
            if cast_tensor is not value:
                undo.append(_reassign(registry, name, value))
                registry[name] = cast_tensor
    return undo


_REGISTRIES = {"_parameters", "_buffers", "_modules"}


def _recast(parameter: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    def undo() -> None:
        parameter.grad = None
        parameter.data = parameter.data.to(dtype)

    return undo


def _reassign(registry: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: registry.__setitem__(name, value)
