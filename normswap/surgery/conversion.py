"""convert, apply_plan and revert: a plan is applied, or undone, completely or not at all.

What to swap is decided in `planning`; a change that fails leaves the model as it was.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

from torch import Tensor, fx, nn

from normswap.errors import PlanError, SwapError
from normswap.layers.functional import new_site_name
from normswap.layers.gated_module import FunctionalSwitchNorm
from normswap.layers.gating import BnStatistics, Branch, Gate
from normswap.layers.in_place import convert_module, revert_module
from normswap.layers.switch_norm import SwitchNorm
from normswap.model_state import rollback_on_error
from normswap.surgery.arguments import refuse_private, require_type
from normswap.surgery.discovery.instance_variance import match_in_branch, measure_instance_variance
from normswap.surgery.graphs.as_graph_module import to_graph_module
from normswap.surgery.graphs.module_trace import trace_module_forward
from normswap.surgery.graphs.rewriting import (
    edit_graph,
    gate_call_nodes,
    is_rewritten,
    restore_forward,
    restore_graph,
    rewrite_forward,
    unused_names,
)
from normswap.surgery.importance import gated_modules, sites_with_changed_weights
from normswap.surgery.module_tree import class_name, copy_model, modules_by_name, walk_modules
from normswap.surgery.norms.classes import KNOWN_NORMS, NormSpec, NormTable, read_norm
from normswap.surgery.norms.functions import batch_norm_nodes, call_name, call_tensors, norm_arguments
from normswap.surgery.plan import Swap, SwapPlan, list_names, require_plan
from normswap.surgery.planning import make_plan
from normswap.surgery.selection import Settings, SiteFilter, Start, SwapOptions, choose_options
from normswap.surgery.wrappers import check_not_prepared, check_wrapping, rewrap, unwrap
from normswap.text import join_fqn, pluralize, printable_as


@printable_as("conversion")
class Conversion(NamedTuple):
    """The result of `convert`; `print` shows its plan.

    Attributes:
        model: the converted model.
        plan: the plan that was applied.
        replaced: the new layers by fqn.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> conversion = normswap.convert(model, torch.randn(2, 3, 16, 16))
        >>> [*conversion.replaced]
        ['1']
    """

    model: nn.Module
    plan: SwapPlan
    replaced: dict[str, nn.Module]

    def __repr__(self) -> str:
        swaps, skips = pluralize(len(self.plan.swaps), "swap"), pluralize(len(self.plan.skips), "skip")
        return f"Conversion({type(self.model).__name__}, {swaps}, {skips})"


Conversion.__module__ = "normswap"  # not in the body, which a NamedTuple keeps for its fields


def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    plan: SwapPlan | None = None,
    options: SwapOptions | None = None,
    include: SiteFilter | Iterable[SiteFilter] | None = None,
    exclude: SiteFilter | Iterable[SiteFilter] | None = None,
    kinds: Sequence[str] | None = None,
    gate: Gate | None = None,
    branches: Sequence[Branch] | None = None,
    bn_statistics: BnStatistics | None = None,
    train_frozen_gates: bool | None = None,
    synchronize: bool | None = None,
    start: Start | None = None,
    num_groups: int | None = None,
    match: bool | None = None,
    untrained: Literal["keep", "uniform"] | None = None,
    settings: Settings | None = None,
    data: Iterable[Any] | None = None,
    norms: NormTable = KNOWN_NORMS,
    as_graph: bool = False,
    inplace: bool = False,
) -> Conversion:
    """Swap Batch Normalization, and other norms on request, for Switchable Normalization of the same function.

    In training the function is that of the original with its norms in evaluation, gradients included, and nothing
    depends on the batch; with `bn_statistics="batch"` it is that of the original in training. The other branches are
    matched to the running statistics, so that a gate that leaves `bn` hardly changes the function. With `start` the
    network loses its `bn` branches at once, and computes another function that is close to the original.

    The converted model is a deep copy. With `inplace=True` the module objects themselves are converted, so aliases,
    Python lists, hooks and optimizers that refer to modules or parameters stay valid.

    Args:
        model: any module. DataParallel, DistributedDataParallel and `torch.compile` around it stay around it, with
            their settings; all names are those of the model inside.
        example_inputs: a tensor (N, C, ...), a tuple of positional or a dict of keyword arguments for one forward pass
            in evaluation mode. Recommended, since a site with one spatial position needs other branches.
        plan: a plan of `plan_swaps` to apply; not together with `options` or the arguments from `include` to
            `settings`.
        options: a `SwapOptions`, in place of the arguments from `include` to `settings`.
        include, exclude, kinds, gate, branches, bn_statistics, train_frozen_gates, synchronize: fields of
            `SwapOptions`, which explains them; None (default) is the default there.
        start, num_groups, match, untrained, settings: the other fields of `SwapOptions`.
        data: an iterable of inputs as `example_inputs`, without labels; a few batches are enough. The matched `in`
            branches are scaled to the variance that single samples have there.
        norms: the table of norm classes: `KNOWN_NORMS`, or `KNOWN_NORMS | {TheirNorm: read_batch_norm}`.
        as_graph: return the whole converted model as a `torch.fx.GraphModule` that obeys `train()` and `eval()`.
        inplace: convert the module objects themselves instead of a deep copy.

    Returns:
        `Conversion(model, plan, replaced)`. If there is nothing to swap, the plan has no swaps and gives the reasons.

    Raises:
        PlanError: a filter matches nothing, an option is wrong, or the plan was made for another model.
        ModelError: the forward pass on `example_inputs` or `data` failed, `data` is empty, or is passed with a model
            that trains with differential privacy.
        SwapError: a wrapper of the model can neither stay nor be built again, or the model cannot be copied, rewritten
            or traced as asked.
        ArgumentError: an argument is of a wrong type, such as a state dict or a path instead of a module.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> normswap.convert(model, torch.randn(2, 3, 16, 16))
        Conversion(Sequential, 1 swap, 0 skips)
        >>> without_ln = normswap.SwapOptions(branches=("in", "bn"))
        >>> normswap.convert(model, torch.randn(2, 3, 16, 16), options=without_ln).replaced["1"].branches
        ('in', 'bn')
        >>> normswap.convert(model, torch.randn(2, 3, 16, 16), start="ln").replaced["1"].branches
        ('in', 'ln')
    """
    for name, flag in (("as_graph", as_graph), ("inplace", inplace)):
        require_type(flag, bool, name, "True or False")
    keywords = {
        "include": include,
        "exclude": exclude,
        "kinds": kinds,
        "gate": gate,
        "branches": branches,
        "bn_statistics": bn_statistics,
        "train_frozen_gates": train_frozen_gates,
        "synchronize": synchronize,
        "start": start,
        "num_groups": num_groups,
        "match": match,
        "untrained": untrained,
        "settings": settings,
    }
    chosen = choose_options(options, keywords)
    check_wrapping(model, inplace=inplace, rebuilt=as_graph or not inplace)
    inside = unwrap(model)
    if data is not None:
        refuse_private(inside, "matching would store statistics of the data in the model")
    if plan is None:
        plan = make_plan(inside, example_inputs, chosen, norms)
    elif options is not None or chosen != SwapOptions.default():
        raise PlanError("got plan= together with options for a plan (options, include, gate, ...): pass one of the two")
    target = inside if inplace else _copy(inside)
    with rollback_on_error(entry.module for entry in walk_modules(target)):
        running_vars = _running_vars(target, plan) if data is not None else {}
        replaced = apply_plan(target, plan, norms=norms)
        if data is not None:
            _match_instance_variance(target, plan, running_vars, data)
        if as_graph:
            target = to_graph_module(target, example_inputs)
        target = rewrap(model, target)
    return Conversion(target, plan, replaced)


def _running_vars(model: nn.Module, plan: SwapPlan) -> dict[str, Tensor]:
    """The running variances of the matched module sites, which a start without `bn` removes."""
    by_name = modules_by_name(model)
    modules = {swap.fqn: by_name.get(swap.fqn) for swap in plan.swaps if swap.matched and swap.owner is None}
    found = {fqn: getattr(module, "running_var", None) for fqn, module in modules.items()}
    return {fqn: tensor for fqn, tensor in found.items() if isinstance(tensor, Tensor)}


def _match_instance_variance(
    model: nn.Module, plan: SwapPlan, running_vars: dict[str, Tensor], data: Iterable[Any]
) -> None:
    """Scale the matched `in` branches to the variance of single samples in `data`."""
    layers = gated_modules(model)
    names = [swap.fqn for swap in plan.swaps if swap.matched and "in" in swap.branches and swap.fqn in layers]
    for name, found in measure_instance_variance(model, {name: layers[name] for name in names}, data).items():
        match_in_branch(layers[name], found, running_vars.get(name))


def apply_plan(model: nn.Module, plan: SwapPlan, *, norms: NormTable = KNOWN_NORMS) -> dict[str, nn.Module]:
    """Apply `plan` to `model` itself, completely or not at all.

    Args:
        model: the model for which the plan was made; it is changed.
        plan: what `plan_swaps` or `SwapPlan.from_json` returned.
        norms: the table of norm classes with which the plan was made.

    Returns:
        The new layers by fqn.

    Raises:
        PlanError: the plan was made for another model; the model is unchanged.
        SwapError: a wrapper around the model does not support changes inside, the model is prepared for quantization,
            or a site cannot be swapped; the model is unchanged.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> normswap.apply_plan(model, normswap.plan_swaps(model))["1"] is model[1]
        True
        >>> type(model[1]).__name__
        'SwitchNorm2d'
    """
    check_wrapping(model, inplace=True, rebuilt=False)
    require_plan(plan)
    check_not_prepared(model)
    model = unwrap(model)
    by_name = modules_by_name(model)
    module_swaps = [swap for swap in plan.swaps if swap.owner is None]
    owners: dict[str, list[Swap]] = {}
    for swap in plan.swaps:
        if swap.owner is not None:
            owners.setdefault(swap.owner, []).append(swap)
    specs = _check_fit(plan, by_name, norms)
    replaced: dict[str, nn.Module] = {}
    with rollback_on_error(by_name[swap.fqn if swap.owner is None else swap.owner] for swap in plan.swaps):
        for owner, swaps in owners.items():
            replaced |= _rewrite_owner(by_name[owner], owner, swaps)
        for swap in module_swaps:
            replaced[swap.fqn] = _convert_module_site(
                by_name[swap.fqn], specs[swap.fqn], swap, _nearby_tensor(swap.fqn, by_name)
            )
    return replaced


def revert(model: nn.Module, *, discard: bool = False) -> nn.Module:
    """Put the original norms back in `model` itself: the inverse of `convert(inplace=True)`.

    Args:
        model: a converted model; it is changed.
        discard: revert also if importance weights differ from the old norm, which changes the function.

    Returns:
        `model`.

    Raises:
        SwapError: importance weights differ from the old norm (unless `discard=True`), a layer was not made by
            `convert` or started without `bn`, the class of an old norm is not imported, or a wrapper around the model
            does not support changes inside; the model is unchanged.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> converted = normswap.convert(model).model
        >>> type(normswap.revert(converted)[1]).__name__
        'BatchNorm2d'
    """
    check_wrapping(model, inplace=True, rebuilt=False, verb="revert")
    without_statistics = [
        name for name, layer in gated_modules(model).items() if getattr(vars(layer).get("replaced"), "dropped", ())
    ]
    if without_statistics:
        raise SwapError(
            f"{pluralize(len(without_statistics), 'site')} ({list_names(without_statistics)}) started without `bn` and "
            "kept no running statistics, so Batch Normalization cannot be put back: load the original model instead"
        )
    changed = sites_with_changed_weights(model)
    if changed and not discard:
        raise SwapError(
            f"the importance weights of {pluralize(len(changed), 'site')} differ from the old norm "
            f"({list_names(changed)}): reverting changes the function: pass discard=True to revert anyway"
        )
    modules = [entry.module for entry in walk_modules(unwrap(model))]
    layers = [module for module in modules if isinstance(module, SwitchNorm)]
    owners = [module for module in modules if is_rewritten(module)]
    graphs = [module for module in modules if isinstance(module, fx.GraphModule) and gate_call_nodes(module)]
    with rollback_on_error((*layers, *owners, *graphs)):
        for layer in layers:
            revert_module(layer)
        for owner in owners:
            restore_forward(owner)
        for graph in graphs:
            restore_graph(graph)
    return model


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy_model(model)
    except Exception as error:
        raise SwapError(
            f"the model cannot be copied ({error}): pass inplace=True to convert the model itself"
        ) from error


def _check_fit(plan: SwapPlan, by_name: dict[str, nn.Module], norms: NormTable) -> dict[str, NormSpec]:
    """Return the spec of each module site, or raise one error that lists what does not fit the model."""
    specs: dict[str, NormSpec] = {}
    mismatches: list[str] = []
    planned: dict[tuple[int, str], str] = {}
    for swap in plan.swaps:
        module = by_name.get(swap.fqn if swap.owner is None else swap.owner)
        if module is None:
            mismatches.append(f"{swap.fqn or 'the model'}: not in this model")
            continue
        site = id(module), "" if swap.owner is None else swap.fqn
        if site in planned:
            mismatches.append(f"{swap.fqn}: planned twice, also as {planned[site]}")
            continue
        planned[site] = swap.fqn
        if swap.owner is not None:
            continue
        spec = read_norm(module, norms)
        if spec is None or class_name(module) != swap.class_name:
            mismatches.append(f"{swap.fqn}: expected {swap.class_name}, got {class_name(module)}")
        elif spec.kind != swap.kind:
            mismatches.append(f"{swap.fqn}: expected the kind {swap.kind}, got {spec.kind}")
        elif spec.target is None:
            mismatches.append(f"{swap.fqn}: {spec.problem}")
        elif spec.kind == "gn" and spec.num_groups != swap.num_groups:
            mismatches.append(f"{swap.fqn}: expected {swap.num_groups} groups, got {spec.num_groups}")
        elif spec.num_features != swap.num_features:
            mismatches.append(f"{swap.fqn}: expected {swap.num_features} channels, got {spec.num_features}")
        else:
            specs[swap.fqn] = spec
    if mismatches:
        more = f" (+{len(mismatches) - 3} more)" if len(mismatches) > 3 else ""
        raise PlanError(
            f"the plan was made for another model ({plan.model_class}): {'; '.join(mismatches[:3])}{more}; make a plan "
            "for this model with plan_swaps"
        )
    return specs


def _nearby_tensor(fqn: str, by_name: dict[str, nn.Module]) -> Tensor | None:
    """A floating tensor of the nearest module around a site: a norm without tensors gets its dtype and device."""
    while fqn:
        fqn = fqn.rpartition(".")[0]
        ancestor = by_name.get(fqn)
        for tensor in chain(ancestor.parameters(), ancestor.buffers()) if ancestor is not None else ():
            if tensor.is_floating_point():
                return tensor
    return None


def _convert_module_site(layer: nn.Module, spec: NormSpec, swap: Swap, like: Tensor | None) -> nn.Module:
    target = spec.target or nn.Module
    try:
        convert_module(
            layer,
            target,
            gate=swap.gate,
            branches=swap.branches,
            bn_statistics=swap.bn_statistics,
            train_gates=swap.train_gates,
            vertex=swap.vertex,
            synchronize=swap.synchronize,
            eps=spec.eps,
            then=spec.then,
            like=like,
            fqn=swap.fqn,
            matched=swap.matched,
            num_groups=swap.num_groups,
            start=swap.start,
        )
    except TypeError as error:  # Python cannot change the class of objects with another layout
        raise SwapError(
            f"{swap.fqn}: Python cannot change a {swap.class_name} into a {target.__name__} ({error}): pass "
            f"exclude=['{swap.fqn}']"
        ) from error
    return layer


def _rewrite_owner(module: nn.Module, owner: str, swaps: list[Swap]) -> dict[str, nn.Module]:
    """Route the batch_norm calls in the forward of `module` through new gates, and return these by fqn."""
    traced = trace_module_forward(module)
    nodes = batch_norm_nodes(traced.evaluation) if traced.evaluation else []
    swap_by_fqn = {swap.fqn: swap for swap in swaps}
    names = unused_names(module, len(nodes))
    planned = {name: swap_by_fqn[join_fqn(owner, name)] for name in names if join_fqn(owner, name) in swap_by_fqn}
    if len(planned) != len(swaps):
        raise SwapError(
            f"{owner or 'the model'}: the plan names the batch_norm calls {sorted(swap_by_fqn)}, and its forward has "
            f"{names}: make a plan for this model with plan_swaps"
        )
    gates = {name: _functional_gate(module, swap, nodes[names.index(name)]) for name, swap in planned.items()}
    site_names = tuple(name if name in gates else None for name in names)
    if isinstance(module, fx.GraphModule):
        edit_graph(module, gates, site_names)
    else:
        rewrite_forward(module, gates, site_names, traced)
    return {join_fqn(owner, name): layer for name, layer in gates.items()}


def _functional_gate(module: nn.Module, swap: Swap, call: fx.Node) -> FunctionalSwitchNorm:
    """The layer for one batch_norm call in the forward of `module`, in the mode, dtype and device of `module`."""
    gate = FunctionalSwitchNorm(
        gate=swap.gate,
        branches=swap.branches,
        bn_statistics=swap.bn_statistics,
        vertex=swap.vertex,
        num_groups=swap.num_groups,
        matched_channels=swap.num_features if swap.matched else None,
    )
    gate.requires_grad_(swap.train_gates)
    gate.replaced_call = call_name(call.target)
    gate.synchronize = swap.synchronize
    gate.site = new_site_name(swap.fqn)
    gate.train(module.training)
    like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
    gate = gate if like is None else gate.to(like)
    if swap.matched:
        mean, var = call_tensors(module, call, ("running_mean", "running_var"))
        gate.match_to(mean, var, eps=norm_arguments(call).get("eps", 1e-5))
    return gate
