"""bake: plain or compact layers in place of SN layers, and Batch Normalization folded into the layers before it.

The rules decide for one layer each. A bake plan is what they decided; applied to a network without its weights, it
gives the structure that a file is loaded into.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from torch import fx, nn

from normswap.baking.bake_plan import BakedSite, BakePlan, Result
from normswap.baking.compact_norm import CompactNorm, read_site_weights
from normswap.baking.measurement import measure_bake
from normswap.baking.rules.batch_norm import become_batch_norm, matches_batch_norm
from normswap.baking.rules.compact import become_compact, matches_compact
from normswap.baking.rules.folding import can_prepare_fold, find_foldable, fold_norm, prepare_fold
from normswap.baking.rules.group_norm import become_group_norm, matches_group_norm
from normswap.baking.rules.instance_norm import become_instance_norm, matches_instance_norm
from normswap.errors import ArgumentError, PlanError
from normswap.layers.gated_module import GatedModule
from normswap.layers.gating import BRANCHES
from normswap.layers.in_place import restore_buffers
from normswap.layers.switch_norm import SwitchNorm
from normswap.model_state import rollback_on_error
from normswap.surgery.arguments import require_module, require_type
from normswap.surgery.discovery.sites import find_norm_sites
from normswap.surgery.discovery.whole_model import Shape
from normswap.surgery.graphs.tracing import trace_model
from normswap.surgery.importance import SiteWeights, decided_branch, gated_modules
from normswap.surgery.module_tree import class_name, copy_model, modules_by_name, walk_modules
from normswap.surgery.norms.classes import read_norm
from normswap.surgery.wrappers import check_wrapping, rewrap, unwrap
from normswap.text import printable_as


class _Rule(NamedTuple):
    """What a layer becomes: the check by importance weights, and the replacement in place."""

    result: Result
    matches: Callable[[SwitchNorm, SiteWeights], bool]
    become: Callable[[SwitchNorm, SiteWeights], None]


# The first one that matches is used.
_RULES = (
    _Rule("batch norm", matches_batch_norm, become_batch_norm),
    _Rule("group norm", matches_group_norm, become_group_norm),
    _Rule("instance norm", matches_instance_norm, become_instance_norm),
    _Rule("compact", matches_compact, become_compact),
)
_DEPENDS_ON_BATCH = (
    "its `bn` branch has weight and no running statistics, so it depends on the batch: it keeps its gates"
)
_FUNCTIONAL = "the gates of a call of a function stay: the call would use batch statistics in training"
_VARYING = "it is called with one spatial position and with several, where `in` has another weight: it keeps its gates"


@printable_as("baked")
class Baked(NamedTuple):
    """The result of `bake`; `print` shows its plan.

    Attributes:
        model: the baked model.
        plan: what each site became, with the measured error and time if example inputs were given.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> normswap.bake(normswap.convert(model).model)
        Baked(Sequential, 1 site: 1 batch norm)
    """

    model: nn.Module
    plan: BakePlan

    def __repr__(self) -> str:
        return f"Baked({type(self.model).__name__}, {repr(self.plan)[len('BakePlan(') : -1]})"


Baked.__module__ = "normswap"  # not in the body, which a NamedTuple keeps for its fields


def bake(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    tolerance: float = 0.0,
    fold: bool = False,
    inplace: bool = False,
) -> Baked:
    """Replace SN layers by layers with fixed importance weights, which need less time and no normswap.

    A layer with all weight on one branch becomes the plain norm: BatchNorm, GroupNorm or InstanceNorm, with its
    matching constants in weight and bias. Any other layer becomes a compact one without gates. A BatchNorm that used
    running statistics in training keeps them: its `train()` leaves it in evaluation.

    Args:
        model: a converted model, with or without wrappers.
        example_inputs: a tensor (N, C, ...), a tuple of positional or a dict of keyword arguments for one forward pass.
            Recommended: error and time are measured on them, and layers with one spatial position get the weights that
            they use there.
        tolerance: a branch whose importance weights are at least 1 - tolerance, for means and variances, gets all
            weight. The default 0 changes the function by rounding only.
        fold: fold each BatchNorm, also one that was not converted, into the convolution or linear layer before it if
            that is exact. It can then no longer be trained as a norm.
        inplace: bake the module objects themselves instead of a deep copy.

    Returns:
        `Baked(model, plan)`.

    Raises:
        ArgumentError: an argument is of a wrong type, or `tolerance` is not from 0 to 0.5.
        ModelError: the forward pass on `example_inputs` failed.
        SwapError: a wrapper of the model can neither stay nor be built again.

    Examples:
        >>> import torch, normswap
        >>> model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)), torch.randn(2, 3, 16, 16)
        >>> baked = normswap.bake(normswap.convert(model, x).model, x, fold=True)
        >>> baked.model
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
        >>> torch.allclose(baked.model(x), model.eval()(x), atol=1e-5)
        True
    """
    require_module(model)
    for name, flag in (("fold", fold), ("inplace", inplace)):
        require_type(flag, bool, name, "True or False")
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < 0.5:
        raise ArgumentError(f"tolerance: expected a number from 0 to below 0.5, got {tolerance!r}")
    check_wrapping(model, inplace=inplace, rebuilt=not inplace, verb="bake")
    inside = unwrap(model)
    shapes = {} if example_inputs is None else _observed_shapes(inside, example_inputs)
    reference = copy_model(inside) if inplace and example_inputs is not None else inside
    target = inside if inplace else copy_model(inside)
    with rollback_on_error(entry.module for entry in walk_modules(target)):
        sites = [_bake_site(name, layer, tolerance, shapes.get(name)) for name, layer in gated_modules(target).items()]
        if fold:
            sites = _fold_sites(target, sites, shapes)
        measurement = None if example_inputs is None else measure_bake(reference, target, example_inputs)
    return Baked(rewrap(model, target), BakePlan(tuple(sites), float(tolerance), measurement))


def apply_bake_plan(model: nn.Module, plan: BakePlan) -> None:
    """Give a converted model the structure of a baked one, in place; its weights are loaded afterwards.

    Raises:
        PlanError: the plan is that of another model.
    """
    modules = modules_by_name(model)
    rules = {rule.result: rule for rule in _RULES}
    for site in plan.sites:
        layer = modules.get(site.fqn)
        into = None if site.folded_into is None else modules.get(site.folded_into)
        if layer is None or (site.folded_into is not None and into is None):
            raise PlanError(f"the bake plan does not fit the model, which has no {site.fqn}")
        if isinstance(layer, SwitchNorm) and site.result != "kept":
            weights = SiteWeights(dict(site.mean), dict(site.var))
            rule = rules[site.result]
            if not (weights.mean.keys() | weights.var.keys() <= {*BRANCHES} and rule.matches(layer, weights)):
                raise PlanError(f"the bake plan does not fit the model: {site.fqn} cannot become a {site.result}")
            rule.become(layer, weights)
        if into is not None:
            if not can_prepare_fold(into, layer):
                raise PlanError(f"the bake plan does not fit the model: {site.fqn} cannot be folded")
            prepare_fold(into, layer)


def _observed_shapes(model: nn.Module, example_inputs: Any) -> dict[str, tuple[Shape, ...]]:
    """The input shapes of each module site on the example inputs, by fqn."""
    return {site.fqn: site.shapes for site in find_norm_sites(model, example_inputs) if site.shapes}


def _bake_site(name: str, layer: GatedModule, tolerance: float, shapes: tuple[Shape, ...] | None) -> BakedSite:
    """Replace one layer by the first rule that matches."""
    if not isinstance(layer, SwitchNorm):
        return BakedSite(name, "kept", class_name(layer), {}, {}, reason=_FUNCTIONAL)
    restore_buffers(layer)
    weights, reason = _fixed_weights(layer, tolerance, shapes), None
    rule = None
    if weights is None:
        weights, reason = read_site_weights(layer), _VARYING
    else:
        rule = next((rule for rule in _RULES if rule.matches(layer, weights)), None)
        reason = None if rule else _DEPENDS_ON_BATCH
    if rule is not None:
        rule.become(layer, weights)
    return BakedSite(name, rule.result if rule else "kept", class_name(layer), weights.mean, weights.var, reason=reason)


def _fixed_weights(layer: SwitchNorm, tolerance: float, shapes: tuple[Shape, ...] | None) -> SiteWeights | None:
    """The weights that a layer uses on inputs of these shapes, None if they differ between the inputs."""
    weights = read_site_weights(layer)
    has_one_position = {prod(shape[2:]) == 1 for shape in shapes or ()}
    if weights.mean.get("in") or weights.var.get("in"):
        if len(has_one_position) == 2:
            return None
        if has_one_position == {True}:
            recipient = "ln" if "ln" in layer.branches else "bn"
            weights = SiteWeights(*(_move_instance_weight(found, recipient) for found in weights))
    decided = decided_branch(weights, tolerance)
    if decided is None:
        return weights
    mean, var = ({str(each): float(each == decided) for each in layer.branches} for _ in weights)
    return SiteWeights(mean, var)


def _move_instance_weight(weights: dict[str, float], recipient: str) -> dict[str, float]:
    """The weights with that of `in` on another branch, as the layer does at one spatial position."""
    others = sum(weight for branch, weight in weights.items() if branch not in ("in", recipient))
    return {
        branch: 0.0 if branch == "in" else 1 - others if branch == recipient else weight
        for branch, weight in weights.items()
    }


def _fold_sites(model: nn.Module, sites: list[BakedSite], shapes: dict[str, tuple[Shape, ...]]) -> list[BakedSite]:
    """Fold every BN that can be folded; return all sites, also BN that was not converted."""
    by_name = {site.fqn: site for site in sites}
    norms = {
        entry.names[0]: entry.module
        for entry in walk_modules(model)
        if not isinstance(entry.module, (GatedModule, CompactNorm))
        and (spec := read_norm(entry.module)) is not None
        and spec.kind in ("bn", "frozen bn")
    }
    graph, problem = _evaluation_graph(model)
    modules = modules_by_name(model)
    result = []
    for name in dict.fromkeys((*by_name, *norms)):
        site = by_name.get(name) or BakedSite(name, "batch norm", class_name(norms[name]), {}, {})
        if name in norms:
            into, reason = None, f"the network cannot be traced: {problem}"
            if graph is not None:
                ranks = {len(shape) for shape in shapes.get(name, ())}
                into, reason = find_foldable(graph, modules, name, input_rank=ranks.pop() if len(ranks) == 1 else None)
            if into is not None:
                fold_norm(modules[into], modules[name])
            site = BakedSite(
                name, site.result, class_name(modules[name]), site.mean, site.var, into, None if into else reason
            )
        result.append(site)
    return result


def _evaluation_graph(model: nn.Module) -> tuple[fx.Graph | None, str | None]:
    """The graph of a network in evaluation mode with norms as leaves, or None and the reason."""
    if isinstance(model, fx.GraphModule):
        return model.graph, None
    trace = trace_model(model, training=False)
    problem = trace.reason or trace.omission
    return (None, problem) if problem else (trace.graph, None)
