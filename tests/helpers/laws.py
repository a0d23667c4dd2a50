"""The laws of a conversion (docs/architecture.md) as functions that every conversion test calls.

Written on their own: comparisons, float64 arithmetic and the walk over modules are not the package's. A broken law
raises AssertionError with the figure and the place.
"""

import copy
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import normswap
from normswap.surgery.plan import SwapPlan
from tests.helpers import oracles

LIMIT = 1e-9
OWN_RESPONSES = 10
MODES = ("evaluation", "training", "as it is")
GATES = ("mean_weight", "var_weight")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
HOLDERS = (nn.Module, list, tuple, dict)
GENERATED = ("_graph", "_code", "_lineno_map", "_prologue_start", "_in_spec")


# --- walking ----------------------------------------------------------------------------------------------------------


def paths(model: nn.Module) -> dict[str, nn.Module]:
    """Every path to every module, the root at "", also through lists, tuples and dicts in attributes."""
    found: dict[str, nn.Module] = {}

    def visit(path: str, value: Any, depth: int, above: tuple[nn.Module, ...]) -> None:
        if isinstance(value, nn.Module):
            if value in above:
                return
            found[path] = value
            dot, inside = f"{path}." if path else "", (*above, value)
            for name, child in value._modules.items():
                visit(dot + name, child, 3, inside)
            for name, item in [] if isinstance(value, torch.jit.ScriptModule) else list(vars(value).items()):
                holds = isinstance(item, HOLDERS)
                if holds and name not in ("_parameters", "_buffers", "_modules") and not name.endswith("_hooks"):
                    visit(dot + name, item, 3, inside)
        elif depth and isinstance(value, list | tuple):
            for index, item in enumerate(value):
                visit(f"{path}[{index}]", item, depth - 1, above)
        elif depth and isinstance(value, dict):
            for key, item in value.items():
                visit(f"{path}[{key!r}]", item, depth - 1, above)

    visit("", model, 3, ())
    return found


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of every path."""
    for path, module in paths(model).items():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield (f"{path}.{name}" if path else name), tensor


def twin_of(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters are leaves, also those of TorchScript."""
    with torch.no_grad():
        twin = copy.deepcopy(model)
    for own, copied in zip(model.parameters(), twin.parameters(), strict=True):
        copied.requires_grad_(own.requires_grad)
    return twin


def in_float64(model: nn.Module) -> nn.Module:
    twin = twin_of(model)
    for module in {id(m): m for m in paths(twin).values()}.values():
        module.double()
    return twin


def to_float64(inputs: Any) -> Any:
    return tree_map(lambda leaf: leaf.double() if _is_floating(leaf) else leaf, inputs)


def set_mode(model: nn.Module, mode: str) -> None:
    for module in paths(model).values() if mode != "as it is" else ():
        module.training = mode == "training"


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


# --- law 1: the same function -----------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one pass gave: outputs, and with gradients those of parameters and of the input, and the buffers left."""

    outputs: list[Any]
    gradients: dict[frozenset[str], Tensor]
    input_gradients: list[Tensor]
    buffers: dict[frozenset[str], Tensor]


def run(model: nn.Module, inputs: Any, mode: str) -> Run:
    """One pass of a copy of `model`, seeded, and the gradients of a fixed random projection of its outputs."""
    model = twin_of(model)
    set_mode(model, mode)
    leaves = [leaf.clone().requires_grad_() for leaf in tree_leaves(inputs) if _is_floating(leaf)]
    remaining = iter(leaves)
    fed = tree_map(lambda leaf: next(remaining) * 1 if _is_floating(leaf) else leaf, inputs)
    torch.manual_seed(1)
    random.seed(1)
    outputs = tree_leaves(call(model, fed))
    generator = torch.Generator().manual_seed(2)
    heads = [leaf for leaf in outputs if _is_floating(leaf)]
    loss = sum((head * torch.randn(head.shape, generator=generator, dtype=head.dtype)).sum() for head in heads)
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    named = grouped(model)
    return Run(
        outputs=[leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in outputs],
        gradients={names: p.grad for names, p in named.items() if isinstance(p, nn.Parameter) and p.grad is not None},
        input_gradients=[leaf.grad for leaf in leaves if leaf.grad is not None],
        buffers={names: b for names, b in named.items() if not isinstance(b, nn.Parameter)},
    )


