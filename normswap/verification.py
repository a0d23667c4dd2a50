"""The proof: original against converted, on data, in float64 - and in float32 for the record.

Law 1 (same function): every output in evaluation and in training, every running statistic after a training step,
and the gradients of all original parameters as one vector differ by a relative L2 of at most 1e-9, or at most ten
times the original's own response to a one-ulp change of its input. Where the original raises, the law is silent.
Both models are judged on copies; nothing is repaired here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from normswap.errors import ModelError
from normswap.layers.modules import SwitchNorm
from normswap.modes import call_model, hooked, preserved_state, seeded, training_flags
from normswap.surgery.gated import gated_modules
from normswap.surgery.graph_rewrite import is_rewritten
from normswap.surgery.observation import describe_shapes
from normswap.surgery.tracing import first_line
from normswap.surgery.tree import copy_model, join, modules_by_name, walk_modules

LAW_TOLERANCE = 1e-9
_RESPONSE_FACTOR = 10
_SEED = 0


@dataclass(frozen=True)
class Check:
    """One comparison in float64.

    `error` is the worst relative L2 over all batches, `limit` what it was held against, `own_response` that of the
    original to a one-ulp change of its input where it was needed. `passed` is None where the law is silent; `note`
    says why.
    """

    name: str
    error: float | None
    limit: float
    own_response: float | None = None
    passed: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class SiteError:
    """Relative L2 between a site and what replaced it, fed the same recorded input; None where it did not run."""

    fqn: str
    evaluation: float | None
    training: float | None


@dataclass(frozen=True)
class Verification:
    """What `verify` found: `passed` only if something was compared and nothing failed.

    `loosened` tells that `tolerance` is wider than the law's; errors are relative L2 in float64, `fp32_error` that of
    the outputs in evaluation in float32 (None for models of another dtype), `max_abs_error` over all outputs.
    """

    passed: bool
    tolerance: float
    loosened: bool
    inputs: str
    checks: tuple[Check, ...]
    sites: tuple[SiteError, ...]
    max_abs_error: float
    max_rel_error: float
    fp32_error: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return what `to_dict` came from."""
        checks = tuple(Check(**check) for check in data["checks"])
        sites = tuple(SiteError(**site) for site in data["sites"])
        return cls(**{**data, "checks": checks, "sites": sites})


Names = tuple[str, ...]


@dataclass(frozen=True)
class _Pass:
    """What one pass left: the leaves of the output; in training also gradients and buffers by all their names."""

    outputs: list[Any]
    gradients: dict[Names, Tensor]
    buffers: dict[Names, Tensor]


@dataclass
class _Worst:
    """The worst case of one check over all batches, by error relative to its limit."""

    error: float | None = None
    limit: float = LAW_TOLERANCE
    own_response: float | None = None

    def update(self, error: float, tolerance: float, own_response: float | None) -> None:
        limit = max(tolerance, _RESPONSE_FACTOR * (own_response or 0.0))
        if self.error is None or error / limit > self.error / self.limit:
            self.error, self.limit, self.own_response = error, limit, own_response


_EVALUATION = ("outputs in evaluation",)
_TRAINING = ("outputs in training", "gradients", "running statistics")


def verify(
    original: nn.Module, converted: nn.Module, batches: Iterable[Any], *, tolerance: float | None = None
) -> Verification:
    """Compare two models on data, end to end and site by site, in evaluation and in training.

    Args:
        original, converted: both are left as they are.
        batches: an iterable of inputs, each a tensor, a tuple or a dict; a list for a single one.
        tolerance: relative L2 in float64; default is the law's 1e-9, a wider one is reported as loosened.

    Raises:
        ModelError: `batches` holds no inputs, or the original fails on them in evaluation.
    """
    inputs = _as_batches(batches)
    limit = LAW_TOLERANCE if tolerance is None else tolerance
    first, second = _in_float64(original), _in_float64(converted)
    worst = {name: _Worst(limit=limit) for name in _EVALUATION + _TRAINING}
    notes = dict.fromkeys(_TRAINING, _training_silence(converted))
    sites = _SiteWatch(first, second)
    max_abs_error = 0.0
    for batch in inputs:
        batch = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, batch)
        for training, names in ((False, _EVALUATION), (True, _TRAINING)):
            if training and any(notes.values()):
                continue
            with sites.watching(training=training):
                a = _attempt(first, batch, training=training)
            if isinstance(a, Exception):
                if not training:
                    raise ModelError(
                        f"the original model fails on an input of {describe_shapes(batch)}: {first_line(a)}"
                    ) from a
                notes = dict.fromkeys(_TRAINING, f"the original raises in training: {first_line(a)}")
                continue
            b = _attempt(second, batch, training=training)
            if isinstance(b, Exception):
                notes |= dict.fromkeys(names, f"the converted model raises: {first_line(b)}")
                errors, absolute = dict.fromkeys(names, float("inf")), float("inf")
            else:
                errors, absolute = _errors(a, b, names)
            response: dict[str, float] = {}
            if max(errors.values()) > limit:
                nudged = _attempt(first, _nudged(batch), training=training)
                response = {} if isinstance(nudged, Exception) else _errors(a, nudged, names)[0]
            for name, error in errors.items():
                worst[name].update(error, limit, response.get(name))
            max_abs_error = max(max_abs_error, absolute)
    checks = tuple(_check(name, worst[name], notes.get(name, "")) for name in worst)
    return Verification(
        passed=all(check.passed is not False for check in checks) and any(check.passed for check in checks),
        tolerance=limit,
        loosened=limit > LAW_TOLERANCE,
        inputs="; ".join(describe_shapes(batch) for batch in inputs),
        checks=checks,
        sites=sites.errors(),
        max_abs_error=max_abs_error,
        max_rel_error=max((check.error for check in checks if check.error is not None), default=0.0),
        fp32_error=_single_precision_error(original, converted, inputs),
    )


