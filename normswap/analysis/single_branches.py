"""Converted sites forced to one branch: what each does to the outputs, and which sites fit into a budget together.

Nothing is trained and no labels are used. The reference is the network as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normswap.layers.gated_module import FunctionalSwitchNorm, GatedModule
from normswap.layers.gating import BRANCHES, Branch
from normswap.surgery.importance import gate_parameters, gated_modules, set_importance
from normswap.surgery.model_outputs import Leaves
from normswap.surgery.selection import SiteSettings
from normswap.verification.distance import OutputDistance, run_model


@dataclass(frozen=True)
class BranchError:
    """What a site that has all weight on one branch does to the outputs of the network.

    Attributes:
        branch: the branch.
        relative_error: the relative L2 error of all outputs.
        top1_agreement: the share, from 0 to 1, of predictions that stay; None if the outputs are no predictions.
    """

    branch: Branch
    relative_error: float
    top1_agreement: float | None


@dataclass(frozen=True)
class ConvertedSite:
    """One converted site, and what forcing it to each of its branches does.

    Attributes:
        fqn: the name of the site.
        single: the branch that has all weight already; None if branches are mixed.
        branches: the errors, the smallest first.
    """

    fqn: str
    single: Branch | None
    branches: tuple[BranchError, ...]

    @property
    def best(self) -> BranchError:
        """The branch with the smallest error."""
        return self.branches[0]


@dataclass(frozen=True)
class SingleBranchPlan:
    """Sites that are forced to one branch, and the error of all of them together, which is measured.

    Attributes:
        branches: the branch of each site by fqn. `normswap.set_importance(model, plan.branches)` applies the plan.
        relative_error: the relative L2 error of the outputs with all these sites forced.
        top1_agreement: the share, from 0 to 1, of predictions that stay; None if the outputs are no predictions.
        budget: the largest error that was allowed; None: all sites are forced.
        settings: the plan as `settings` of `convert`, which give the original network these sites with one branch each.
            A site that was an InstanceNorm or a GroupNorm and is at another branch is left out: it cannot start there.
        measurements: the number of times that the network was measured on all data.
    """

    branches: Mapping[str, Branch]
    relative_error: float
    top1_agreement: float | None
    budget: float | None
    settings: Mapping[str, SiteSettings]
    measurements: int


class BranchMeter:
    """Measures a network with sites forced to single branches; the caller restores the gates.

    Args:
        model: without wrappers, in evaluation.
        batches: inputs, moved to their device.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self.layers: dict[str, GatedModule] = gated_modules(model)
        self.measurements = 0
        self._model, self._batches = model, batches
        self._references: list[Leaves] = [run_model(model, batch) for batch in batches] if self.layers else []
        self._gates = {name: gate.detach().clone() for name, gate in gate_parameters(model).items()}

    def measure(self, branches: Mapping[str, Branch]) -> OutputDistance:
        """Return the distance of the outputs with some sites at one branch and all others as they were."""
        self._restore()
        set_importance(self._model, branches)
        self.measurements += 1
        found = OutputDistance()
        for batch, reference in zip(self._batches, self._references, strict=True):
            found.add(reference, run_model(self._model, batch), batch)
        return found

    def _restore(self) -> None:
        with torch.no_grad():
            for name, gate in gate_parameters(self._model).items():
                gate.copy_(self._gates[name])


def rank_sites(meter: BranchMeter, on_site: Callable[[int, int], None]) -> tuple[ConvertedSite, ...]:
    """Return the sites, the one that is forced most cheaply first."""
    sites = []
    for number, (name, layer) in enumerate(meter.layers.items()):
        on_site(number, len(meter.layers))
        single = next((branch for branch in layer.branches if layer.is_at(branch)), None)
        errors = [_measure_branch(meter, name, branch, single) for branch in layer.branches]
        sites.append(ConvertedSite(name, single, tuple(sorted(errors, key=_cost))))
    on_site(len(meter.layers), len(meter.layers))
    return tuple(sorted(sites, key=lambda site: site.best.relative_error))


def _cost(error: BranchError) -> tuple[float, int]:
    """The error; of equal ones `bn` is first, which can be folded into the layer before it, and `in` last."""
    return error.relative_error, len(BRANCHES) - 1 - BRANCHES.index(error.branch)


def _measure_branch(meter: BranchMeter, name: str, branch: Branch, single: Branch | None) -> BranchError:
    found = meter.measure({name: branch})
    return BranchError(branch, 0.0 if branch == single else found.relative_error, found.top1_agreement)


def choose_branches(meter: BranchMeter, sites: Sequence[ConvertedSite], budget: float | None) -> SingleBranchPlan:
    """Return as many sites as fit into a budget together, each at one branch; without a budget all, at their best.

    Greedy: sites are taken in the order of their errors. Errors of several sites do not add up, so the network is
    measured with all that were taken. As long as that succeeds, twice as many are tried at once, otherwise half as
    many, down to one, which is then left out or tried at its next branch.
    """
    if budget is None:
        return _plan(meter, {site.fqn: site.best.branch for site in sites}, budget)
    chosen = {site.fqn: site.single for site in sites if site.single is not None}
    candidates = [(*_cost(error), site.fqn, error.branch) for site in sites for error in site.branches]
    queue = [(name, branch) for error, _, name, branch in sorted(candidates) if error <= budget]
    count = 1
    while queue := [(name, branch) for name, branch in queue if name not in chosen]:
        trial = chosen | dict(reversed(queue[:count]))  # of two branches of a site the first
        if meter.measure(trial).relative_error <= budget:
            chosen, count = trial, 2 * count
        elif count > 1:
            count //= 2
        else:
            queue = queue[1:]
    return _plan(meter, chosen, budget)


def _plan(meter: BranchMeter, chosen: Mapping[str, Branch], budget: float | None) -> SingleBranchPlan:
    found = meter.measure(chosen)
    branches = {name: chosen[name] for name in meter.layers if name in chosen}
    settings = {name: _site_settings(meter.layers[name], branch) for name, branch in branches.items()}
    known = {name: values for name, values in settings.items() if values is not None}
    return SingleBranchPlan(branches, found.relative_error, found.top1_agreement, budget, known, meter.measurements)


def _site_settings(layer: GatedModule, branch: Branch) -> SiteSettings | None:
    """The settings with which a conversion starts a site at one branch; None if it cannot start there."""
    if branch == "bn" or (not _was_batch_norm(layer) and branch == layer.vertex):
        return {"train_gates": False}  # a Batch Normalization with one branch would not be converted
    if not _was_batch_norm(layer):
        return None
    if branch == "in":
        return {"branches": ["in"], "start": "uniform"}
    if layer.num_groups > 1:
        return {"branches": ["ln"], "start": "gn", "num_groups": layer.num_groups}
    return {"branches": ["ln"], "start": "ln"}


def _was_batch_norm(layer: GatedModule) -> bool:
    """Whether a layer replaced a Batch Normalization, also if it started without `bn`."""
    replaced = getattr(layer, "replaced", None)
    if isinstance(layer, FunctionalSwitchNorm) or replaced is None:
        return layer.vertex == "bn" or "batch_norm" in getattr(layer, "replaced_call", "")
    return layer.vertex == "bn" or bool(replaced.dropped)