def grouped(model: nn.Module) -> dict[frozenset[str], Tensor]:
    """Every tensor once, by all its names."""
    names: dict[int, set[str]] = {}
    tensors = {}
    for name, tensor in own_tensors(model):
        tensors[id(tensor)] = tensor
        names.setdefault(id(tensor), set()).add(name)
    return {frozenset(names[key]): tensor for key, tensor in tensors.items()}


def partner(names: frozenset[str], tensors: dict[frozenset[str], Tensor]) -> Tensor | None:
    """The tensor that has a name in common; a whole-model graph keeps one name of each."""
    return next((tensor for others, tensor in tensors.items() if names & others), None)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L2 of b to a, their own size where a is zero."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    size = a.double().norm().item()
    return (a.double() - b.double()).norm().item() / (size or 1.0)


def distances(a: Run, b: Run) -> dict[str, float]:
    """How far two runs are apart: outputs, gradients of parameters as one vector, of the input, running statistics."""
    found = {"number of outputs": 0.0 if len(a.outputs) == len(b.outputs) else float("inf")}
    for index, (x, y) in enumerate(zip(a.outputs, b.outputs, strict=False)):
        same_kind = isinstance(x, Tensor) == isinstance(y, Tensor)
        far = distance(x, y) if isinstance(x, Tensor) and same_kind else 0.0 if same_kind and x == y else float("inf")
        found[f"output {index}"] = far
    if a.gradients:
        other = [partner(names, b.gradients) for names in a.gradients]
        pairs = [(x, torch.zeros_like(x) if y is None else y) for x, y in zip(a.gradients.values(), other, strict=True)]
        found["gradients of parameters"] = distance(
            *(torch.cat([t.flatten() for t in side]) for side in zip(*pairs, strict=True))
        )
    if a.input_gradients:
        vectors = [torch.cat([g.flatten() for g in r.input_gradients]) for r in (a, b)]
        found["gradients of inputs"] = distance(*vectors)
    for names, buffer in a.buffers.items():
        other = partner(names, b.buffers)
        if other is not None:
            found[f"buffer {min(names)}"] = distance(buffer, other)
    return found


def same_function(
    original: nn.Module, converted: nn.Module, inputs: Any, modes: tuple[str, ...] = MODES
) -> dict[str, float | None]:
    """Law 1. Returns the worst error in each mode, None where the original raises and the law is silent."""
    first, second, inputs = in_float64(original), in_float64(converted), to_float64(inputs)
    worst: dict[str, float | None] = {}
    for mode in modes:
        try:
            reference = run(first, inputs, mode)
        except Exception:  # noqa: BLE001 - whatever it is, the converted model owes nothing then
            worst[mode] = None
            continue
        far = distances(reference, run(second, inputs, mode))
        if max(far.values()) > LIMIT:
            nudged = tree_map(lambda leaf: leaf * (1 + 2**-52) if _is_floating(leaf) else leaf, inputs)
            own = distances(reference, run(first, nudged, mode))
            for name, error in far.items():
                limit = max(LIMIT, OWN_RESPONSES * own.get(name, 0.0))
                assert error <= limit, f"law 1, {mode}: {name} is {error:.1e} off, limit {limit:.1e}"
        worst[mode] = max(far.values())
    return worst


# --- law 2: nothing else changed --------------------------------------------------------------------------------------