def _as_batches(batches: Iterable[Any]) -> list[Any]:
    if isinstance(batches, Tensor | dict):
        raise ModelError(f"batches: expected a list of inputs, got one {type(batches).__name__}: pass [x]")
    inputs = list(batches)
    if not inputs:
        raise ModelError("batches: expected at least one input, got none")
    return inputs


def _in_float64(model: nn.Module) -> nn.Module:
    twin = copy_model(model)
    for place in walk_modules(twin):  # also those that are in no registry, which twin.double() does not reach
        place.module.double()
    return twin


def _training_silence(converted: nn.Module) -> str:
    """Law 1 in training speaks of batch statistics only; sites that were frozen before stay comparable."""
    other = [
        name
        for name, layer in gated_modules(converted).items()
        if layer.bn_statistics != "batch" and not (isinstance(layer, SwitchNorm) and "weight" in layer._buffers)
    ]
    return f"{len(other)} sites use running statistics in training, by choice" if other else ""


def _attempt(model: nn.Module, batch: Any, *, training: bool) -> _Pass | Exception:
    """One pass with a fixed seed; flags, buffers and gradients are put back. The model's own error is the result."""
    modules = [place.module for place in walk_modules(model)]
    with training_flags(modules, training=training), preserved_state(modules), seeded(_SEED):
        try:
            with torch.set_grad_enabled(training):
                outputs = tree_leaves(call_model(model, batch))
            gradients = _gradients(outputs, _shared_tensors(model, "_parameters")) if training else {}
            found = _shared_tensors(model, "_buffers") if training else {}
            buffers = {names: buffer.detach().clone() for names, buffer in found.items()}
        except Exception as error:  # noqa: BLE001 - whatever the model's code raises is the answer
            return error
    return _Pass([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in outputs], gradients, buffers)


def _shared_tensors(model: nn.Module, registry: str) -> dict[Names, Tensor]:
    """The parameters or buffers that an original and its conversion share, each by all its names: all but gates."""
    gates = {id(p) for layer in gated_modules(model).values() for p in (layer.mean_weight, layer.var_weight)}
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for place in walk_modules(model):
        for name, tensor in getattr(place.module, registry).items():
            if tensor is not None and id(tensor) not in gates:
                tensors[id(tensor)] = tensor
                names.setdefault(id(tensor), []).extend(join(owner, name) for owner in place.names)
    return {tuple(names[key]): tensor for key, tensor in tensors.items()}


def _gradients(outputs: list[Any], parameters: dict[Names, Tensor]) -> dict[Names, Tensor]:
    """The gradients of a fixed random projection of every output; none where nothing requires any."""
    wanted = {names: parameter for names, parameter in parameters.items() if parameter.requires_grad}
    heads = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not wanted or not heads:
        return {}
    cotangents = [torch.randn(head.shape, dtype=head.dtype).to(head.device) for head in heads]
    found = torch.autograd.grad(heads, list(wanted.values()), cotangents, allow_unused=True)
    return {names: gradient for names, gradient in zip(wanted, found, strict=True) if gradient is not None}


