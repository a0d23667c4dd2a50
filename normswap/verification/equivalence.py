"""Verify that a converted model computes the same function as the original: `verify` and its result.

Both models run on the same data, in float64 if their code allows it, otherwise in their own precision. In training, the
norms of the original at sites with `bn_statistics="running"` are in evaluation (frozen), as the converted site uses its
running statistics as constants; everything else trains, and at other sites the original's norms do too. Four checks
must pass, each with a relative L2 error of at most 1e-9 in float64, or of at most ten times the original's own
response to a one-ulp change of its input: the outputs in evaluation, the outputs in training, the running statistics of
every module after a training step, and the gradients of all original parameters as one vector. If that response is not
finite or exceeds 1e-3, each site is compared alone instead. If the original model raises, the check is skipped.

`verify` works on copies and changes nothing. If the original takes its batch from one process only, synchronized
layers of the converted model do so too during the comparison.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from typing import Any, Self, get_args, get_type_hints

import torch
from torch import nn

from normswap.errors import ArgumentError, ModelError
from normswap.layers.gated_module import GatedModule
from normswap.layers.gating import BnStatistics, check_bn_statistics
from normswap.model_state import preserved_training_flags
from normswap.surgery.arguments import (
    describe_inputs,
    describe_invalid_batches,
    describe_shapes,
    require_module,
    require_type,
)
from normswap.surgery.importance import gated_modules
from normswap.surgery.model_outputs import match_names
from normswap.surgery.module_tree import ModelTrainingFlags, copy_model, model_training_flags, walk_modules
from normswap.surgery.wrappers import unwrap
from normswap.text import first_line, pluralize, printable_as
from normswap.verification.check_progress import CheckProgress, RunningCheck
from normswap.verification.model_comparison import FP32, SITES_ALONE, ModelComparison, compare_sites, site_problems
from normswap.verification.model_pass import ModelPass, leaf_distances, run_pass, shared_tensors
from normswap.verification.precision import Check, Precision, precisions, uses_narrower_dtype
from normswap.verification.site_watch import SiteError
from normswap.verification.training_reference import TrainingReferenceName

__all__ = ["DEFAULT_TOLERANCE", "Check", "Verification", "check_tolerance", "parse_floats", "verify", "verify_in_place"]

DEFAULT_TOLERANCE = 1e-9

# --- the result -------------------------------------------------------------------------------------------------------


@printable_as("verification")
@dataclass(frozen=True, repr=False)
class Verification:
    """The result of `verify`. `print(verification)` shows it as a table.

    All errors are relative L2 errors in `precision` unless noted otherwise.

    Attributes:
        passed: whether something was compared and no check failed.
        tolerance: the largest error that passes.
        loosened: whether `tolerance` is larger than the default of the precision.
        inputs: the shapes of the inputs.
        checks: the result of each check, with its error and limit.
        sites: the errors of each site on the inputs that it received.
        max_abs_error: the largest absolute difference of all outputs.
        max_rel_error: the largest error of all checks.
        fp32_error: the error of the outputs in evaluation in float32; None for models of another dtype.
        precision: the dtype of the comparison, such as `float64`.
        judged_by: `"whole model"`, or `"sites"` if the whole model could not be judged and each site was compared
            alone.
        notes: remarks, for example the original with which training is compared, sites whose statistics were never
            updated, or why the whole model could not be judged.
        training_reference: the original with which training is compared: `"original"`, as it trains; `"frozen"`, with
            its norms in evaluation; or `"mixed"`, with those of some sites in evaluation.

    Examples:
        >>> import torch, normswap
        >>> model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)), torch.randn(2, 3, 16, 16)
        >>> verification = normswap.verify(model, normswap.convert(model, x).model, [x])
        >>> verification.passed, verification.judged_by, verification.precision
        (True, 'whole model', 'float64')
        >>> [check.name for check in verification.checks]
        ['outputs in evaluation', 'outputs in training', 'gradients', 'running statistics']
    """

    __module__ = "normswap"

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
    training_reference: TrainingReferenceName = "original"

    @property
    def summary(self) -> str:
        """The result in one line: same function or not, how it was judged, and in which precision."""
        not_judged = [check.name for check in self.checks if check.passed is None]
        rule = "the whole model" if self.judged_by == "whole model" else "each site alone"
        parts = [
            "same function" if self.passed else "not the same function",
            f"judged by {rule} in {self.precision}",
            f"not judged by the whole model: {', '.join(not_judged)}" if not_judged else "",
        ]
        return "; ".join(part for part in parts if part)

    def __repr__(self) -> str:
        failed = [check.name for check in self.checks if check.passed is False]
        verdict = "passed" if self.passed else f"failed: {', '.join(failed) or 'nothing was compared'}"
        return f"Verification({verdict}, max_rel_error={self.max_rel_error:.1e}, inputs={self.inputs!r:.80})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers; infinity and NaN become strings, because JSON lacks them."""
        return {name: _to_plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the verification that `to_dict`, also of an older version, turned into `data`."""
        checks = tuple(Check(**parse_floats(Check, check)) for check in data["checks"])
        sites = tuple(SiteError(**parse_floats(SiteError, site)) for site in data["sites"])
        notes = tuple(data.get("notes", ()))
        return cls(**{**parse_floats(cls, data), "checks": checks, "sites": sites, "notes": notes})


_NON_JSON_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def _to_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if isinstance(value, float) and not isfinite(value):
        return next(name for name, number in _NON_JSON_FLOATS.items() if repr(number) == repr(value))
    return value


def parse_floats(record: type, data: dict[str, Any]) -> dict[str, Any]:
    """Return the plain data of a dataclass with numbers in place of `"Infinity"`, `"-Infinity"` and `"NaN"`."""
    hints = get_type_hints(record)
    floats = {f.name for f in fields(record) if float in (hints[f.name], *get_args(hints[f.name]))}
    return {
        name: _NON_JSON_FLOATS[value]
        if name in floats and isinstance(value, str) and value in _NON_JSON_FLOATS
        else value
        for name, value in data.items()
    }


# --- verify -----------------------------------------------------------------------------------------------------------


def verify(
    original: nn.Module,
    converted: nn.Module,
    batches: Iterable[Any],
    *,
    tolerance: float | None = None,
    bn_statistics: BnStatistics | Mapping[str, BnStatistics] | None = None,
    progress: CheckProgress | None = None,
) -> Verification:
    """Compare two models on data, as a whole and site by site, in evaluation and in training.

    Both models are left as they are. Of a wrapped model (DataParallel, DDP, `torch.compile`), the model inside is
    compared.

    Args:
        original: the reference model.
        converted: the model that should compute the same function.
        batches: an iterable of inputs; each is a tensor, a tuple of positional arguments or a dict of keyword
            arguments. For one input, pass `[x]`.
        tolerance: the largest relative L2 error that passes. Default: 1e-9 in float64, 1e-5 in float32, 1e-2 in
            float16, 1e-1 in bfloat16. `loosened` is set if it is larger than the default.
        bn_statistics: what the sites should use in training. `"running"`: training is compared with the original
            whose norms are in evaluation (frozen), everything else in training. `"batch"`: with the original as it
            trains. A mapping has values by the name of a site. Default: what each site of `converted` uses, so the
            result tells that it does what it is set to do, and `.training_reference` tells with which original.
        progress: called with the name of each check when it begins, such as `print`; it may return a context manager
            for the check.

    Returns:
        A `Verification`: `.passed`, `.checks` with errors and limits, `.sites`, and the precision. Models that do not
        run in float64 are compared in their own precision.

    Raises:
        ModelError: `batches` is empty, the original model raises on an input in evaluation, or its output has nothing
            that can be compared.
        ArgumentError: a model is not a module, `tolerance` is no positive number, or `progress` is no function.
        LayerError: `bn_statistics` is unknown.

    Examples:
        >>> import torch, normswap
        >>> model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)), torch.randn(2, 3, 16, 16)
        >>> converted = normswap.convert(model, x, bn_statistics="running").model
        >>> verification = normswap.verify(model, converted, [x])
        >>> verification.passed, verification.training_reference
        (True, 'frozen')
        >>> normswap.verify(model, converted, [x], bn_statistics="batch").passed
        False
    """
    check_tolerance(tolerance)
    for value in bn_statistics.values() if isinstance(bn_statistics, Mapping) else filter(None, (bn_statistics,)):
        check_bn_statistics(value)
    if progress is not None and not callable(progress):
        raise ArgumentError(f"progress: expected a function of the name of a check, got {progress!r:.80}")
    original = unwrap(require_module(original, "original"))
    converted = unwrap(require_module(converted, "converted"))
    modules = [entry.module for model in (original, converted) for entry in walk_modules(model)]
    flags = model_training_flags(original), model_training_flags(converted)
    first = copy_model(original)
    second = copy_model(converted, _same_parameters(original, converted, first))
    with preserved_training_flags(modules):  # a model's own `train()` may reach the original through its copy
        return verify_in_place(
            first, second, batches, tolerance=tolerance, bn_statistics=bn_statistics, progress=progress, flags=flags
        )


def check_tolerance(tolerance: object) -> None:
    """Refuse a tolerance that is no positive number; None is the default.

    Raises:
        ArgumentError: it is something else.
    """
    require_type(tolerance, float | int | None, "tolerance", "a relative error such as 1e-9")
    if isinstance(tolerance, bool) or (tolerance is not None and not tolerance > 0):  # type: ignore[operator]
        raise ArgumentError(f"tolerance: expected a number above 0 such as 1e-9, got {tolerance!r}")


def verify_in_place(
    first: nn.Module,
    second: nn.Module,
    batches: Iterable[Any],
    *,
    tolerance: float | None = None,
    bn_statistics: BnStatistics | Mapping[str, BnStatistics] | None = None,
    progress: CheckProgress | None = None,
    flags: tuple[ModelTrainingFlags | None, ModelTrainingFlags | None] | None = None,
) -> Verification:
    """Compare two models as `verify` does, without copies: both may be in float64 afterwards.

    Args:
        first: the original model; the function may change it.
        second: the converted model; the function may change it.
        batches: as in `verify`.
        tolerance, bn_statistics, progress: as in `verify`.
        flags: the results of `model_training_flags` for the models that these are copies of; default is to call it for
            these models.
    """
    with RunningCheck(progress) as running:
        return _compare(first, second, _as_batches(batches), tolerance, bn_statistics, running, flags)


def _compare(
    first: nn.Module,
    second: nn.Module,
    inputs: list[Any],
    tolerance: float | None,
    bn_statistics: BnStatistics | Mapping[str, BnStatistics] | None,
    running: RunningCheck,
    flags: tuple[ModelTrainingFlags | None, ModelTrainingFlags | None] | None,
) -> Verification:
    flags = flags or (model_training_flags(first), model_training_flags(second))
    single_precision_error = _single_precision_error(first, second, inputs, running)
    _disable_synchronization(first, second)
    attempts = precisions(first)
    widest: tuple[ModelComparison, Verification] | None = None
    notes: list[str] = []
    for precision in attempts:
        last = precision is attempts[-1]
        undo = precision.apply((first, second))
        limit = precision.limit if tolerance is None else tolerance
        comparison = ModelComparison(
            first,
            second,
            precision.cast(inputs),
            limit=limit,
            precision=precision,
            flags=flags,
            bn_statistics=bn_statistics,
            on_check=running.begin,
        )
        comparison.compare()
        if False not in comparison.raised:
            if not comparison.is_judged:
                running.begin(SITES_ALONE)
            result = _result(comparison, precision, notes, single_precision_error)
            is_narrower = (
                not result.passed and not last and uses_narrower_dtype(first, comparison.inputs[0], precision.dtype)
            )
            if not comparison.raised and not is_narrower:
                return result
            widest = widest or (comparison, result)
            if is_narrower:
                notes.append(f"the original model's own code computes a part in a narrower type than {precision.name}")
        for error, _ in comparison.raised.values():
            notes.append(f"the original model does not run in {precision.name}: {first_line(error)}")
        if not last:
            undo()
    if widest is None:
        error, batch = comparison.raised[False]
        shape = describe_inputs(batch)
        raise ModelError(f"the original model fails on an input of {shape}: {first_line(error)}") from error
    # It raises in training in its own precision too: quote that error, which is the one that users see.
    return replace(widest[1], checks=widest[0].checks(comparison.raised))


def _result(
    comparison: ModelComparison, precision: Precision, notes: list[str], fp32_error: float | None
) -> Verification:
    """Return the result of a comparison; compare each site alone if the whole models cannot be judged."""
    if not comparison.has_comparable_output:
        raise ModelError(
            f"the original model returns no tensor and no number on an input of {_shapes(comparison)}, so nothing can "
            "be compared: verify a model that returns its result"
        )
    checks, sites = comparison.checks(), comparison.site_watch.errors()
    passed = all(check.passed is not False for check in checks)
    notes = [*notes, *comparison.reference_notes]
    if comparison.is_judged:
        failures, remarks = site_problems(comparison)
        passed = passed and any(check.passed for check in checks) and not failures
        notes += [*failures, *remarks]
    else:
        limit = comparison.site_limit
        sites, problems = compare_sites(comparison)
        passed = passed and not problems
        agreed = f"{pluralize(len(sites), 'site')} agreed within {limit:.0e}"
        found = f"not all agreed: {'; '.join(problems)}" if problems else agreed
        notes.append(
            f"the whole model is not judged; each site was compared alone on the inputs that it received: {found}"
        )
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
        training_reference=comparison.reference.name,
    )


def _shapes(comparison: ModelComparison) -> str:
    return "; ".join(describe_shapes(batch) for batch in comparison.inputs)


def _as_batches(batches: Iterable[Any]) -> list[Any]:
    if problem := describe_invalid_batches(batches):
        raise ModelError(f"batches: {problem}")
    inputs = list(batches)
    if not inputs:
        raise ModelError("batches: expected at least one input, got none")
    return inputs


def _same_parameters(original: nn.Module, converted: nn.Module, first: nn.Module) -> dict[int, Any]:
    """Return, by the id of a parameter of `converted`, the equal parameter of `first`.

    The copy of `converted` then shares them, so that two large models fit into memory.
    """
    original_tensors, converted_tensors, copied_tensors = (
        shared_tensors(walk_modules(model), "_parameters") for model in (original, converted, first)
    )
    pairs = [
        (original_tensors[a], converted_tensors[b], copied_tensors[a])
        for a, b in match_names(original_tensors, converted_tensors)
        if a in copied_tensors
    ]
    return {
        id(new): shared_parameter
        for old, new, shared_parameter in pairs
        if old.requires_grad == new.requires_grad and old.dtype == new.dtype and torch.equal(old, new)
    }


def _disable_synchronization(first: nn.Module, second: nn.Module) -> None:
    """Disable synchronization in the second model unless the first one synchronizes.

    If only one process verifies, a synchronized layer would wait for the others forever.
    """
    modules = [entry.module for entry in walk_modules(first)]
    if any(isinstance(m, nn.SyncBatchNorm) or (isinstance(m, GatedModule) and m.synchronize) for m in modules):
        return
    for layer in gated_modules(second).values():
        layer.synchronize = False


def _single_precision_error(
    first: nn.Module, second: nn.Module, inputs: list[Any], running: RunningCheck
) -> float | None:
    """Return the largest error of the outputs in evaluation in float32, None for models of another dtype."""
    parameters = shared_tensors(walk_modules(first), "_parameters").values()
    if not parameters or any(parameter.dtype != torch.float32 for parameter in parameters):
        return None
    running.begin(FP32)
    passes = [[run_pass(model, batch, training=False) for batch in inputs] for model in (first, second)]
    pairs = [(a, b) for a, b in zip(*passes, strict=True) if isinstance(a, ModelPass) and isinstance(b, ModelPass)]
    return max((e for a, b in pairs for e in leaf_distances(a.leaves, b.leaves).values()), default=None)