@dataclass
class Record:
    """A model as it was: every path, tensor, flag, hook and attribute, with the identity of each object."""

    modules: dict[str, nn.Module]
    classes: dict[str, type]
    flags: dict[str, bool]
    attributes: dict[str, dict[str, Any]]
    hooks: dict[str, dict[str, list[Any]]]
    tensors: dict[str, Tensor]
    values: dict[str, Tensor]
    gradients: dict[str, bool]
    state: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, *, lasting: bool = True) -> "Record":
        """Without `lasting` the values are the model's own tensors: to be compared before anything changes them."""

        def kept(tensor: Tensor) -> Tensor:
            own = not lasting and tensor.is_contiguous()  # the copy of another one may have other strides
            return tensor.detach() if own else tensor.detach().clone()

        modules, tensors = paths(model), dict(own_tensors(model))
        plain = {path: module for path, module in modules.items() if not isinstance(module, torch.jit.ScriptModule)}
        return cls(
            modules=modules,
            classes={path: type(module) for path, module in modules.items()},
            flags={path: module.training for path, module in modules.items()},
            attributes={path: dict(vars(module)) for path, module in plain.items()},
            hooks={
                path: {
                    n: list(v.values()) for n, v in vars(module).items() if n.endswith("_hooks") and isinstance(v, dict)
                }
                for path, module in plain.items()
            },
            tensors=tensors,
            values={name: kept(tensor) for name, tensor in tensors.items() if not _is_lazy(tensor)},
            gradients={name: tensor.requires_grad for name, tensor in tensors.items()},
            state={name: kept(value) for name, value in model.state_dict().items() if not _is_lazy(value)},
        )

    def aliases(self) -> set[frozenset[str]]:
        """The groups of names that mean one object."""
        groups: dict[int, set[str]] = {}
        for name, thing in (*self.modules.items(), *self.tensors.items()):
            groups.setdefault(id(thing), set()).add(name)
        return {frozenset(group) for group in groups.values()}


def _is_lazy(tensor: Any) -> bool:
    return nn.parameter.is_lazy(tensor)


def _identical(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride()) and torch.equal(a, b)


def planned_names(plan: SwapPlan, record: Record) -> set[str]:
    """The names of the gates that a plan brings, and of the statistics that it begins, under every path of a site."""
    names = set()
    for swap in plan.swaps:
        site = swap.fqn if swap.owner is None else swap.owner
        suffix = "" if swap.owner is None else swap.fqn.removeprefix(swap.owner).removeprefix(".")
        for path, module in record.modules.items():
            if module is record.modules[site]:
                begun = STATISTICS if swap.kind in ("in", "gn1") and "bn" in swap.branches else ()
                names |= {".".join(part for part in (path, suffix, name) if part) for name in (*GATES, *begun)}
    return names


def nothing_else_changed(before: Record, converted: nn.Module, plan: SwapPlan, *, same_objects: bool) -> None:
    """Law 2. With `same_objects` the model was converted in place, and every object must still be that object."""
    after = Record.of(converted, lasting=False)
    new = planned_names(plan, before)
    assert set(after.tensors) == set(before.tensors) | new, f"law 2: {set(after.tensors) ^ set(before.tensors) ^ new}"
    added = set(after.state) - set(before.state)
    assert set(before.state) <= set(after.state), f"law 2: lost keys {set(before.state) - set(after.state)}"
    assert added <= new, f"law 2: unplanned keys {added - new}"
    for name, value in before.values.items():
        assert _identical(value, after.values[name]), f"law 2: {name} is not bit-identical"
        scripted = name.rpartition(".")[0] not in before.attributes  # a copy of TorchScript has no Parameters
        same_class = type(before.tensors[name]) is type(after.tensors[name])
        assert scripted or same_class, f"law 2: {name} changed its class"
        assert before.gradients[name] == after.gradients[name], f"law 2: {name}.requires_grad changed"
    for name, value in before.state.items():
        assert _identical(value, after.state[name]), f"law 2: {name} of the state dict is not bit-identical"
    functional = {swap.fqn for swap in plan.swaps if swap.owner is not None}
    _same_modules(before, after, {s.fqn for s in plan.swaps} - functional, {s.owner for s in plan.swaps} - {None})
    old_names = {*before.modules, *before.tensors}
    grouped = {group & old_names for group in after.aliases()} - {frozenset()}
    assert grouped == before.aliases(), f"law 2: aliases {grouped ^ before.aliases()}"
    if same_objects:
        for name, thing in (*before.modules.items(), *before.tensors.items()):
            assert (after.modules | after.tensors)[name] is thing, f"law 2: {name} is another object"


