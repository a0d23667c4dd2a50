"""Converted sites forced to one branch: what each does to the outputs, and which sites fit into a budget together.

Nothing is trained and no labels are used. The reference is the network as it is.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normswap.layers.gated_module import GatedModule
from normswap.layers.gating import Branch
from normswap.surgery.importance import gate_parameters, gated_modules, set_importance
from normswap.surgery.model_outputs import Leaves
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
        measurements: the number of times that the network was measured on all data.
    """

    branches: Mapping[str, Branch]
    relative_error: float
    top1_agreement: float | None
    budget: float | None
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
        sites.append(ConvertedSite(name, single, tuple(sorted(errors, key=lambda error: error.relative_error))))
    on_site(len(meter.layers), len(meter.layers))
    return tuple(sorted(sites, key=lambda site: site.best.relative_error))


def _measure_branch(meter: BranchMeter, name: str, branch: Branch, single: Branch | None) -> BranchError:
    found = meter.measure({name: branch})
    return BranchError(branch, 0.0 if branch == single else found.relative_error, found.top1_agreement)


def choose_branches(meter: BranchMeter, sites: Sequence[ConvertedSite], budget: float | None) -> SingleBranchPlan:
    """Return as many sites as fit into a budget together, each at one branch; without a budget all, at their best.

    Greedy: the site that adds least is taken next. Errors of several sites are not sums, so each candidate is measured
    again together with the sites that were taken before it counts, and it is taken if it is still the best.
    """
    if budget is None:
        chosen = {site.fqn: site.best.branch for site in sites}
        return _plan(meter, chosen, budget)
    chosen = {site.fqn: site.single for site in sites if site.single is not None}
    queue = [(error, name, branch, 0) for error, name, branch in _candidates(sites) if name not in chosen]
    heapq.heapify(queue)
    taken = 0
    while queue:
        error, name, branch, measured_with = heapq.heappop(queue)
        if name in chosen or error > budget:
            continue
        if measured_with < taken:
            error = meter.measure({**chosen, name: branch}).relative_error
            if error > budget:
                continue
            if queue and error > queue[0][0]:
                heapq.heappush(queue, (error, name, branch, taken))
                continue
        chosen[name] = branch
        taken += 1
    return _plan(meter, chosen, budget)


def _candidates(sites: Sequence[ConvertedSite]) -> Iterator[tuple[float, str, Branch]]:
    return ((error.relative_error, site.fqn, error.branch) for site in sites for error in site.branches)


def _plan(meter: BranchMeter, chosen: dict[str, Branch], budget: float | None) -> SingleBranchPlan:
    found = meter.measure(chosen)
    return SingleBranchPlan(chosen, found.relative_error, found.top1_agreement, budget, meter.measurements)
