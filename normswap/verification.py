"""The verification: original against converted, on data, in float64 - and in float32 for the record.

Same function means: every output in evaluation and in training, the running statistics of every module after a training
step, and the gradients of all original parameters as one vector differ by a relative L2 of at most 1e-9, or at most ten
times the original's own response to a one-ulp change of its input, the largest of three. If that response is not
finite or exceeds 1e-3, every site alone has to agree instead. A model that does not run in float64 is verified in its
own precision. If the original raises, nothing is compared, and the check says so. Both models are judged on copies;
nothing is repaired. If the original's statistics are of one process, the converted model is compared with its own ones
local.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from typing import Any, Self, get_args, get_type_hints

import torch
from torch import nn

from normswap.comparison import shared
from normswap.display import printed_as
from normswap.errors import ModelError
from normswap.layers.gates import GatedModule
from normswap.model_comparison import Check, ModelComparison, all_distances
from normswap.model_pass import ModelPass, run_pass, shared_tensors
from normswap.precision import Precision, computes_below, precisions
from normswap.site_verdict import faults_of_sites, judge_sites
from normswap.site_watch import SiteError
from normswap.surgery.arguments import describe_inputs, describe_shapes, mistaken_batches, require_module, require_type
from normswap.surgery.gated import gated_modules
from normswap.surgery.own_mode import OwnFlags, own_flags
from normswap.surgery.tracing import first_line
from normswap.surgery.tree import copy_model, walk_modules
from normswap.surgery.wrapping import unwrap

__all__ = ["LAW_TOLERANCE", "Check", "Verification", "read_numbers", "verify", "verify_in_place"]

LAW_TOLERANCE = 1e-9


@printed_as("verification")
@dataclass(frozen=True, repr=False)
class Verification:
    """What `verify` found: `passed` only if something was compared and nothing failed.

    `loosened` tells that `tolerance` is wider than the default; errors are relative L2 in `precision`, `fp32_error`
    that of the outputs in evaluation in float32 (None for models of another dtype), `max_abs_error` over all outputs.
    `judged_by` is `"sites"` if the whole model could not be judged and every site was compared alone; `notes` say why,
    and what else is worth knowing.
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
    precision: str = "float64"
    judged_by: str = "whole model"
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The result in one line: the same or not, in which modes, by which rule, in which precision."""
        silent = [check.name for check in self.checks if check.passed is None]
        rule = "the whole model" if self.judged_by == "whole model" else "every site alone"
        parts = [
            "same function" if self.passed else "not the same function",
            f"judged by {rule} in {self.precision}",
            f"not judged by the whole model: {', '.join(silent)}" if silent else "",
        ]
        return "; ".join(part for part in parts if part)

    def __repr__(self) -> str:
        failed = [check.name for check in self.checks if check.passed is False]
        verdict = "passed" if self.passed else f"failed: {', '.join(failed) or 'nothing was compared'}"
        return f"Verification({verdict}, max_rel_error={self.max_rel_error:.1e}, inputs={self.inputs!r:.80})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers; infinity and NaN, which JSON lacks, as strings."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return what `to_dict` came from, or an older version of it."""
        checks = tuple(Check(**read_numbers(Check, check)) for check in data["checks"])
        sites = tuple(SiteError(**read_numbers(SiteError, site)) for site in data["sites"])
        notes = tuple(data.get("notes", ()))
        return cls(**{**read_numbers(cls, data), "checks": checks, "sites": sites, "notes": notes})


_NO_JSON = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not isfinite(value):
        return next(name for name, number in _NO_JSON.items() if repr(number) == repr(value))
    return value


def read_numbers(record: type, data: dict[str, Any]) -> dict[str, Any]:
    """Return plain data of a record with numbers in place of the strings that stand for them in JSON."""
    hints = get_type_hints(record)
    floats = {f.name for f in fields(record) if float in (hints[f.name], *get_args(hints[f.name]))}
    return {
        name: _NO_JSON[value] if name in floats and isinstance(value, str) and value in _NO_JSON else value
        for name, value in data.items()
    }


def verify(
    original: nn.Module, converted: nn.Module, batches: Iterable[Any], *, tolerance: float | None = None
) -> Verification:
    """Compare two models on data, end to end and site by site, in evaluation and in training.

    Args:
        original, converted: two models that should compute the same, the reference first. Both are left as they are;
            of wrapped ones the models inside are compared.
        batches: an iterable of inputs, each a tensor, a tuple of positional or a dict of keyword arguments; `[x]` for a
            single one.
        tolerance: the largest relative L2 error that passes. Default 1e-9 in float64; a wider one is reported as
            loosened.

    Returns:
        A `Verification`: `.passed`, `.checks` with errors and limits, `.sites`, and the precision: models that do not
        run in float64 are compared in their own. `print(result)` shows a table.

    Raises:
        ModelError: `batches` holds no inputs, or the original fails on them in evaluation, or returns nothing that can
            be compared.
        ArgumentError: a model is no module, or `tolerance` no number.

    Examples:
        >>> import torch, normswap
        >>> model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)), torch.randn(2, 3, 16, 16)
        >>> normswap.verify(model, normswap.convert(model, x).model, [x]).passed
        True
    """
    require_type(tolerance, float | int | None, "tolerance", "a relative error such as 1e-9")
    original = unwrap(require_module(original, "original"))
    converted = unwrap(require_module(converted, "converted"))
    before = [(place.module, place.module.training) for m in (original, converted) for place in walk_modules(m)]
    flags = own_flags(original), own_flags(converted)
    first = copy_model(original)
    second = copy_model(converted, _same_parameters(original, converted, first))
    try:
        return verify_in_place(first, second, batches, tolerance=tolerance, flags=flags)
    finally:
        for module, flag in before:  # a `train()` of a single object may reach that object through its copy
            if module.training != flag:
                module.training = flag