def _same_modules(before: Record, after: Record, swapped: set[str], owners: set[Any]) -> None:
    """Classes, flags, hooks and attributes; a swapped module and an owner may only gain."""
    changed = {id(before.modules[path]) for path in swapped}
    rewritten = {id(before.modules[path]) for path in owners}
    for path, module in before.modules.items():
        cls, now = before.classes[path], after.classes[path]
        if id(module) in changed:
            assert now.__name__.startswith("SwitchNorm"), f"law 2: {path} is a {now.__name__}"
            assert not issubclass(now, nn.modules.batchnorm._NormBase), f"law 2: {path} would be taken for a BatchNorm"
        elif id(module) in rewritten:
            # Every GraphModule has a class of its own, also a copy of one.
            kept = fx.GraphModule if issubclass(cls, fx.GraphModule) else cls
            assert issubclass(now, kept), f"law 2: {path} is no {cls.__name__} any more"
            assert (now.__name__, now.__qualname__, now.__module__) == (cls.__name__, cls.__qualname__, cls.__module__)
        elif module is after.modules[path] or not isinstance(module, fx.GraphModule | torch.jit.ScriptModule):
            assert now is cls, f"law 2: {path} became a {now.__name__}"
        assert before.flags[path] == after.flags[path], f"law 2: {path}.training changed"
        copied = module is not after.modules[path]
        assert _same_hooks(before.hooks.get(path), after.hooks.get(path), copied), f"law 2: hooks of {path} changed"
        lost = set(before.attributes.get(path, ())) - set(after.attributes.get(path, ()))
        assert not lost, f"law 2: {path} lost {lost}"


def _same_hooks(before: Any, after: Any, copied: bool) -> bool:
    """The very same, or in a copy, as `copy.deepcopy` does it, their copies where they are objects or bound methods."""
    if before == after or not copied:
        return before == after
    pairs = [(before[name], after.get(name, [])) for name in before]
    return before.keys() == after.keys() and all(
        len(a) == len(b) and all(x == y or _is_copy(x, y) for x, y in zip(a, b, strict=True)) for a, b in pairs
    )


def _is_copy(hook: Any, other: Any) -> bool:
    plain = isinstance(hook, FunctionType)
    return not plain and type(hook) is type(other) and getattr(hook, "__func__", 0) == getattr(other, "__func__", 0)


# --- law 3: alive -----------------------------------------------------------------------------------------------------


@dataclass
class Visit:
    """One call of a site: what came in, with which statistics it worked, and the gradient that came back."""

    x: Tensor
    weight: Tensor | None
    constants: oracles.Constants | None
    eps: float
    dy: Tensor | None = None


@dataclass
class Site:
    """A site of a converted model and its calls."""

    layer: Any
    visits: list[Visit] = field(default_factory=list)


def _channels(value: Tensor | None, x: Tensor, default: float) -> Tensor:
    return torch.full((x.shape[1],), default).double() if value is None else value.detach().double().clone()


