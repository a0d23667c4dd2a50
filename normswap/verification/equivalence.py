"""The verification: original against converted, on data, in float64 - and in float32 for the record.

Same function means: every output in evaluation and in training, the running statistics of every module after a training
step, and the gradients of all original parameters as one vector differ by a relative L2 of at most 1e-9, or at most ten
times the original's own response to a one-ulp change of its input, the largest of three. If that response is not
finite or exceeds 1e-3, every site alone has to agree instead. A model that does not run in float64 is verified in its
own precision. If the original raises, nothing is compared, and the check says so. Both models are judged on copies;
nothing is repaired. If the original's statistics are of one process, the converted model is compared with its own ones
local.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from types import BuiltinFunctionType, FunctionType
from typing import Any, Self, get_args, get_type_hints

import torch
from torch import Tensor, nn

from normswap.errors import ModelError
from normswap.layers.gated_module import GatedModule
from normswap.surgery.arguments import (
    describe_inputs,
    describe_invalid_batches,
    describe_shapes,
    require_module,
    require_type,
)
from normswap.surgery.graphs.rewriting import is_rewritten
from normswap.surgery.importance import gated_modules
from normswap.surgery.model_outputs import match_names
from normswap.surgery.module_tree import (
    ModelTrainingFlags,
    class_name,
    copy_model,
    model_training_flags,
    modules_by_name,
    walk_modules,
)
from normswap.surgery.wrappers import unwrap
from normswap.text import first_line, pluralize, printable_as
from normswap.verification.model_comparison import Check, ModelComparison, all_distances
from normswap.verification.model_pass import ModelPass, run_pass, shared_tensors
from normswap.verification.precision import Precision, precisions, uses_narrower_dtype
from normswap.verification.site_watch import SiteError

# MERGED DOC: What decides if whole models cannot be judged: every site alone, and that nothing else of the two models differs.


_MAX_LISTED = 3
_MEASURES = {
    "evaluation": "outputs in evaluation",
    "training": "outputs in training",
    "gradients": "gradients",
    "statistics": "running statistics",
}


def site_problems(comparison: ModelComparison) -> tuple[list[str], list[str]]:
    """Return what is wrong at sites if the whole models agree, and what else is worth knowing of them.

    What a site computes may not reach the outputs: it is kept in an attribute, multiplied by zero or reduced to a whole
    number, or other inputs reach it.
    """
    watch = comparison.site_watch
    not_run = [s.fqn for s in watch.errors() if s.evaluation is None and s.training is None]
    compared = [
        name
        for name in not_run
        if all(comparison.compare_on_random_input(watch, name, training=t) for t in comparison.modes)
    ]
    remarks = []
    if matching := [name for name in compared if name not in watch.wrong]:
        remarks.append(
            f"{pluralize(len(matching), 'site')} never ran and agree alone, on random input: {_join_limited(matching)}"
        )
    if others := [name for name in not_run if name not in compared]:
        remarks.append(f"{pluralize(len(others), 'site')} never ran and cannot be compared: {_join_limited(others)}")
    failures = [_describe_difference(name, errors, comparison.site_limit) for name, errors in watch.wrong.items()]
    return _limit_problems(failures), remarks


def compare_sites(comparison: ModelComparison) -> tuple[tuple[SiteError, ...], list[str]]:
    """Compare every site alone, in all modes that run, and return the errors and what is wrong."""
    first, second = comparison.models
    watch, limit = comparison.new_watch(), comparison.site_limit
    for batch in comparison.inputs:
        for training in comparison.modes:
            with comparison.watching(watch, training=training, gradients=True):
                comparison.run(0, batch, training=training)
    errors = watch.errors()
    problems = [_problem(site, limit) for site in errors]
    problems += [f"{name} cannot be compared alone" for name in watch.unpaired]
    problems += differences_outside_sites(first, second, watch.names)
    if not errors:
        problems.append("there is no converted site")
    return errors, _limit_problems([problem for problem in problems if problem])


def _limit_problems(problems: list[str]) -> list[str]:
    more = [f"{len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
    return problems[:_MAX_LISTED] + more


def _join_limited(names: list[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")


def _problem(site: SiteError, limit: float) -> str:
    if site.evaluation is None and site.training is None:
        return f"{site.fqn} never ran"
    measured = {measure: getattr(site, measure) for measure in _MEASURES}
    wrong = {measure: error for measure, error in measured.items() if error is not None and not error <= limit}
    return _describe_difference(site.fqn, wrong, limit) if wrong else ""


def _describe_difference(name: str, wrong: Mapping[Any, float], limit: float) -> str:
    found = ", ".join(f"{error:.1e} in {_MEASURES[measure]}" for measure, error in wrong.items())
    return f"{name} alone differs by {found} (limit {limit:.0e})"


def differences_outside_sites(first: nn.Module, second: nn.Module, sites: tuple[str, ...]) -> list[str]:
    """Return what differs between two models outside their sites: modules, their classes, tensors, plain attributes and
    hooks, which sites have too.
    """
    original_modules, converted_modules = modules_by_name(first), modules_by_name(second)
    inside = {id(module) for name in sites for module in converted_modules[name].modules() if name in converted_modules}
    added = [
        name for name, module in converted_modules.items() if name not in original_modules and id(module) not in inside
    ]
    problems = [f"{name} is in the converted model only" for name in added]
    for name, old in original_modules.items():
        new = converted_modules.get(name)
        if new is not None and _hooks(old) != _hooks(new):
            problems.append(f"{name or 'the model'} has other hooks")
        if name in sites:
            continue
        if new is None:
            problems.append(f"{name} is in the original only")
        elif class_name(new) != class_name(old) and not is_rewritten(new):
            problems.append(f"{name or 'the model'} is a {class_name(old)} in the original, a {class_name(new)} now")
        else:
            different = [*_different_tensors(old, new), *([] if is_rewritten(new) else _different_attributes(old, new))]
            problems += [f"{name}.{key}".lstrip(".") + " has other values" for key in different]
    return problems


def _hooks(module: nn.Module) -> list[tuple[str, str]]:
    """What is called around a module, by name: a copy of a model has copies of methods."""
    registries = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    found = [(registry, hook) for registry in registries for hook in (getattr(module, registry, None) or {}).values()]
    return [(registry, getattr(hook, "__qualname__", type(hook).__qualname__)) for registry, hook in found]


def _different_attributes(old: nn.Module, new: nn.Module) -> list[str]:
    original_values, converted_values = vars(old), vars(new)
    plain = [name for name, value in original_values.items() if name != "training" and _is_plain(value)]
    return [
        n
        for n in plain
        if type(original_values[n]) is not type(converted_values.get(n))
        or not _same_plain(original_values[n], converted_values[n])
    ]


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, text, dtype or function, which code computes with, or a tuple of those."""
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | FunctionType | BuiltinFunctionType | torch.dtype)


