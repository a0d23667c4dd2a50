"""Switchable Normalization in float64, written from the paper: plain loops, no autograd, nothing from normswap.

Every number is found the slow and obvious way: moments by gathering the values and asking for their mean and biased
variance, one sample and one channel at a time, and the backward pass by the closed form, term by term. A test
that agrees with this file agrees with the definition.
"""

import itertools
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

ALL_BRANCHES = ("in", "ln", "bn")


@dataclass(frozen=True)
class Constants:
    """Running statistics (C,), which the `bn` branch takes instead of the moments of the batch."""

    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class Layer:
    """What else a layer is: eps, the groups of channels that `ln` pools, and the constants (C,) of matched branches.

    mean_ln' = mean_ln + shift sqrt(var_ln + eps), var_ln' + eps = ln_scale (var_ln + eps), and likewise `in`.
    """

    eps: float = 1e-5
    num_groups: int = 1
    shift: Tensor | None = None
    ln_scale: Tensor | None = None
    in_scale: Tensor | None = None

    def constants_of(self, c: int) -> tuple[float, float, float]:
        """Return shift, scale of `ln` and scale of `in` of a channel."""
        none = 0.0, 1.0, 1.0
        given = self.shift, self.ln_scale, self.in_scale
        shift, ln_scale, in_scale = (d if t is None else float(t[c]) for t, d in zip(given, none, strict=True))
        return shift, ln_scale, in_scale

    def group_of(self, c: int, channels: int) -> list[int]:
        """Return the channels of the group of channel c."""
        size = channels // self.num_groups
        return list(range(c // size * size, (c // size + 1) * size))


PLAIN = Layer()


@dataclass(frozen=True)
class Tables:
    """What one branch says of every (n, c): mean and biased variance, each (N, C)."""

    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class Gradients:
    """The gradients of a scalar loss with respect to everything that the layer is fed."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean_weight: Tensor
    var_weight: Tensor


def moments_of(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all values in the list."""
    everything = torch.cat([v.double().flatten() for v in values])
    return everything.mean(), everything.var(correction=0)


def statistics(x: Tensor, branch: str, constants: Constants | None = None, layer: Layer = PLAIN) -> Tables:
    """The (N, C) tables of one branch, by gathering the values that it pools, before they are matched."""
    samples, channels = x.shape[:2]
    mean, var = torch.empty(samples, channels).double(), torch.empty(samples, channels).double()
    for n, c in itertools.product(range(samples), range(channels)):
        if branch == "bn" and constants is not None:
            mean[n, c], var[n, c] = constants.mean[c], constants.var[c]
            continue
        pooled = {
            "in": [x[n, c]],
            "ln": [x[n, k] for k in layer.group_of(c, channels)],
            "bn": [x[k, c] for k in range(samples)],
        }
        mean[n, c], var[n, c] = moments_of(pooled[branch])
    return Tables(mean, var)


def matched_statistics(x: Tensor, branch: str, constants: Constants | None, layer: Layer) -> Tables:
    """The tables of one branch as they are mixed."""
    tables = statistics(x, branch, constants, layer)
    mean, var = tables.mean.clone(), tables.var.clone()
    for n, c in itertools.product(range(x.shape[0]), range(x.shape[1])):
        shift, ln_scale, in_scale = layer.constants_of(c)
        widened = tables.var[n, c] + layer.eps
        if branch == "ln" and shift != 0:
            mean[n, c] += shift * widened**0.5
        if branch == "ln" and ln_scale != 1:
            var[n, c] = widened * ln_scale - layer.eps
        if branch == "in" and in_scale != 1:
            var[n, c] = widened * in_scale - layer.eps
    return Tables(mean, var)


def mix(
    x: Tensor,
    shares: Tensor,
    var_shares: Tensor,
    branches: tuple[str, ...],
    constants: Constants | None,
    layer: Layer = PLAIN,
) -> tuple[Tensor, Tensor]:
    """The mixed mean and variance of every (n, c); a branch without any share has no say, whatever its value."""
    mean, var = torch.zeros(x.shape[:2]).double(), torch.zeros(x.shape[:2]).double()
    for share, var_share, branch in zip(shares, var_shares, branches, strict=True):
        tables = matched_statistics(x, branch, constants, layer)
        mean += share * tables.mean if share != 0 else 0
        var += var_share * tables.var if var_share != 0 else 0
    return mean, var


def forward(
    x: Tensor,
    shares: Tensor,
    var_shares: Tensor,
    weight: Tensor,
    bias: Tensor,
    branches: tuple[str, ...] = ALL_BRANCHES,
    constants: Constants | None = None,
    eps: float = 1e-5,
    *,
    layer: Layer | None = None,
) -> Tensor:
    """y = weight (x - mu) / sqrt(var + eps) + bias, one (n, c) at a time. `layer` replaces `eps`."""
    layer = layer or Layer(eps)
    x = x.double()
    mean, var = mix(x, shares, var_shares, branches, constants, layer)
    y = torch.empty_like(x)
    for n, c in itertools.product(range(x.shape[0]), range(x.shape[1])):
        y[n, c] = weight[c] * (x[n, c] - mean[n, c]) / (var[n, c] + layer.eps) ** 0.5 + bias[c]
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    shares: Tensor,
    var_shares: Tensor,
    weight: Tensor,
    branches: tuple[str, ...] = ALL_BRANCHES,
    constants: Constants | None = None,
    eps: float = 1e-5,
    *,
    follows_batch: bool = False,
    layer: Layer | None = None,
) -> Gradients:
    """The closed form. `mean_weight` and `var_weight` of the result are dL/dw_k, before the gate.

    With `follows_batch` the constants are values only: x moves them as it moves the moments of the batch. `layer`
    replaces `eps`.
    """
    layer = layer or Layer(eps)
    x, dy = x.double(), dy.double()
    samples, channels = x.shape[:2]
    positions = x[0, 0].numel()
    mean, var = mix(x, shares, var_shares, branches, constants, layer)
    s = (var + layer.eps) ** 0.5
    dmean, dvar = torch.empty_like(mean), torch.empty_like(var)
    dweight, dbias = torch.zeros(channels).double(), torch.zeros(channels).double()
    for n, c in itertools.product(range(samples), range(channels)):
        g, normalised = dy[n, c] * weight[c], (x[n, c] - mean[n, c]) / s[n, c]
        dmean[n, c] = -(g / s[n, c]).sum()
        dvar[n, c] = -(g * normalised).sum() / (2 * s[n, c] ** 2)
        dweight[c] += (dy[n, c] * normalised).sum()
        dbias[c] += dy[n, c].sum()

    tables = {branch: matched_statistics(x, branch, constants, layer) for branch in branches}
    own = {branch: statistics(x, branch, None, layer) for branch in branches}
    dx = torch.empty_like(x)
    for n, c in itertools.product(range(samples), range(channels)):
        dx[n, c] = dy[n, c] * weight[c] / s[n, c]
        for share, var_share, branch in zip(shares, var_shares, branches, strict=True):
            if branch == "bn" and constants is not None and not follows_batch:
                continue
            # How many values this branch pools, and the gradients of its mean and variance: sums over the (n, c) that
            # share the statistic.
            if branch == "in":
                size, dm, dv = positions, share * dmean[n, c], var_share * layer.constants_of(c)[2] * dvar[n, c]
            elif branch == "bn":
                size, dm, dv = positions * samples, share * dmean[:, c].sum(), var_share * dvar[:, c].sum()
            else:
                group = layer.group_of(c, channels)
                size, dm = positions * len(group), share * dmean[n, group].sum()
                deviation = (own["ln"].var[n, c] + layer.eps) ** 0.5
                dv = sum(
                    var_share * layer.constants_of(k)[1] * dvar[n, k]
                    + share * layer.constants_of(k)[0] * dmean[n, k] / (2 * deviation)
                    for k in group
                )
            dx[n, c] += dm / size + 2 * (x[n, c] - own[branch].mean[n, c]) / size * dv
    dshares = torch.stack([(dmean * tables[branch].mean).sum() for branch in branches])
    dvar_shares = torch.stack([(dvar * tables[branch].var).sum() for branch in branches])
    return Gradients(dx, dweight, dbias, dshares, dvar_shares)


def softmax(logits: Tensor) -> Tensor:
    """exp(z_k) / sum exp(z)."""
    powers = [torch.exp(z.double() - logits.double().max()) for z in logits]
    return torch.stack([power / sum(powers) for power in powers])


def softmax_gradient(logits: Tensor, dshares: Tensor) -> Tensor:
    """w_k (dL/dw_k - sum_z w_z dL/dw_z)."""
    shares = softmax(logits)
    mean = sum(w * d for w, d in zip(shares, dshares, strict=True))
    return torch.stack([w * (d - mean) for w, d in zip(shares, dshares, strict=True)])


def centred(dshares: Tensor) -> Tensor:
    """The gradient of a simplex gate: what is left of dL/dw without its mean."""
    return dshares - sum(dshares) / len(dshares)


def project_by_bisection(point: Tensor) -> Tensor:
    """The Euclidean projection on the simplex: the threshold t at which sum(max(z - t, 0)) = 1, by bisection."""
    point = point.double()
    low, high = point.max() - 1, point.max()
    for _ in range(200):
        middle = (low + high) / 2
        if (point - middle).clamp(min=0).sum() > 1:
            low = middle
        else:
            high = middle
    return (point - (low + high) / 2).clamp(min=0)


def project_by_enumeration(point: Tensor) -> Tensor:
    """The same projection in exact fractions: of all supports, the feasible point that lies nearest."""
    exact = [Fraction(z) for z in point.tolist()]
    candidates = []
    for size in range(1, len(exact) + 1):
        for support in itertools.combinations(range(len(exact)), size):
            rest = (1 - sum(exact[k] for k in support)) / size
            candidate = [z + rest if k in support else Fraction(0) for k, z in enumerate(exact)]
            if min(candidate) >= 0:
                candidates.append(candidate)
    nearest = min(candidates, key=lambda c: sum((a - b) ** 2 for a, b in zip(c, exact, strict=True)))
    return torch.tensor([float(share) for share in nearest], dtype=torch.float64)


def shares_of(parameter: Tensor, gate: str) -> Tensor:
    """Importance weights of a gate parameter."""
    return {"softmax": softmax, "simplex": project_by_enumeration}[gate](parameter)


def gate_gradient(parameter: Tensor, gate: str, dshares: Tensor) -> Tensor:
    """dL/d(gate parameter) from dL/dw."""
    return softmax_gradient(parameter, dshares) if gate == "softmax" else centred(dshares)


def switch_norm(
    x: Tensor,
    dy: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    gate: str,
    branches: tuple[str, ...] = ALL_BRANCHES,
    constants: Constants | None = None,
    eps: float = 1e-5,
    follows_batch: bool = False,
    layer: Layer | None = None,
) -> tuple[Tensor, Gradients]:
    """The whole layer: y, and the gradients of sum(dy * y) with respect to x and every parameter."""
    layer = layer or Layer(eps)
    shares, var_shares = shares_of(mean_weight, gate), shares_of(var_weight, gate)
    y = forward(x, shares, var_shares, weight, bias, branches, constants, layer=layer)
    raw = backward(dy, x, shares, var_shares, weight, branches, constants, follows_batch=follows_batch, layer=layer)
    gates = [
        gate_gradient(parameter, gate, dshares)
        for parameter, dshares in ((mean_weight, raw.mean_weight), (var_weight, raw.var_weight))
    ]
    return y, Gradients(raw.x, raw.weight, raw.bias, *gates)


def updated_running(running: Constants, x: Tensor, momentum: float) -> Constants:
    """Running statistics after one more batch: torch's momentum, the share of the new; unbiased variance."""
    mean, var = running.mean.double().clone(), running.var.double().clone()
    for c in range(x.shape[1]):
        values = torch.cat([x[n, c].double().flatten() for n in range(x.shape[0])])
        mean[c] = (1 - momentum) * mean[c] + momentum * values.mean()
        var[c] = (1 - momentum) * var[c] + momentum * values.var(correction=1)
    return Constants(mean, var)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in L2; where the expected is zero, |actual| itself."""
    actual, expected = actual.double(), expected.double()
    scale = float(expected.norm())
    return float((actual - expected).norm()) / (scale if scale > 0 else 1.0)
