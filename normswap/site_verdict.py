"""What decides if whole models cannot be judged: every site alone, and that nothing else of the two models differs.

Each site is fed what the original's was fed; outputs and gradients must agree within the precision's limit, and no
site may be left that never ran.
"""

import torch
from torch import Tensor, nn

from normswap.model_comparison import ModelComparison
from normswap.site_watch import SiteError, SiteWatch
from normswap.surgery.graph_rewrite import is_rewritten
from normswap.surgery.tree import class_name, modules_by_name

_MOST_NAMED = 3


def judge_sites(comparison: ModelComparison, limit: float) -> tuple[tuple[SiteError, ...], list[str]]:
    """Compare every site alone, in all modes that run, and return the errors and what is wrong."""
    first, second = comparison.models
    watch = SiteWatch(first, second)
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
    found = [problem for problem in problems if problem]
    more = [f"{len(found) - _MOST_NAMED} more"] if len(found) > _MOST_NAMED else []
    return errors, found[:_MOST_NAMED] + more


def _problem(site: SiteError, limit: float) -> str:
    measured = {"outputs in evaluation": site.evaluation, "outputs in training": site.training}
    measured |= {"gradients": site.gradients}
    if site.evaluation is None and site.training is None:
        return f"{site.fqn} never ran"
    wrong = [f"{error:.1e} in {name}" for name, error in measured.items() if error is not None and not error <= limit]
    return f"{site.fqn} alone differs by {', '.join(wrong)} (limit {limit:.0e})" if wrong else ""


def differences_elsewhere(first: nn.Module, second: nn.Module, sites: tuple[str, ...]) -> list[str]:
    """Return what differs between two models outside their sites: modules, their classes, their tensors."""
    olds, news = modules_by_name(first), modules_by_name(second)
    inside = {id(module) for name in sites for module in news[name].modules() if name in news}
    added = [name for name, module in news.items() if name not in olds and id(module) not in inside]
    problems = [f"{name} is in the converted model only" for name in added]
    for name, old in olds.items():
        new = news.get(name)
        if name in sites:
            continue
        if new is None:
            problems.append(f"{name} is in the original only")
        elif class_name(new) != class_name(old) and not is_rewritten(new):
            problems.append(f"{name or 'the model'} is a {class_name(old)} in the original, a {class_name(new)} now")
        else:
            problems += [f"{name}.{key}".lstrip(".") + " has other values" for key in _other_tensors(old, new)]
    return problems


def _other_tensors(old: nn.Module, new: nn.Module) -> list[str]:
    pairs = [
        (key, tensor, theirs.get(key))
        for ours, theirs in ((old._parameters, new._parameters), (old._buffers, new._buffers))
        for key, tensor in ours.items()
    ]
    return [key for key, a, b in pairs if not _same_values(a, b)]


def _same_values(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a is b:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a, b)) or bool(((a == b) | (a.isnan() & b.isnan())).all())