def _paired(a: dict[Names, Tensor], b: dict[Names, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pair tensors that have a name in common; a missing partner counts as zeros (a graph drops what is unused)."""
    by_name = {name: tensor for names, tensor in b.items() for name in names}
    partners = [next((by_name[name] for name in names if name in by_name), None) for names in a]
    return [(x, torch.zeros_like(x) if y is None else y) for x, y in zip(a.values(), partners, strict=True)]


def _as_vectors(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = ([tensor.flatten() for tensor in side] for side in zip(*pairs, strict=True))
    return torch.cat(first), torch.cat(second)


def _errors(a: _Pass, b: _Pass, names: tuple[str, ...]) -> tuple[dict[str, float], float]:
    """Relative L2 by check, the worst over tensors, and the largest absolute difference of an output."""
    pairs = list(zip(a.outputs, b.outputs, strict=True)) if len(a.outputs) == len(b.outputs) else [(0, 1)]
    errors = {names[0]: max((_distance(x, y) for x, y in pairs), default=0.0)}
    if len(names) > 1:
        gradients = _paired(a.gradients, b.gradients)
        errors["gradients"] = _distance(*_as_vectors(gradients)) if gradients else 0.0
        buffers = _paired(a.buffers, b.buffers)
        errors["running statistics"] = max((_distance(x, y) for x, y in buffers), default=0.0)
    absolute = [_absolute(x, y) for x, y in pairs]
    return errors, max(absolute, default=0.0)


def _distance(a: Any, b: Any) -> float:
    """Relative L2 of floating tensors where the reference is finite; 0 or inf for anything else, equal or not."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return 0.0 if type(a) is type(b) and a == b else float("inf")
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    finite = a.isfinite()
    difference, size = (a - b)[finite].norm().item(), a[finite].norm().item()
    if difference == 0.0:
        return 0.0
    return difference / size if size > 0 and difference == difference else float("inf")


def _absolute(a: Any, b: Any) -> float:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point() and a.shape == b.shape):
        return 0.0
    difference = (a - b)[a.isfinite()].abs()
    return difference.max().item() if difference.numel() else 0.0


def _nudged(batch: Any) -> Any:
    """The input changed by one unit in the last place."""
    return tree_map_only(Tensor, lambda t: t * (1 + torch.finfo(t.dtype).eps) if t.is_floating_point() else t, batch)


def _check(name: str, worst: _Worst, note: str) -> Check:
    passed = None if worst.error is None else worst.error <= worst.limit
    return Check(name, worst.error, worst.limit, worst.own_response, passed, note)


def _single_precision_error(original: nn.Module, converted: nn.Module, inputs: list[Any]) -> float | None:
    parameters = _shared_tensors(original, "_parameters").values()
    if not parameters or any(parameter.dtype != torch.float32 for parameter in parameters):
        return None
    passes = [[_attempt(model, batch, training=False) for batch in inputs] for model in (original, converted)]
    pairs = [(a, b) for a, b in zip(*passes, strict=True) if isinstance(a, _Pass) and isinstance(b, _Pass)]
    return max((_errors(a, b, _EVALUATION)[0][_EVALUATION[0]] for a, b in pairs), default=None)


class _SiteWatch:
    """Feeds each converted site what the original's site was fed, as it runs, so that no activation is stored."""

    def __init__(self, original: nn.Module, converted: nn.Module) -> None:
        olds, news = modules_by_name(original), modules_by_name(converted)
        self._pairs = {
            name: (olds[name], news[name])
            for name in (place.names[0] for place in walk_modules(converted))
            if name in olds and (isinstance(news[name], SwitchNorm) or is_rewritten(news[name]))
        }
        self._found: dict[bool, dict[str, float]] = {False: {}, True: {}}

    def watching(self, *, training: bool) -> Any:
        """Return a context in which the original's passes are compared site by site."""
        return hooked(self._registrations(self._found[training], training=training))

    def errors(self) -> tuple[SiteError, ...]:
        """Return the worst error of each site over all calls and batches."""
        return tuple(SiteError(n, self._found[False].get(n), self._found[True].get(n)) for n in self._pairs)

    def _registrations(self, found: dict[str, float], *, training: bool) -> Iterator[Callable[[], Any]]:
        for name, (old, new) in self._pairs.items():
            states: list[Tensor] = []
            yield _remember_random_state(old, states)
            yield _compare_call(old, new, name, found, states, training=training)


def _remember_random_state(old: nn.Module, states: list[Tensor]) -> Callable[[], Any]:
    return lambda: old.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))


def _compare_call(
    old: nn.Module, new: nn.Module, name: str, found: dict[str, float], states: list[Tensor], *, training: bool
) -> Callable[[], Any]:
    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        modules = list(new.modules())
        with torch.no_grad(), training_flags(modules, training=training), preserved_state(modules), seeded(_SEED):
            torch.set_rng_state(states.pop())
            try:
                result = tree_leaves(new.forward(*args, **kwargs))
            except Exception:  # noqa: BLE001 - the end-to-end pass reports it in words
                result = [None]
        pairs: Sequence[tuple[Any, Any]] = list(zip(tree_leaves(output), result, strict=False))
        found[name] = max(found.get(name, 0.0), *(_distance(a, b) for a, b in pairs), 0.0)

    return lambda: old.register_forward_hook(hook, with_kwargs=True)
