"""convert and apply_plan: the plan carried out, all or nothing. No rule of what to swap lives here."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from normswap.errors import PlanError, SwapError
from normswap.layers.functional import new_site_name
from normswap.layers.gating import BnStatistics, Branch, Gate
from normswap.layers.in_place import convert_module, revert_module
from normswap.layers.switch_norm import FunctionalSwitchNorm, SwitchNorm
from normswap.model_state import rollback_on_error
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
from normswap.surgery.importance import sites_with_changed_weights
from normswap.surgery.module_tree import class_name, copy_model, modules_by_name, walk_modules
from normswap.surgery.norms.classes import KNOWN_NORMS, NormSpec, NormTable, read_norm
from normswap.surgery.norms.functions import batch_norm_nodes, call_name
from normswap.surgery.plan import Swap, SwapPlan, require_plan
from normswap.surgery.planning import plan_swaps
from normswap.surgery.selection import Settings
from normswap.surgery.wrappers import check_not_prepared, check_wrapping, rewrap, unwrap
from normswap.text import join_fqn, pluralize, printable_as


@printable_as("conversion")
class Conversion(NamedTuple):
    """The converted model, the plan that was carried out, and the new layers by fqn. `print` shows the plan."""

    model: nn.Module
    plan: SwapPlan
    replaced: dict[str, nn.Module]

    def __repr__(self) -> str:
        swaps, skips = pluralize(len(self.plan.swaps), "swap"), pluralize(len(self.plan.skips), "skip")
        return f"Conversion({type(self.model).__name__}, {swaps}, {skips})"


def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    plan: SwapPlan | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kinds: Sequence[str] = ("bn",),
    gate: Gate = "simplex",
    branches: Sequence[Branch] | None = None,
    bn_statistics: BnStatistics = "batch",
    train_frozen_gates: bool = False,
    synchronize: bool = False,
    settings: Settings | None = None,
    norms: NormTable = KNOWN_NORMS,
    as_graph: bool = False,
    inplace: bool = False,
) -> Conversion:
    """Swap Batch Normalization, and other norms on request, for Switchable Normalization of the same function.

    Works on a deep copy, or with `inplace=True` on the very module objects: then aliases, Python lists, hooks and
    optimizers that hold on to modules or parameters stay right, also those outside the model.

    Args:
        model: any module. DataParallel, DistributedDataParallel and `torch.compile` around it stay around it, with
            their settings; all names are those of the model inside.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for one forward pass in
            evaluation; recommended, since sites with one spatial position need other branches.
        plan: carry out this plan of `plan_swaps`. It excludes the arguments from `include` to `settings`.
        include, exclude: names of the sites to swap, and of those to leave: glob patterns on dotted names such as
            `["layer4.*"]`, or regular expressions after `re:`. `exclude` wins; without `include` all sites are meant.
        kinds: which norms are swapped: `"bn"` (default), `"in"` (InstanceNorm, which starts at its own branch) and
            `"gn1"` (GroupNorm of one group, which starts at `ln`).
        gate: how importance weights follow from their parameters: `"simplex"` (default) starts as exactly the same
            function, `"softmax"` at the uniform mix, which is another function.
        branches: the branches that a site may have, some of `"in"`, `"ln"`, `"bn"`, with the one where each kind
            starts. Default: all that the shape and the kind of a site allow. Only `settings` give a site of kind `in`
            or `gn1` a `bn` branch, whose running statistics begin then.
        bn_statistics: what the `bn` branches use in training: `"batch"` (default), `"running"` or `"renorm"`. Sites
            that were frozen use running statistics whatever it says.
        train_frozen_gates: let gates learn also at sites whose own parameters are all frozen.
        synchronize: let the `bn` branch of every site take in training the batch of all processes; without it only
            those do that did so before (SyncBatchNorm).
        settings: by pattern, some of `gate`, `branches`, `bn_statistics` (of frozen sites too), `train_gates` and
            `synchronize`, which override the arguments above. If several patterns match a site, the later one wins, key
            by key. Branches that the shape of a site leaves no signal are left out of these as well.
        norms: the table of norm classes, `KNOWN_NORMS` or `KNOWN_NORMS | {TheirNorm: read_batch_norm}`.
        as_graph: return the whole converted model as a `torch.fx.GraphModule` that obeys `train()` and `eval()`.
        inplace: convert the module objects themselves; default is to convert a deep copy.

    Returns:
        `Conversion(model, plan, replaced)`: the model, the plan and the new layers by fqn. With nothing to swap the
        plan has no swaps and says why.

    Raises:
        PlanError: a pattern matches nothing, or the plan was made for another model.
        ModelError: the forward pass on `example_inputs` failed.
        SwapError: the model is wrapped in what cannot be kept or built again, or cannot be copied, rewritten or traced
            as asked.
        ArgumentError: an argument is of a wrong type, such as a state dict or a path instead of a module.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> normswap.convert(model, torch.randn(2, 3, 16, 16))
        Conversion(Sequential, 1 swap, 0 skips)
    """
    check_wrapping(model, inplace=inplace, rebuilt=as_graph or not inplace)
    inside = unwrap(model)
    if plan is None:
        plan = plan_swaps(
            inside,
            example_inputs,
            include=include,
            exclude=exclude,
            kinds=kinds,
            gate=gate,
            branches=branches,
            bn_statistics=bn_statistics,
            train_frozen_gates=train_frozen_gates,
            synchronize=synchronize,
            settings=settings,
            norms=norms,
        )
    elif (
        (include or exclude or branches or settings or train_frozen_gates or synchronize)
        or tuple(kinds) != ("bn",)
        or (gate, bn_statistics) != ("simplex", "batch")
    ):
        raise PlanError(
            "expected either a plan or deciding arguments (include, exclude, gate, branches, ...), got both"
        )
    target = inside if inplace else _copy(inside)
    with rollback_on_error(entry.module for entry in walk_modules(target)):
        replaced = apply_plan(target, plan, norms=norms)
        if as_graph:
            target = to_graph_module(target, example_inputs)
        target = rewrap(model, target)
    return Conversion(target, plan, replaced)


def apply_plan(model: nn.Module, plan: SwapPlan, *, norms: NormTable = KNOWN_NORMS) -> dict[str, nn.Module]:
    """Carry out `plan` on `model` itself, all or nothing, and return the new layers by fqn.

    Args:
        model: the model that the plan was made for; it is changed.
        plan: what `plan_swaps` returned, or `SwapPlan.from_json` read.
        norms: the table of norm classes that the plan was made with.

    Raises:
        PlanError: the plan was made for another model.
        SwapError: the model is in a wrapper that would not notice, is prepared for quantization, or a site cannot be
            swapped; it is as it was.
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
    """Put the original norms back in `model` itself and return it: the inverse of `convert(inplace=True)`.

    Args:
        model: a converted model; it is changed.
        discard: also where importance weights have moved, and with them the function.

    Raises:
        SwapError: importance weights have moved (unless `discard`), a layer was not made by `convert`, or its old
            class is not imported, or the model is in a wrapper that would not notice; it is as it was.
    """
    check_wrapping(model, inplace=True, rebuilt=False, verb="revert")
    changed = sites_with_changed_weights(model)
    if changed and not discard:
        raise SwapError(
            f"{len(changed)} sites have learned importance weights ({', '.join(changed[:3])}{', ...' * (len(changed) > 3)}): "
            "reverting would change the function; pass discard=True to do it all the same"
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
        raise SwapError(f"the model cannot be copied ({error}): pass inplace=True to convert it as it is") from error


def _check_fit(plan: SwapPlan, by_name: dict[str, nn.Module], norms: NormTable) -> dict[str, NormSpec]:
    """Return what each module site is, or say in one error what does not fit."""
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
            mismatches.append(f"{swap.fqn}: planned already, as {planned[site]}")
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
        elif spec.num_features != swap.num_features:
            mismatches.append(f"{swap.fqn}: expected {swap.num_features} channels, got {spec.num_features}")
        else:
            specs[swap.fqn] = spec
    if mismatches:
        more = f" (+{len(mismatches) - 3} more)" if len(mismatches) > 3 else ""
        raise PlanError(f"the plan was made for another model ({plan.model_class}): {'; '.join(mismatches[:3])}{more}")
    return specs


def _nearby_tensor(fqn: str, by_name: dict[str, nn.Module]) -> Tensor | None:
    """A floating tensor of the nearest module around a site: what tells a norm without tensors its dtype and device."""
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
        )
    except TypeError as error:  # Python cannot change the class of objects with another layout
        raise SwapError(
            f"{swap.fqn}: a {swap.class_name} cannot become a {target.__name__} ({error}): exclude it"
        ) from error
    return layer


