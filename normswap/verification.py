"""The proof: original against converted, on data, in float64 - and in float32 for the record.

Law 1 (same function): every output in evaluation and in training, the running statistics of every module after a
training step, and the gradients of all original parameters as one vector differ by a relative L2 of at most 1e-9, or
at most ten times the original's own response to a one-ulp change of its input, the largest of three. Where the
original raises, or gives nothing finite, the law is silent. Both models are judged on copies; nothing is repaired.
Where the original's statistics are of one process, the converted model is held against it with its own ones local.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from normswap.comparison import Names, VectorDistance, absolute, distance, shared, worst
from normswap.display import printed_as
from normswap.errors import ModelError
from normswap.gradients import GradientDistance, KeptGradients, Receive, hand_on_gradients
from normswap.layers.gates import GatedModule
from normswap.layers.modules import SwitchNorm
from normswap.modes import call_model, preserved_state, seeded, training_flags
from normswap.site_watch import SiteError, SiteWatch
from normswap.surgery.arguments import describe_inputs, describe_shapes, mistaken_batches, require_module, require_type
from normswap.surgery.gated import gated_modules
from normswap.surgery.tracing import first_line
from normswap.surgery.tree import copy_model, join, walk_modules
from normswap.surgery.wrapping import unwrap

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


@printed_as("verification")
@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        failed = [check.name for check in self.checks if check.passed is False]
        verdict = "passed" if self.passed else f"failed: {', '.join(failed) or 'nothing was compared'}"
        return f"Verification({verdict}, max_rel_error={self.max_rel_error:.1e}, inputs={self.inputs!r:.80})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return what `to_dict` came from."""
        checks = tuple(Check(**check) for check in data["checks"])
        sites = tuple(SiteError(**site) for site in data["sites"])
        return cls(**{**data, "checks": checks, "sites": sites})


