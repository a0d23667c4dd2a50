"""Guarantee 4: each norm of a model is swapped or skipped once, with a reason."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import normswap
from normswap.surgery.plan import SwapPlan
from tests.helpers.guarantees.walking import call, paths, set_mode


def accounted_for(model: nn.Module, plan: SwapPlan, inputs: Any, norms: Any = None) -> None:
    """Guarantee 4: each site is swapped or skipped once, each skip has a reason, and every norm has a site."""
    options = {} if norms is None else {"norms": norms}
    sites = normswap.find_norm_sites(model, inputs, **options)
    decided = Counter(decision.fqn for decision in (*plan.swaps, *plan.skips))
    assert decided == Counter(site.fqn for site in sites), f"guarantee 4: {decided} for {[site.fqn for site in sites]}"
    assert max(decided.values(), default=1) == 1, f"guarantee 4: {decided.most_common(1)} is decided twice"
    for skip in plan.skips:
        assert len(skip.reason) > 10, f"guarantee 4: the reason of {skip.fqn} is {skip.reason!r}"
    places = paths(model)
    known = {id(places[name]) for site in sites for name in (site.fqn, *site.aliases, site.owner) if name in places}
    for path, module in places.items():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            assert id(module) in known, f"guarantee 4: {path} is nowhere"


class _Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += "batch_norm" in func.name() or "group_norm" in func.name()
        return func(*args, **(kwargs or {}))


def norm_calls(model: nn.Module, inputs: Any, mode: str) -> int:
    """How many batch, instance and group norms of torch's own run in one pass, whoever calls them."""
    model = copy.deepcopy(model)
    set_mode(model, mode)
    with _Count() as count, torch.no_grad():
        call(model, inputs)
    return count.calls