def _same_plain(a: Any, b: Any) -> bool:
    return bool(a == b or a != a)


def _different_tensors(old: nn.Module, new: nn.Module) -> list[str]:
    pairs = [
        (key, tensor, converted_values.get(key))
        for original_values, converted_values in ((old._parameters, new._parameters), (old._buffers, new._buffers))
        for key, tensor in original_values.items()
    ]
    return [key for key, a, b in pairs if not _same_values(a, b) or _requires_grad(a) != _requires_grad(b)]


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _same_values(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a is b:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a, b)) or bool(((a == b) | (a.isnan() & b.isnan())).all())


__all__ = ["DEFAULT_TOLERANCE", "Check", "Verification", "parse_floats", "verify", "verify_in_place"]

DEFAULT_TOLERANCE = 1e-9


@printable_as("verification")
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
        not_judged = [check.name for check in self.checks if check.passed is None]
        rule = "the whole model" if self.judged_by == "whole model" else "every site alone"
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
        """Return plain lists, dicts, strings and numbers; infinity and NaN, which JSON lacks, as strings."""
        return {name: _to_plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return what `to_dict` came from, or an older version of it."""
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
    """Return plain data of a record with numbers in place of the strings that stand for them in JSON."""
    hints = get_type_hints(record)
    floats = {f.name for f in fields(record) if float in (hints[f.name], *get_args(hints[f.name]))}
    return {
        name: _NON_JSON_FLOATS[value]
        if name in floats and isinstance(value, str) and value in _NON_JSON_FLOATS
        else value
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
    before = [(entry.module, entry.module.training) for m in (original, converted) for entry in walk_modules(m)]
    flags = model_training_flags(original), model_training_flags(converted)
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
    flags: tuple[ModelTrainingFlags | None, ModelTrainingFlags | None] | None = None,
) -> Verification:
    """Compare as `verify` two models that nobody needs any more: they end in float64, and no copy is made of them.

    Args:
        flags: what `model_training_flags` returns for the models that these are copies of; default is to ask these.
    """
    inputs = _as_batches(batches)
    flags = flags or (model_training_flags(first), model_training_flags(second))
    single_precision_error = _single_precision_error(first, second, inputs)
    _disable_synchronization(first, second)
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
            is_narrower = (
                not result.passed and not last and uses_narrower_dtype(first, comparison.inputs[0], precision.dtype)
            )
            if not comparison.raised and not is_narrower:
                return result
            widest = widest or (comparison, result)
            if is_narrower:
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
    if not comparison.has_comparable_output:
        raise ModelError(
            f"the original model returns no tensor and no number on an input of {_shapes(comparison)}: nothing can be "
            "compared; verify a model that returns its result"
        )
    checks, sites = comparison.checks(), comparison.site_watch.errors()
    passed = all(check.passed is not False for check in checks)
    notes = [*notes, *comparison.training.notes]
    if comparison.is_judged:
        failures, remarks = site_problems(comparison)
        passed = passed and any(check.passed for check in checks) and not failures
        notes += [*failures, *remarks]
    else:
        limit = comparison.site_limit
        sites, problems = compare_sites(comparison)
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
    if problem := describe_invalid_batches(batches):
        raise ModelError(f"batches: {problem}")
    inputs = list(batches)
    if not inputs:
        raise ModelError("batches: expected at least one input, got none")
    return inputs


def _same_parameters(original: nn.Module, converted: nn.Module, first: nn.Module) -> dict[int, Any]:
    """By the id of a parameter of `converted`, that of `first` with the same values: large models have to fit twice."""
    original_tensors, converted_tensors, copied_tensors = (
        shared_tensors(model, "_parameters") for model in (original, converted, first)
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
    """Let nothing in the second model wait for other processes unless something in the first does."""
    modules = [entry.module for entry in walk_modules(first)]
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
