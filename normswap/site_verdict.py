"""What decides if whole models cannot be judged: every site alone, and that nothing else of the two models differs.

Each site is fed what the original's was fed; outputs and gradients must agree within the precision's limit, and no
site may be left that never ran.
"""

from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from normswap.display import counted
from normswap.model_comparison import ModelComparison
from normswap.site_watch import SiteError
from normswap.surgery.graph_rewrite import is_rewritten
from normswap.surgery.tree import class_name, modules_by_name

_MOST_NAMED = 3
_MEASURES = {
    "evaluation": "outputs in evaluation",
    "training": "outputs in training",
    "gradients": "gradients",
    "statistics": "running statistics",
}


def faults_of_sites(comparison: ModelComparison) -> tuple[list[str], list[str]]:
    """Return what is wrong at sites if the whole models agree, and what else is worth knowing of them.

    What a site computes may not reach the outputs: it is kept in an attribute, multiplied by zero or reduced to a whole
    number, or other inputs reach it.
    """
    watch = comparison.site_watch
    idle = [s.fqn for s in watch.errors() if s.evaluation is None and s.training is None]
    fed = [name for name in idle if all(comparison.feed(watch, name, training=t) for t in comparison.modes)]
    remarks = []
    if same := [name for name in fed if name not in watch.wrong]:
        remarks.append(f"{counted(len(same), 'site')} never ran and agree alone, on random input: {_named(same)}")
    if others := [name for name in idle if name not in fed]:
        remarks.append(f"{counted(len(others), 'site')} never ran and cannot be compared: {_named(others)}")
    faults = [_differs(name, errors, comparison.site_limit) for name, errors in watch.wrong.items()]
    return _first(faults), remarks


def judge_sites(comparison: ModelComparison) -> tuple[tuple[SiteError, ...], list[str]]:
    """Compare every site alone, in all modes that run, and return the errors and what is wrong."""
    first, second = comparison.models
    watch, limit = comparison.new_watch(), comparison.site_limit
    for batch in comparison.inputs:
        for training in comparison.modes:
            with comparison.watching(watch, training=training, gradients=True):
                comparison.run(0, batch, training=training)
    errors = watch.errors()
    problems = [_problem(site, limit) for site in errors]
    problems += [f"{name} cannot be compared alone" for name in watch.without_pair]
    problems += differences_elsewhere(first, second, watch.names)
    if not errors:
        problems.append("there is no converted site")
    return errors, _first([problem for problem in problems if problem])


def _first(problems: list[str]) -> list[str]:
    more = [f"{len(problems) - _MOST_NAMED} more"] if len(problems) > _MOST_NAMED else []
    return problems[:_MOST_NAMED] + more


def _named(names: list[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")


def _problem(site: SiteError, limit: float) -> str:
    if site.evaluation is None and site.training is None:
        return f"{site.fqn} never ran"
    measured = {measure: getattr(site, measure) for measure in _MEASURES}
    wrong = {measure: error for measure, error in measured.items() if error is not None and not error <= limit}
    return _differs(site.fqn, wrong, limit) if wrong else ""


def _differs(name: str, wrong: Mapping[Any, float], limit: float) -> str:
    found = ", ".join(f"{error:.1e} in {_MEASURES[measure]}" for measure, error in wrong.items())
    return f"{name} alone differs by {found} (limit {limit:.0e})"


def differences_elsewhere(first: nn.Module, second: nn.Module, sites: tuple[str, ...]) -> list[str]:
    """Return what differs between two models outside their sites: modules, their classes, tensors, plain attributes and
    hooks, which sites have too.
    """
    olds, news = modules_by_name(first), modules_by_name(second)
    inside = {id(module) for name in sites for module in news[name].modules() if name in news}
    added = [name for name, module in news.items() if name not in olds and id(module) not in inside]
    problems = [f"{name} is in the converted model only" for name in added]
    for name, old in olds.items():
        new = news.get(name)
        if new is not None and _hooks(old) != _hooks(new):
            problems.append(f"{name or 'the model'} has other hooks")
        if name in sites:
            continue
        if new is None:
            problems.append(f"{name} is in the original only")
        elif class_name(new) != class_name(old) and not is_rewritten(new):
            problems.append(f"{name or 'the model'} is a {class_name(old)} in the original, a {class_name(new)} now")
        else:
            different = [*_other_tensors(old, new), *([] if is_rewritten(new) else _other_attributes(old, new))]
            problems += [f"{name}.{key}".lstrip(".") + " has other values" for key in different]
    return problems


def _hooks(module: nn.Module) -> list[tuple[str, str]]:
    """What is called around a module, by name: a copy of a model has copies of methods."""
    registries = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    found = [(registry, hook) for registry in registries for hook in (getattr(module, registry, None) or {}).values()]
    return [(registry, getattr(hook, "__qualname__", type(hook).__qualname__)) for registry, hook in found]


def _other_attributes(old: nn.Module, new: nn.Module) -> list[str]:
    ours, theirs = vars(old), vars(new)
    plain = [name for name, value in ours.items() if name != "training" and _is_plain(value)]
    return [n for n in plain if type(ours[n]) is not type(theirs.get(n)) or not _same_plain(ours[n], theirs[n])]


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, text, dtype or function, which code computes with, or a tuple of those."""
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | FunctionType | BuiltinFunctionType | torch.dtype)


def _same_plain(a: Any, b: Any) -> bool:
    return bool(a == b or a != a)


def _other_tensors(old: nn.Module, new: nn.Module) -> list[str]:
    pairs = [
        (key, tensor, theirs.get(key))
        for ours, theirs in ((old._parameters, new._parameters), (old._buffers, new._buffers))
        for key, tensor in ours.items()
    ]
    return [key for key, a, b in pairs if not _same_values(a, b) or _trains(a) != _trains(b)]


def _trains(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _same_values(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a is b:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a, b)) or bool(((a == b) | (a.isnan() & b.isnan())).all())