def _watch(layer: Any) -> Site:
    """Note every call of a layer, a module or the gates of a functional site."""
    site = Site(layer)
    functional = not hasattr(layer, "running_mean")

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        told = (
            dict(zip(names, args[1:], strict=False)) | kwargs
            if functional
            else {n: vars(layer).get(n) if n == "eps" else getattr(layer, n) for n in names if n != "momentum"}
        )
        batch = layer.bn_statistics == "batch" and told.get("training", False)
        untracked = not functional and told["training"] and not layer.track_running_stats
        constants = None
        if told["running_mean"] is not None and not batch and not untracked:
            constants = oracles.Constants(*(told[n].detach().double().clone() for n in ("running_mean", "running_var")))
            if layer.bn_statistics == "renorm" and told.get("training", False):
                constants = oracles.updated_running(constants, args[0].detach(), _momentum(layer, told))
        weight = told.get("weight")
        site.visits.append(Visit(args[0].detach().double().clone(), weight, constants, told.get("eps", 1e-5)))

    def left(visit: Visit, y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(lambda gradient: setattr(visit, "dy", gradient.clone()))

    # First of all hooks, so that those of the model have not yet changed the output; the input they have changed.
    layer.register_forward_pre_hook(enter, with_kwargs=True)
    inner = layer._modules.get("drop")
    if inner is None:
        layer.register_forward_hook(lambda _module, _args, y: left(site.visits[-1], y), prepend=True)
    else:
        inner.register_forward_pre_hook(lambda _module, args: left(site.visits[-1], args[0]), prepend=True)
    return site


def _momentum(layer: Any, told: dict[str, Any]) -> float:
    """The share that the next batch will have in the running statistics."""
    momentum = told.get("momentum", 0.1) if not hasattr(layer, "momentum") else layer.momentum
    return 1 / (float(layer.num_batches_tracked) + 1) if momentum is None else float(momentum)


def table_of(x: Tensor, branch: str, constants: oracles.Constants | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of one branch, for tensors too large for the loops of `oracles`."""
    dims = {"in": tuple(range(2, x.dim())), "ln": tuple(range(1, x.dim())), "bn": (0, *range(2, x.dim()))}[branch]
    if branch == "bn" and constants is not None:
        return constants.mean.expand(x.shape[:2]), constants.var.expand(x.shape[:2])
    if not dims:
        return x, torch.zeros_like(x)
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return tuple(
        t.expand(*x.shape[:2], *t.shape[2:]).flatten(2)[..., 0] if t.dim() > 2 else t.expand(x.shape[:2])
        for t in (mean, var)
    )  # type: ignore[return-value]


def share_gradients(
    visit: Visit, shares: Tensor, var_shares: Tensor, branches: tuple[str, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dL/dw_k and dL/dw'_k by the closed form on (N, C) tables, and the sizes of the terms that they sum."""
    assert visit.dy is not None
    x, dy = visit.x, visit.dy.double()
    tables = [table_of(x, branch, visit.constants) for branch in branches]
    mean = sum(w * t[0] for w, t in zip(shares, tables, strict=True) if w != 0)
    var = sum(w * t[1] for w, t in zip(var_shares, tables, strict=True) if w != 0)
    s = (var + visit.eps).sqrt()
    x, dy = x.flatten(2) if x.dim() > 2 else x[..., None], dy.flatten(2) if dy.dim() > 2 else dy[..., None]
    g = dy * _channels(visit.weight, visit.x, 1.0)[None, :, None] / s[..., None]
    normalised = (x - mean[..., None]) / s[..., None]
    dmean, dvar = -g.sum(-1), -(g * normalised).sum(-1) / (2 * s)
    sizes = g.abs().sum(-1), (g * normalised).abs().sum(-1) / (2 * s)
    return (
        torch.stack([(dmean * t[0]).sum() for t in tables]),
        torch.stack([(dvar * t[1]).sum() for t in tables]),
        torch.stack([(sizes[0] * t[0].abs()).sum() for t in tables]),
        torch.stack([(sizes[1] * t[1].abs()).sum() for t in tables]),
    )


def _expected(site: Site) -> list[tuple[Tensor, float]]:
    """The gradient of each gate by the oracle, and the size that its rounding is to be measured against."""
    layer = site.layer
    totals = [torch.zeros(len(layer.branches)).double() for _ in GATES]
    sizes = [0.0, 0.0]
    shares = [oracles.shares_of(getattr(layer, gate).detach(), layer.gate) for gate in GATES]
    for visit in site.visits:
        if visit.dy is None:
            continue
        *found, mean_size, var_size = share_gradients(visit, *shares, layer.branches)
        if visit.x.shape[0] * visit.x.shape[1] <= 32:  # where its loops are fast enough, the oracle itself decides
            weight, zero = _channels(visit.weight, visit.x, 1.0), _channels(None, visit.x, 0.0)
            told = oracles.backward(visit.dy, visit.x, *shares, weight, layer.branches, visit.constants, visit.eps)
            assert zero.numel() == told.bias.numel()
            found = [told.mean_weight, told.var_weight]
        totals = [total + part for total, part in zip(totals, found, strict=True)]
        sizes = [sizes[0] + mean_size.max().item(), sizes[1] + var_size.max().item()]
    gates = [getattr(layer, gate).detach() for gate in GATES]
    return [
        (oracles.gate_gradient(gate, layer.gate, total), size)
        for gate, total, size in zip(gates, totals, sizes, strict=True)
    ]


def alive(converted: nn.Module, fqns: list[str], inputs: Any, mode: str = "training") -> int:
    """Law 3 for the layers named; returns how many gates were held against the oracle, 0 where the model raises."""
    model, inputs = in_float64(converted), to_float64(inputs)
    set_mode(model, mode)
    layers = paths(model)
    sites = {fqn: _watch(layers[fqn]) for fqn in fqns}
    torch.manual_seed(1)
    try:
        outputs = [leaf for leaf in tree_leaves(call(model, inputs)) if _is_floating(leaf) and leaf.requires_grad]
    except Exception:  # noqa: BLE001 - as the original does, or law 1 is broken
        return 0
    generator = torch.Generator().manual_seed(2)
    if not outputs:
        return 0
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs)
    # Of the gates alone: the gradients of everything else would take half of the time, and are not looked at.
    gates = [p for site in sites.values() for gate in GATES if (p := getattr(site.layer, gate)).requires_grad]
    found = torch.autograd.grad(loss, gates, allow_unused=True) if gates else ()
    gradients = {id(gate): gradient for gate, gradient in zip(gates, found, strict=True)}
    compared = 0
    for fqn, site in sites.items():
        for gate, (expected, size) in zip(GATES, _expected(site) if site.visits else [], strict=False):
            parameter = getattr(site.layer, gate)
            if not parameter.requires_grad:
                continue
            gradient = gradients[id(parameter)]
            actual = torch.zeros_like(expected) if gradient is None else gradient
            assert actual.isfinite().all(), f"law 3: {fqn}.{gate} has the gradient {actual.tolist()}"
            off = (actual - expected).abs().max().item()
            assert off <= LIMIT * size, f"law 3: {fqn}.{gate} is {off:.1e} off the oracle's {expected.tolist()}"
            compared += 1
    return compared


# --- law 4: everything accounted for ----------------------------------------------------------------------------------


def accounted_for(model: nn.Module, plan: SwapPlan, inputs: Any, norms: Any = None) -> None:
    """Law 4: each site is swapped or skipped once, each skip says why, and no norm of the model is without a site."""
    options = {} if norms is None else {"norms": norms}
    sites = normswap.find_norm_sites(model, inputs, **options)
    decided = Counter(decision.fqn for decision in (*plan.swaps, *plan.skips))
    assert decided == Counter(site.fqn for site in sites), f"law 4: {decided} for {[site.fqn for site in sites]}"
    assert max(decided.values(), default=1) == 1, f"law 4: {decided.most_common(1)} is decided twice"
    for skip in plan.skips:
        assert len(skip.reason) > 10, f"law 4: the reason of {skip.fqn} is {skip.reason!r}"
    places = paths(model)
    known = {id(places[name]) for site in sites for name in (site.fqn, *site.aliases, site.owner) if name in places}
    for path, module in places.items():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            assert id(module) in known, f"law 4: {path} is nowhere"


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


# --- law 5: round trips -----------------------------------------------------------------------------------------------


def reverts(model: nn.Module, inputs: Any, **options: Any) -> None:
    """Law 5: revert after convert, in place, is the identity, down to classes, attributes and objects."""
    before = Record.of(model)
    normswap.convert(model, inputs, inplace=True, **options)
    assert normswap.revert(model) is model
    after = Record.of(model, lasting=False)
    assert after.classes == before.classes, "law 5: classes"
    assert after.flags == before.flags, "law 5: flags"
    assert after.hooks == before.hooks, "law 5: hooks"
    for path, attributes in before.attributes.items():
        now = after.attributes[path]
        assert list(now) == list(attributes), f"law 5: attributes of {path}: {set(now) ^ set(attributes)}"
        graph = isinstance(before.modules[path], fx.GraphModule)  # its code is generated again
        same = [name for name, value in attributes.items() if now[name] is value or (graph and name in GENERATED)]
        assert len(same) == len(attributes), f"law 5: attributes of {path}: {set(attributes) - set(same)}"
    for name, thing in (*before.modules.items(), *before.tensors.items()):
        assert (after.modules | after.tensors)[name] is thing, f"law 5: {name} is another object"
    assert after.tensors.keys() == before.tensors.keys(), "law 5: tensors"
    assert list(after.state) == list(before.state), "law 5: state-dict keys"
    for name, value in before.values.items():
        assert _identical(value, after.values[name]), f"law 5: {name} is not bit-identical"


def plan_survives_json(plan: SwapPlan) -> SwapPlan:
    """Law 5: plan -> JSON -> plan is equal."""
    again = SwapPlan.from_json(plan.to_json())
    assert again == plan, "law 5: the plan changed on its way through JSON"
    return again


def converting_twice_changes_nothing(converted: nn.Module, plan: SwapPlan, inputs: Any, **options: Any) -> None:
    """Law 5: the second conversion swaps nothing, says so for each site, and leaves model and objects alone."""
    before = Record.of(converted)
    again = normswap.convert(converted, inputs, inplace=True, **options)
    assert again.plan.swaps == (), f"law 5: swapped again {again.plan.swaps}"
    assert again.replaced == {}, "law 5: replaced something again"
    said = {skip.fqn for skip in again.plan.skips if "already" in skip.reason}
    assert said == {swap.fqn for swap in plan.swaps}, f"law 5: {said} are said to be converted already"
    nothing_else_changed(before, converted, again.plan, same_objects=True)


# --- all of them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A conversion that kept all laws, its errors by mode, and how many gates were held against the oracle."""

    conversion: normswap.Conversion
    errors: dict[str, float | None]
    gates: int


def hold(make: Callable[[], nn.Module], inputs: Any, *, modes: tuple[str, ...] = MODES, **options: Any) -> Held:
    """Put one conversion through all laws, on a copy and in place, in the modes given."""
    original = make()
    before = Record.of(original)
    conversion = normswap.convert(original, inputs, **options)
    model, plan = conversion.model, conversion.plan
    nothing_else_changed(before, original, SwapPlan((), (), ""), same_objects=True)
    nothing_else_changed(before, model, plan, same_objects=False)
    shared = {id(t) for _, t in own_tensors(model)} & {id(t) for _, t in own_tensors(original)}
    assert not shared, "the copy shares tensors with the original"

    inplace = make()
    record = Record.of(inplace)
    optimizer_owns = [p for group in _optimizer_groups(inplace) for p in group]
    norms = _only(options, "norms")
    second = normswap.convert(inplace, inputs, inplace=True, plan=plan_survives_json(plan), **norms)
    assert second.model is inplace, "another model came back"
    nothing_else_changed(record, inplace, plan, same_objects=True)
    assert {id(p) for p in optimizer_owns} <= {id(p) for p in inplace.parameters()}, "law 2: the optimizer is stale"
    for (name, a), (other, b) in itertools.zip_longest(own_tensors(model), own_tensors(inplace)):
        assert name == other, f"{name} is {other} in place"
        assert _identical(a, b), f"{name} differs between copy and in place"

    errors = {} if inputs is None else same_function(original, model, inputs, modes)
    gates = 0 if inputs is None else alive(model, list(conversion.replaced), inputs)
    accounted_for(original, plan, inputs, options.get("norms"))
    reverts(make(), inputs, plan=plan, **norms)
    converting_twice_changes_nothing(model, plan, inputs, **_only(options, "norms", "kinds"))
    return Held(conversion, errors, gates)


def _only(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}


def _optimizer_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    parameters = list(model.parameters())
    if not parameters:
        return []
    return [group["params"] for group in torch.optim.SGD(parameters, lr=0.1).param_groups]
