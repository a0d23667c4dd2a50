"""Precisions and their limits: cast a model, change its input by one unit in the last place, judge an error.

A cast covers every floating tensor of every module: parameters, buffers, and tensors in plain attributes or lists.
Casting back is exact, because float64 represents every value of the narrower types.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

from normswap.model_state import call_model, preserved_state, registered_hooks, seeded
from normswap.surgery.module_tree import model_mode, walk_modules

# The largest relative L2 error of a site, and of a whole model that does not amplify rounding errors.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
# An error above the limit of the precision is allowed up to this multiple of the original's own response to a one-ulp
# change of its input. If that response is larger than the maximum, the comparison shows nothing.
RESPONSE_FACTOR = 10
MAX_RESPONSE = 1e-3
_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}
_CONTAINERS = (list, tuple, dict)


@dataclass(frozen=True)
class Precision:
    """A dtype for a verification.

    Attributes:
        dtype: the dtype.
        casts: whether tensors are cast to it; False for the dtypes that the model has anyway.
    """

    dtype: torch.dtype
    casts: bool = True

    @property
    def name(self) -> str:
        """The name of the dtype, such as `float64`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def eps(self) -> float:
        """The relative size of one unit in the last place."""
        return torch.finfo(self.dtype).eps

    @property
    def limit(self) -> float:
        """The largest relative L2 error that passes in this precision."""
        return LIMITS.get(self.dtype, LIMITS[torch.bfloat16])

    def cast(self, value: Any) -> Any:
        """Return nested inputs cast to this precision."""
        return tree_map_only(Tensor, self._cast_tensor, value) if self.casts else value

    def _cast_tensor(self, tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(_COMPLEX[self.dtype])
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def apply(self, models: Iterable[nn.Module]) -> Callable[[], None]:
        """Cast all tensors of the models, and return a function that undoes it."""
        # Also unregistered modules, which model.double() does not reach.
        return self.apply_to_modules(entry.module for model in models for entry in walk_modules(model))

    def apply_to_modules(self, modules: Iterable[nn.Module]) -> Callable[[], None]:
        """Cast the tensors of the modules without their children, and return a function that undoes it."""
        undo: list[Callable[[], None]] = []
        if self.casts:
            cast = _Cast(self._cast_tensor)
            for module in {id(module): module for module in modules}.values():
                undo += _cast_module(module, cast)

        def undo_all() -> None:
            for step in reversed(undo):
                step()

        return undo_all


def precisions(model: nn.Module) -> list[Precision]:
    """Return the precisions to try: the widest first, the model's own last."""
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
    """Return whether a forward pass of `model` in evaluation computes a tensor of a narrower type than `dtype`."""
    modules = [entry.module for entry in walk_modules(model)]
    detector = _NarrowDtypeDetector(torch.finfo(dtype).eps)
    with preserved_state(modules), model_mode(model, training=False), seeded(0), torch.no_grad(), detector:
        try:
            call_model(model, batch)
        except Exception:  # noqa: BLE001 - the model's own code failed: use the operations before the error
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
    """Cast a tensor, and return the same result for the same tensor: several modules may share a buffer."""

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
        """Return a cast tensor without remembering it, for a tensor that comes only once."""
        return self._cast(tensor)

    def cast_value(self, value: Any) -> Any:
        """Return a tensor, or a plain container of tensors, cast; return parameters and other values unchanged."""
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
    """Cast the tensors of one module without its children, and return functions that undo it."""
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


# --- the input changed by one unit in the last place ------------------------------------------------------------------


def perturbed_passes(
    model: nn.Module, batch: Any, run: Callable[[Any, AbstractContextManager[Any] | None], Any], *, eps: float
) -> Iterator[Any]:
    """Yield the results of `run` for the input changed by one unit in the last place: up, down and at random.

    If no input tensor has that precision (token ids, byte images), the first such output of a module is changed
    instead.

    Args:
        run: called with the inputs, and with a context for the pass or None.
        eps: the relative size of one unit in the last place.
    """
    has_fine_inputs = tree_any(lambda leaf: _resolves_eps(leaf, eps), batch)
    for direction in ("up", "down", "random"):
        perturbed = partial(perturb, direction=direction, eps=eps)
        if has_fine_inputs:
            yield run(tree_map_only(Tensor, perturbed, batch), None)
        else:
            yield run(batch, _first_output_perturbed(model, perturbed, eps))


@contextmanager
def _first_output_perturbed(model: nn.Module, perturb: Callable[[Tensor], Tensor], eps: float) -> Iterator[None]:
    done = False

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        """Change the first output that has the precision."""
        nonlocal done
        if done or not tree_any(lambda leaf: _resolves_eps(leaf, eps), output):
            return None
        done = True
        return tree_map_only(Tensor, perturb, output)

    modules = [entry.module for entry in walk_modules(model)]
    with registered_hooks(
        partial(module.register_forward_hook, hook)
        for module in modules
        if not isinstance(module, torch.jit.ScriptModule)
    ):
        yield


def _resolves_eps(leaf: Any, eps: float) -> bool:
    """Return whether a leaf is a floating tensor that can change by as little as `eps`."""
    is_floating = isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    return is_floating and torch.finfo(leaf.dtype).eps <= eps


def perturb(tensor: Tensor, direction: str, eps: float) -> Tensor:
    """Return a tensor changed by one unit in the last place; return a tensor of a narrower type unchanged."""
    if not _resolves_eps(tensor, eps):
        return tensor
    if direction != "random":
        return tensor * (1 + eps if direction == "up" else 1 - eps)
    random_bits = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor.device)
    signs = (2 * random_bits - 1).to(tensor.dtype)  # in float32, 1 + eps of float64 is 1
    return tensor * (1 + signs * eps)