@dataclass(frozen=True)
class _Pass:
    """What one pass left: the leaves of the output; in training also buffers by all their names."""

    outputs: list[Any]
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
        original, converted: two models that should compute the same, the reference first. Both are left as they are;
            of wrapped ones the models inside are compared.
        batches: an iterable of inputs, each a tensor, a tuple of positional or a dict of keyword arguments; `[x]` for a
            single one.
        tolerance: the largest relative L2 error in float64 that passes. Default 1e-9; a wider one is reported as
            loosened.

    Returns:
        A `Verification`: `.passed`, `.checks` with errors and limits, `.sites`. `print(result)` shows a table.

    Raises:
        ModelError: `batches` holds no inputs, or the original fails on them in evaluation.
        ArgumentError: a model is no module, or `tolerance` no number.

    Example:
        >>> import torch, normswap
        >>> model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)), torch.randn(2, 3, 16, 16)
        >>> normswap.verify(model, normswap.convert(model, x).model, [x]).passed
        True
    """
    require_type(tolerance, float | int | None, "tolerance", "a relative error such as 1e-9")
    original = unwrap(require_module(original, "original"))
    converted = unwrap(require_module(converted, "converted"))
    first = copy_model(original)
    second = copy_model(converted, _same_parameters(original, converted, first))
    return verify_in_place(first, second, batches, tolerance=tolerance)


def verify_in_place(
    first: nn.Module, second: nn.Module, batches: Iterable[Any], *, tolerance: float | None = None
) -> Verification:
    """Compare as `verify` two models that nobody needs any more: they end in float64, and no copy is made of them."""
    inputs = _as_batches(batches)
    limit = LAW_TOLERANCE if tolerance is None else tolerance
    single_precision_error = _single_precision_error(first, second, inputs)
    _localize(first, second)
    for model in (first, second):
        _to_float64(model)
    found = {name: _Worst(limit=limit) for name in _EVALUATION + _TRAINING}
    notes = dict.fromkeys(_TRAINING, _training_silence(second))
    modes = [(False, _EVALUATION)] if any(notes.values()) else [(False, _EVALUATION), (True, _TRAINING)]
    sites = SiteWatch(first, second)
    max_abs_error = 0.0
    for batch in inputs:
        batch = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, batch)
        for training, names in modes:
            with KeptGradients() as kept:
                with sites.watching(training=training):
                    a = _attempt(first, batch, kept.keep, training=training)
                if isinstance(a, Exception) or not _is_finite_somewhere(a):
                    notes |= dict.fromkeys(names, _silence(a, batch, training=training))
                    continue
                gradients = GradientDistance(kept)
                b = _attempt(second, batch, gradients.meet, training=training)
                errors, far = _errors(a, b, names, gradients)
                if isinstance(b, Exception):
                    notes |= dict.fromkeys(names, f"the converted model raises: {first_line(b)}")
                response: dict[str, float] = {}
                if max(errors.values()) > limit:
                    response = _own_response(first, a, batch, names, kept, training=training)
            for name, error in errors.items():
                found[name].update(error, limit, response.get(name))
            max_abs_error = max(max_abs_error, far)
    checks = tuple(_check(name, case, notes.get(name, "")) for name, case in found.items())
    return Verification(
        passed=all(check.passed is not False for check in checks) and any(check.passed for check in checks),
        tolerance=limit,
        loosened=limit > LAW_TOLERANCE,
        inputs="; ".join(describe_shapes(batch) for batch in inputs),
        checks=checks,
        sites=sites.errors(),
        max_abs_error=max_abs_error,
        max_rel_error=max((check.error for check in checks if check.error is not None), default=0.0),
        fp32_error=single_precision_error,
    )


def _as_batches(batches: Iterable[Any]) -> list[Any]:
    if problem := mistaken_batches(batches):
        raise ModelError(f"batches: {problem}")
    inputs = list(batches)
    if not inputs:
        raise ModelError("batches: expected at least one input, got none")
    return inputs


def _same_parameters(original: nn.Module, converted: nn.Module, first: nn.Module) -> dict[int, Any]:
    """By the id of a parameter of `converted`, that of `first` with the same values: large models have to fit twice."""
    olds, news, firsts = (_shared_tensors(model, "_parameters") for model in (original, converted, first))
    pairs = [(olds[a], news[b], firsts[a]) for a, b in shared(olds, news) if a in firsts]
    return {
        id(new): twin
        for old, new, twin in pairs
        if old.requires_grad == new.requires_grad and old.dtype == new.dtype and torch.equal(old, new)
    }


def _localize(first: nn.Module, second: nn.Module) -> None:
    """Let nothing in the second model wait for other processes unless something in the first does."""
    modules = [place.module for place in walk_modules(first)]
    if any(isinstance(m, nn.SyncBatchNorm) or (isinstance(m, GatedModule) and m.synchronize) for m in modules):
        return
    for layer in gated_modules(second).values():
        layer.synchronize = False


def _to_float64(model: nn.Module) -> None:
    for place in walk_modules(model):  # also those that are in no registry, which model.double() does not reach
        place.module.double()


def _training_silence(converted: nn.Module) -> str:
    """Law 1 in training speaks of batch statistics only; sites that were frozen before stay comparable."""
    other = [
        name
        for name, layer in gated_modules(converted).items()
        if layer.bn_statistics != "batch" and not (isinstance(layer, SwitchNorm) and "weight" in layer._buffers)
    ]
    return f"{len(other)} sites use running statistics in training, by choice" if other else ""


def _silence(a: _Pass | Exception, batch: Any, *, training: bool) -> str:
    """Why the law has nothing to say of a pass of the original."""
    if not isinstance(a, Exception):
        return "no output of the original is finite"
    if training:
        return f"the original raises in training: {first_line(a)}"
    raise ModelError(f"the original model fails on an input of {describe_inputs(batch)}: {first_line(a)}") from a


def _is_finite_somewhere(a: _Pass) -> bool:
    floating = [leaf for leaf in a.outputs if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]
    return not floating or any(bool(leaf.isfinite().any()) for leaf in floating)


def _attempt(model: nn.Module, batch: Any, receive: Receive | None, *, training: bool) -> _Pass | Exception:
    """One pass with a fixed seed, gradients handed on; state and flags are put back. The model's own error is the
    result.
    """
    modules = [place.module for place in walk_modules(model)]
    with preserved_state(modules), training_flags(modules, training=training), seeded(_SEED):
        try:
            with torch.set_grad_enabled(training):
                outputs = tree_leaves(call_model(model, batch))
            # Before the backward pass, in which activation checkpointing has BN record its batch a second time.
            found = _shared_tensors(model, "_buffers") if training else {}
            buffers = {names: buffer.detach().clone() for names, buffer in found.items()}
            if training and receive:
                hand_on_gradients(outputs, _shared_tensors(model, "_parameters"), receive, seed=_SEED)
        except Exception as error:  # noqa: BLE001 - whatever the model's code raises is the answer
            return error
    return _Pass([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in outputs], buffers)


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


def _errors(
    a: _Pass, b: _Pass | Exception, names: tuple[str, ...], gradients: GradientDistance | None = None
) -> tuple[dict[str, float], float]:
    """Relative L2 by check, the worst over tensors, and the largest absolute difference of an output."""
    if isinstance(b, Exception):
        return dict.fromkeys(names, float("inf")), float("inf")
    errors = {names[0]: worst(a.outputs, b.outputs)}
    if names == _TRAINING and gradients:
        errors["gradients"] = gradients.result()
        errors["running statistics"] = _statistics_error(a.buffers, b.buffers)
    return errors, max(map(absolute, a.outputs, b.outputs), default=0.0)


def _statistics_error(references: dict[Names, Tensor], values: dict[Names, Tensor]) -> float:
    """The floating buffers of each module as one vector, the others by equality; the worst of them.

    One vector, since a running mean that is zero in truth, as behind a convolution of a normalised map, is rounding
    noise and has no relative error of its own.
    """
    vectors: dict[str, VectorDistance] = {}
    errors = [0.0]
    for names, partner in shared(references, values):
        reference, value = references[names], values[partner]
        if not reference.is_floating_point() or reference.dtype != value.dtype or reference.shape != value.shape:
            errors.append(distance(reference, value))
            continue
        vectors.setdefault(names[0].rpartition(".")[0], VectorDistance()).add(reference, value)
    return max(errors + [vector.result() for vector in vectors.values()])


def _own_response(
    model: nn.Module, a: _Pass, batch: Any, names: tuple[str, ...], kept: KeptGradients, *, training: bool
) -> dict[str, float]:
    """By check, how far a model moves at most when its input is changed by one unit in the last place.

    Changed upwards, downwards and at random: a single change says little of how much rounding a network amplifies.
    """
    response: dict[str, float] = {}
    for nudge in (_upwards, _downwards, _at_random):
        gradients = GradientDistance(kept)
        nudged = _attempt(model, tree_map_only(Tensor, nudge, batch), gradients.meet, training=training)
        if isinstance(nudged, _Pass):
            found = _errors(a, nudged, names, gradients)[0]
            response = {name: max(error, response.get(name, 0.0)) for name, error in found.items()}
    return response


def _upwards(tensor: Tensor) -> Tensor:
    return tensor * (1 + torch.finfo(tensor.dtype).eps) if tensor.is_floating_point() else tensor


def _downwards(tensor: Tensor) -> Tensor:
    return tensor * (1 - torch.finfo(tensor.dtype).eps) if tensor.is_floating_point() else tensor


def _at_random(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    coins = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(_SEED)).to(tensor.device)
    return tensor * (1 + (2 * coins - 1) * torch.finfo(tensor.dtype).eps)


def _check(name: str, worst: _Worst, note: str) -> Check:
    passed = None if worst.error is None else worst.error <= worst.limit
    return Check(name, worst.error, worst.limit, worst.own_response, passed, note)


def _single_precision_error(first: nn.Module, second: nn.Module, inputs: list[Any]) -> float | None:
    parameters = _shared_tensors(first, "_parameters").values()
    if not parameters or any(parameter.dtype != torch.float32 for parameter in parameters):
        return None
    passes = [[_attempt(model, batch, None, training=False) for batch in inputs] for model in (first, second)]
    pairs = [(a, b) for a, b in zip(*passes, strict=True) if isinstance(a, _Pass) and isinstance(b, _Pass)]
    return max((_errors(a, b, _EVALUATION)[0][_EVALUATION[0]] for a, b in pairs), default=None)