def _rewrite_owner(module: nn.Module, owner: str, swaps: list[Swap]) -> dict[str, nn.Module]:
    traced = trace_module_forward(module)
    nodes = batch_norm_nodes(traced.evaluation) if traced.evaluation else []
    swap_by_fqn = {swap.fqn: swap for swap in swaps}
    names = unused_names(module, len(nodes))
    planned = {name: swap_by_fqn[join_fqn(owner, name)] for name in names if join_fqn(owner, name) in swap_by_fqn}
    if len(planned) != len(swaps):
        raise SwapError(
            f"{owner or 'the model'}: expected {sorted(swap_by_fqn)} among its batch_norm calls, found {names}"
        )
    like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
    gates = {}
    for name, swap in planned.items():
        gates[name] = FunctionalSwitchNorm(
            gate=swap.gate, branches=swap.branches, bn_statistics=swap.bn_statistics
        ).requires_grad_(swap.train_gates)
        gates[name].replaced_call = call_name(nodes[names.index(name)].target)
        gates[name].synchronize = swap.synchronize
        gates[name].site = new_site_name(swap.fqn)
        gates[name].train(module.training)
        if like is not None:
            gates[name].to(like)
    site_names = tuple(name if name in gates else None for name in names)
    if isinstance(module, fx.GraphModule):
        edit_graph(module, gates, site_names)
    else:
        rewrite_forward(module, gates, site_names, traced)
    return {join_fqn(owner, name): layer for name, layer in gates.items()}