# --- an error and its limit -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """The result of one comparison of two models.

    Attributes:
        name: the compared values, such as `outputs in evaluation`.
        error: the largest relative L2 over all batches; None if nothing was compared.
        limit: the limit of the error.
        own_response: the relative L2 response of the original to a one-ulp change of its input, if it was needed.
        passed: whether the error is within the limit; None if the check cannot judge the models.
        note: the reason, if `passed` is None, and other remarks.
    """

    name: str
    error: float | None
    limit: float
    own_response: float | None = None
    passed: bool | None = None
    note: str = ""


@dataclass
class CheckAccumulator:
    """The result of one check over all batches: the error that is largest relative to its limit."""

    name: str
    limit: float
    error: float | None = None
    own_response: float | None = None
    failed: bool = False
    unjudged: bool = False
    notes: dict[str, None] = field(default_factory=dict)

    def update(self, errors: Mapping[str, float], responses: Mapping[str, float], base: float) -> None:
        """Add the errors of one batch, and decide which of them can be judged.

        An infinite error can always be judged if the response of the original is finite.

        Args:
            errors: by leaf.
            responses: the responses of the original to a one-ulp change, by leaf.
            base: the limit for an error whose response is small.
        """
        unjudgeable = {
            part: response
            for part, error in errors.items()
            if not error <= base and not (response := responses.get(part, 0.0)) <= MAX_RESPONSE
            if not (error == inf and isfinite(response))
        }
        for part, response in unjudgeable.items():
            self.not_judged(
                f"{part or self.name}: not judged, because a change of the input by one unit in the last place changes "
                f"the original's by {response:.1e} (relative L2)"
            )
        for part in errors:  # each leaf has its own limit, so that one that amplifies rounding hides no other
            if part in unjudgeable:
                continue
            error, own = errors[part], responses.get(part)
            limit = max(base, RESPONSE_FACTOR * (own or 0.0))
            self.failed = self.failed or not error <= limit
            if self.error is None or error / limit > self.error / self.limit:
                self.error, self.limit, self.own_response = error, limit, own

    def not_judged(self, note: str) -> None:
        """Note why the check cannot judge the models."""
        self.unjudged = True
        self.notes[note] = None

    def check(self, note: str) -> Check:
        """Return the result, with `note` as a last remark."""
        passed = False if self.failed else None if self.unjudged or self.error is None else True
        notes = "; ".join(dict.fromkeys(text for text in (*self.notes, note) if text))
        return Check(self.name, self.error, self.limit, self.own_response, passed, notes)
