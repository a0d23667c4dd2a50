"""Guarantee 3: the gates receive the gradients of the float64 oracle."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.helpers import oracles
from tests.helpers.guarantees.walking import (
    CONSTANTS,
    GATES,
    LIMIT,
    call,
    in_float64,
    is_floating,
    paths,
    set_mode,
    to_float64,
)


@dataclass
class Visit:
    """One call of a site: what came in, with which statistics it worked, and the gradient that came back."""

    x: Tensor
    weight: Tensor | None
    constants: oracles.Constants | None
    eps: float
    dy: Tensor | None = None
    matching: dict[str, Tensor] = field(default_factory=dict)
    num_groups: int = 1


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
        arguments = (
            dict(zip(names, args[1:], strict=False)) | kwargs
            if functional
            else {n: vars(layer).get(n) if n == "eps" else getattr(layer, n) for n in names if n != "momentum"}
        )
        batch = layer.bn_statistics == "batch" and arguments.get("training", False)
        untracked = not functional and arguments["training"] and not layer.track_running_stats
        untracked = untracked and layer.bn_statistics != "running"
        constants = None
        if arguments["running_mean"] is not None and not batch and not untracked:
            constants = oracles.Constants(
                *(arguments[n].detach().double().clone() for n in ("running_mean", "running_var"))
            )
            if layer.bn_statistics == "renorm" and arguments.get("training", False):
                constants = oracles.updated_running(constants, args[0].detach(), _momentum(layer, arguments))
        weight = arguments.get("weight")
        site.visits.append(Visit(args[0].detach().double().clone(), weight, constants, arguments.get("eps", 1e-5)))
        own = {name: layer._buffers.get(name) for name in CONSTANTS}
        site.visits[-1].matching = {name: each.double().clone() for name, each in own.items() if each is not None}
        site.visits[-1].num_groups = layer.num_groups

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


def _momentum(layer: Any, arguments: dict[str, Any]) -> float:
    """The share that the next batch will have in the running statistics."""
    momentum = arguments.get("momentum", 0.1) if not hasattr(layer, "momentum") else layer.momentum
    return 1 / (float(layer.num_batches_tracked) + 1) if momentum is None else float(momentum)


def matched_table_of(visit: Visit, branch: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (N, C) of one branch of a layer with groups or matched branches."""
    x, groups = visit.x, visit.num_groups if branch == "ln" else 1
    grouped = x.reshape(-1, x.shape[1] // groups, *x.shape[2:])
    mean, var = table_of(grouped, branch, visit.constants if branch == "bn" else None)
    mean, var = (t.reshape(x.shape[0], x.shape[1]) for t in (mean, var))
    if branch == "ln" and "ln_mean_shift" in visit.matching:
        mean = mean + visit.matching["ln_mean_shift"] * (var + visit.eps).sqrt()
    scale = visit.matching.get(f"{branch}_var_scale")
    return mean, var if scale is None else (var + visit.eps) * scale - visit.eps


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
    tables = [matched_table_of(visit, branch) for branch in branches]
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
        small = visit.x.shape[0] * visit.x.shape[1] <= 32
        if small and not visit.matching and visit.num_groups == 1:  # its loops are fast enough: the oracle itself
            weight, zero = _channels(visit.weight, visit.x, 1.0), _channels(None, visit.x, 0.0)
            expected = oracles.backward(visit.dy, visit.x, *shares, weight, layer.branches, visit.constants, visit.eps)
            assert zero.numel() == expected.bias.numel()
            found = [expected.mean_weight, expected.var_weight]
        totals = [total + part for total, part in zip(totals, found, strict=True)]
        sizes = [sizes[0] + mean_size.max().item(), sizes[1] + var_size.max().item()]
    gates = [getattr(layer, gate).detach() for gate in GATES]
    return [
        (oracles.gate_gradient(gate, layer.gate, total), size)
        for gate, total, size in zip(gates, totals, sizes, strict=True)
    ]


def alive(converted: nn.Module, fqns: list[str], inputs: Any, mode: str = "training") -> int:
    """Guarantee 3 for these layers; return how many gates were compared with the oracle, 0 if the model raises."""
    model, inputs = in_float64(converted), to_float64(inputs)
    set_mode(model, mode)
    layers = paths(model)
    sites = {fqn: _watch(layers[fqn]) for fqn in fqns}
    torch.manual_seed(1)
    try:
        outputs = [leaf for leaf in tree_leaves(call(model, inputs)) if is_floating(leaf) and leaf.requires_grad]
    except Exception:  # noqa: BLE001 - as the original does, or guarantee 1 is broken
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
            assert actual.isfinite().all(), f"guarantee 3: {fqn}.{gate} has the gradient {actual.tolist()}"
            off = (actual - expected).abs().max().item()
            assert off <= LIMIT * size, f"guarantee 3: {fqn}.{gate} is {off:.1e} off the oracle's {expected.tolist()}"
            compared += 1
    return compared
