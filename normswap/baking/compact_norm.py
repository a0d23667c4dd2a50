"""SN layers with fixed importance weights: no gates, no state. One multiplication and one addition on the activation.

Everything that does not depend on the input is computed once, in float64: the constants of branches that use running
statistics, and the matching constants times the importance weights. The rest is arithmetic on tables (N, C) and two
passes for the moments. Branches without weight are absent, so tracers and exporters see few operations.
"""

from collections.abc import Callable
from math import prod
from typing import Self

import torch
import torch.fx
from torch import Tensor, nn

from normswap.errors import LayerError
from normswap.layers.backends.reference import accumulation_dtype
from normswap.layers.gating import BRANCHES, Branch
from normswap.layers.switch_norm import SwitchNorm
from normswap.surgery.importance import SiteWeights

# The buffers of a compact layer, (C,) each.
_CONSTANTS = ("ln_shift", "mean_offset", "in_factor", "ln_factor", "var_offset")


class CompactNorm(nn.Module):
    """An SN layer in evaluation, with fixed importance weights.

    With a table (N, C) of the moments mean and var of each sample and channel, and those of `ln`, it computes

        mean = mean_weights[in] mean_in + mean_weights[ln] mean_ln + ln_shift sqrt(var_ln + eps) + mean_offset
        var  = in_factor var_in + ln_factor (var_ln + eps) + var_offset
        y    = x scale + shift,  scale = weight / sqrt(var),  shift = bias - mean scale

    in float32 or wider. The variances are means of squared deviations, never E[x^2] - E[x]^2. In training it computes
    the same function; only weight and bias are trained.

    Attributes:
        mean_weights: the importance weights of the means of `in` and `ln`, 0 if absent.
        eps: added to the variance of `ln` before the root that `ln_shift` multiplies.
        num_groups: groups of channels that `ln` pools over.
        weight, bias: the parameters (C,) of the layer, or None.
        ln_shift, mean_offset, in_factor, ln_factor, var_offset: constants (C,), or None if they are absent.
        then: names of the modules that run after the norm.
    """

    weight: Tensor | None
    bias: Tensor | None
    ln_shift: Tensor | None
    mean_offset: Tensor | None
    in_factor: Tensor | None
    ln_factor: Tensor | None
    var_offset: Tensor | None

    def __init__(self, layer: SwitchNorm, weights: SiteWeights | None = None) -> None:
        """Compute the constants of a layer, and share its weight and bias.

        Args:
            layer: the layer; it is not changed.
            weights: importance weights to use instead of its own.
        """
        super().__init__()
        self.then: tuple[str, ...] = tuple(getattr(layer, "then", ()))
        for name in self.then:
            setattr(self, name, getattr(layer, name))
        self.num_features = layer.num_features
        self.num_groups = layer.num_groups
        self.eps = layer.normalising_eps
        for name in ("weight", "bias"):
            value = getattr(layer, name)
            if isinstance(value, nn.Parameter) or value is None:
                self.register_parameter(name, value)
            else:  # of a frozen layer
                self.register_buffer(name, value)
        self._register_constants(layer, read_site_weights(layer) if weights is None else weights)
        self.train(layer.training)

    def _register_constants(self, layer: SwitchNorm, weights: SiteWeights) -> None:
        of_mean, of_var = ({branch: found.get(branch, 0.0) for branch in BRANCHES} for found in weights)
        ones = torch.ones(self.num_features, dtype=torch.float64)
        shift, ln_scale, in_scale = (None, None, None) if layer.matching is None else layer.matching
        in_factor = of_var["in"] * (ones if in_scale is None else _as_double(in_scale))
        running_mean, running_var = (
            ones * 0 if statistic is None else _as_double(statistic)
            for statistic in (layer.running_mean, layer.running_var)
        )
        self.mean_weights: dict[Branch, float] = {"in": of_mean["in"], "ln": of_mean["ln"]}
        # Which constants there are follows from the weights alone, so that a file can be read before its tensors.
        constants = {
            "ln_shift": of_mean["ln"] * _as_double(shift) if shift is not None and of_mean["ln"] else None,
            "mean_offset": of_mean["bn"] * running_mean if of_mean["bn"] else None,
            "in_factor": in_factor if of_var["in"] else None,
            "ln_factor": of_var["ln"] * (ones if ln_scale is None else _as_double(ln_scale)) if of_var["ln"] else None,
            "var_offset": of_var["bn"] * (running_var + self.eps) + in_factor * self.eps
            if of_var["in"] or of_var["bn"]
            else None,
        }
        like = next((t for t in (layer.weight, layer.running_mean, layer.mean_weight) if t is not None), ones)
        for name, value in constants.items():
            self.register_buffer(name, None if value is None else value.to(like.device, accumulation_dtype(like)))

    @property
    def needs_positions(self) -> bool:
        """Whether `in` has weight, so that an input needs more than one spatial position."""
        return bool(self.mean_weights["in"]) or self.in_factor is not None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, *spatial), then run the modules in `then`."""
        y = self.normalise(x)
        for name in self.then:
            y = getattr(self, name)(y)
        return y

    def normalise(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, *spatial).

        Raises:
            LayerError: x has one spatial position and `in` has weight.
        """
        return compute_compact_norm(
            x,
            self.weight,
            self.bias,
            *(getattr(self, name) for name in _CONSTANTS),
            in_weight=self.mean_weights["in"],
            ln_weight=self.mean_weights["ln"],
            eps=self.eps,
            num_groups=self.num_groups,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the constants in float32 if the network is cast to half precision."""
        kept = {name: self._buffers[name] for name in _CONSTANTS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype.itemsize < before.dtype.itemsize:
                self._buffers[name] = before.to(after.device, torch.float32)
        return self

    def extra_repr(self) -> str:
        """Return the options of the layer, for `print(model)`."""
        absent = [name for name in _CONSTANTS if getattr(self, name) is None]
        without = f", without {', '.join(absent)}" if absent else ""
        return f"{self.num_features}, eps={self.eps}, num_groups={self.num_groups}{without}"


def compute_compact_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ln_shift: Tensor | None,
    mean_offset: Tensor | None,
    in_factor: Tensor | None,
    ln_factor: Tensor | None,
    var_offset: Tensor | None,
    *,
    in_weight: float,
    ln_weight: float,
    eps: float,
    num_groups: int,
) -> Tensor:
    """Return the normalized x (N, C, *spatial); the arguments are attributes of `CompactNorm`.

    Raises:
        LayerError: x has one spatial position and `in` has weight.
    """
    wide = x.to(accumulation_dtype(x))
    uses_in, uses_ln = bool(in_weight) or in_factor is not None, bool(ln_weight) or ln_factor is not None
    if not (uses_in or uses_ln):
        assert mean_offset is not None
        assert var_offset is not None
        return _batch_norm(wide, weight, bias, mean_offset, var_offset).to(x.dtype)
    # Constants (C,) that broadcast with (N, C, *spatial), and so do all tables.
    ln_shift, mean_offset, in_factor, ln_factor, var_offset, weight, bias = (
        None if each is None else each.reshape(-1, *(1,) * (x.dim() - 2))
        for each in (ln_shift, mean_offset, in_factor, ln_factor, var_offset, weight, bias)
    )
    mean, var = mean_offset, var_offset
    needs_ln_var = ln_shift is not None or ln_factor is not None
    instance_mean: Tensor | None = None
    instance_var: Tensor | None = None
    if uses_in:
        _check_positions(x)
        instance_mean, instance_var = _instance_moments(wide, with_var=in_factor is not None or needs_ln_var)
        mean = _add(mean, _scaled(instance_mean, in_weight))
        var = _add(var, _multiply(instance_var, in_factor))
    if uses_ln:
        ln_mean, ln_var = _layer_moments(wide, instance_mean, instance_var, num_groups, with_var=needs_ln_var)
        mean = _add(mean, _scaled(ln_mean, ln_weight))
        if ln_var is not None:
            ln_var = ln_var + eps
            mean = _add(mean, None if ln_shift is None else ln_var.sqrt() * ln_shift)
            var = _add(var, _multiply(ln_var, ln_factor))
    assert mean is not None
    assert var is not None
    scale = var.rsqrt() if weight is None else weight / var.sqrt()
    shift = -mean * scale if bias is None else bias - mean * scale
    return (wide * scale + shift).to(x.dtype)


# A leaf for FX tracers, whose proxies have no number of dimensions.
torch.fx.wrap("compute_compact_norm")


def read_site_weights(layer: SwitchNorm) -> SiteWeights:
    """Return the importance weights of a layer by branch, as Python numbers."""
    mean, var = (dict(zip(layer.branches, weights.tolist(), strict=True)) for weights in layer.importance_weights())
    return SiteWeights(mean, var)


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()  # MPS has no float64


def _check_positions(x: Tensor) -> None:
    # While a graph is captured, sizes can be symbols; the exporter states the smallest size instead.
    if not torch.compiler.is_compiling() and prod(x.shape[2:]) == 1:
        raise LayerError(
            f"got an input with one spatial position per channel (shape {tuple(x.shape)}), where `in` has no variance: "
            "bake the converted network with example inputs of this size"
        )


def _batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor) -> Tensor:
    """Normalize x by constants (C,); `var` includes eps."""
    mean, var = mean.to(x.dtype), var.to(x.dtype)
    weight, bias = (None if each is None else each.to(x.dtype) for each in (weight, bias))
    return torch.nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, 0.0)


def _instance_moments(x: Tensor, *, with_var: bool) -> tuple[Tensor, Tensor | None]:
    """Return mean and variance over the spatial positions, (N, C, 1, ...); the variance is None without `with_var`."""
    dims = list(range(2, x.dim()))
    mean = x.mean(dims, keepdim=True)
    return mean, (x - mean).square().mean(dims, keepdim=True) if with_var else None


def _layer_moments(
    x: Tensor, instance_mean: Tensor | None, instance_var: Tensor | None, num_groups: int, *, with_var: bool
) -> tuple[Tensor, Tensor | None]:
    """Return mean and variance over groups of channels, that broadcast with x (N, C, *spatial).

    They are pooled from the moments of instances if there are any, since that needs no pass over x.
    """
    values = x if instance_mean is None else instance_mean
    grouped = values if num_groups == 1 else torch.unflatten(values, 1, (num_groups, -1))
    dims = list(range(1 if num_groups == 1 else 2, grouped.dim()))
    mean = grouped.mean(dims, keepdim=True)
    var = None
    if with_var:
        deviation = (grouped - mean).square()
        within = None if instance_var is None else instance_var.reshape(grouped.shape)
        var = (deviation if within is None else deviation + within).mean(dims, keepdim=True)
    if num_groups == 1:
        return mean, var
    return _expand_groups(mean, grouped), None if var is None else _expand_groups(var, grouped)


def _expand_groups(table: Tensor, grouped: Tensor) -> Tensor:
    """Return a table with a value per channel instead of one per group."""
    return table.expand(-1, -1, grouped.shape[2], *(-1,) * (table.dim() - 3)).flatten(1, 2)


def _scaled(table: Tensor, branch_weight: float) -> Tensor | None:
    return None if branch_weight == 0 else table if branch_weight == 1 else table * branch_weight


def _add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Return the sum of two tables; None counts as 0."""
    return second if first is None else first if second is None else first + second


def _multiply(table: Tensor | None, factor: Tensor | None) -> Tensor | None:
    return None if table is None or factor is None else table * factor