def verify_in_place(
    first: nn.Module,
    second: nn.Module,
    batches: Iterable[Any],
    *,
    tolerance: float | None = None,
    flags: tuple[OwnFlags | None, OwnFlags | None] | None = None,
) -> Verification:
    """Compare as `verify` two models that nobody needs any more: they end in float64, and no copy is made of them.

    Args:
        flags: what `own_flags` returns for the models that these are copies of; default is to ask these.
    """
    inputs = _as_batches(batches)
    flags = flags or (own_flags(first), own_flags(second))
    single_precision_error = _single_precision_error(first, second, inputs)
    _localize(first, second)
    attempts = precisions(first)
    widest: tuple[ModelComparison, Verification] | None = None
    notes: list[str] = []
    for precision in attempts:
        last = precision is attempts[-1]
        undo = precision.apply((first, second))
        limit = precision.limit if tolerance is None else tolerance
        comparison = ModelComparison(
            first, second, precision.cast(inputs), limit=limit, precision=precision, flags=flags
        )
        comparison.compare()
        if False not in comparison.raised:
            result = _result(comparison, precision, notes, single_precision_error)
            below = not result.passed and not last and computes_below(first, comparison.inputs[0], precision.dtype)
            if not comparison.raised and not below:
                return result
            widest = widest or (comparison, result)
            if below:
                notes.append(f"the original computes a part in less than {precision.name} by its own code")
        for error, _ in comparison.raised.values():
            notes.append(f"the original does not run in {precision.name}: {first_line(error)}")
        if not last:
            undo()
    if widest is None:
        error, batch = comparison.raised[False]
        raise ModelError(
            f"the original model fails on an input of {describe_inputs(batch)}: {first_line(error)}"
        ) from error
    # It raises in training as the user runs it: what is said of that is of that run.
    return replace(widest[1], checks=widest[0].checks(comparison.raised))


def _result(
    comparison: ModelComparison, precision: Precision, notes: list[str], fp32_error: float | None
) -> Verification:
    """What a comparison found; if some of it cannot be judged by whole models, every site is compared alone."""
    if not comparison.returns_something:
        raise ModelError(
            f"the original model returns no tensor and no number on an input of {_shapes(comparison)}: nothing can be "
            "compared; verify a model that returns its result"
        )
    checks, sites = comparison.checks(), comparison.site_watch.errors()
    passed = all(check.passed is not False for check in checks)
    notes = [*notes, *comparison.training.notes]
    if comparison.is_judged:
        faults, remarks = faults_of_sites(comparison)
        passed = passed and any(check.passed for check in checks) and not faults
        notes += [*faults, *remarks]
    else:
        limit = comparison.site_limit
        sites, problems = judge_sites(comparison)
        passed = passed and not problems
        found = (
            f"not all can be judged so: {'; '.join(problems)}"
            if problems
            else f"all {len(sites)} are within {limit:.0e}"
        )
        notes.append(f"the whole model is not judged: every site alone, on the inputs it received: {found}")
    return Verification(
        passed=passed,
        tolerance=comparison.limit,
        loosened=comparison.limit > precision.limit,
        inputs=_shapes(comparison),
        checks=checks,
        sites=sites,
        max_abs_error=comparison.largest_difference,
        max_rel_error=max((check.error for check in checks if check.error is not None), default=0.0),
        fp32_error=fp32_error,
        precision=precision.name,
        judged_by="whole model" if comparison.is_judged else "sites",
        notes=tuple(notes),
    )


def _shapes(comparison: ModelComparison) -> str:
    return "; ".join(describe_shapes(batch) for batch in comparison.inputs)


def _as_batches(batches: Iterable[Any]) -> list[Any]:
    if problem := mistaken_batches(batches):
        raise ModelError(f"batches: {problem}")
    inputs = list(batches)
    if not inputs:
        raise ModelError("batches: expected at least one input, got none")
    return inputs


def _same_parameters(original: nn.Module, converted: nn.Module, first: nn.Module) -> dict[int, Any]:
    """By the id of a parameter of `converted`, that of `first` with the same values: large models have to fit twice."""
    olds, news, firsts = (shared_tensors(model, "_parameters") for model in (original, converted, first))
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


def _single_precision_error(first: nn.Module, second: nn.Module, inputs: list[Any]) -> float | None:
    """How far outputs in evaluation are apart in float32, for the record."""
    parameters = shared_tensors(first, "_parameters").values()
    if not parameters or any(parameter.dtype != torch.float32 for parameter in parameters):
        return None
    passes = [[run_pass(model, batch, training=False) for batch in inputs] for model in (first, second)]
    pairs = [(a, b) for a, b in zip(*passes, strict=True) if isinstance(a, ModelPass) and isinstance(b, ModelPass)]
    return max((e for a, b in pairs for e in all_distances(a.leaves, b.leaves).values()), default=None)
