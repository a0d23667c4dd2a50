"""The base class of modules with gates, and the module that replaces a call of `F.batch_norm`.

Points of a simplex gate and logits of a softmax gate have the same names and shapes. So a state dict stores the kind of
gate in its `_metadata`, and loading refuses the other kind. Checkpoints of the paper's authors have weights (1, C, 1,
1) and logits; a simplex layer loads the softmax of these logits, which is the same function.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.fx
from torch import Tensor, nn

from normswap.errors import LayerError
from normswap.layers.backends import custom_ops
from normswap.layers.backends.interface import is_captured
from normswap.layers.backends.sample_moments import SampleMoments
from normswap.layers.backends.selection import (
    can_read_values,
    is_eager,
    is_jit_tracing,
    needs_custom_op,
    project_points,
)
from normswap.layers.functional import SiteName, switch_norm
from normswap.layers.gating import (
    BnStatistics,
    Branch,
    Gate,
    check_bn_statistics,
    check_branches,
    check_gate,
    check_num_groups,
    importance_weights,
    initial_point,
    is_on_simplex,
)
from normswap.layers.in_place import FROZEN_BUFFERS, GATE_PARAMETERS
from normswap.layers.matching import MATCHING_BUFFERS, Matching, identity_matching, match_statistics
from normswap.layers.published_state import ZERO_LOGIT, read_published_state

# Largest accepted distance of a stored point from the simplex: rounding of three float16 numbers.
_SIMPLEX_TOLERANCE = 1e-2


def get_registered(module: nn.Module, name: str) -> Any:
    """Return a parameter or buffer, in a fifth of the time of the attribute, which matters for small layers."""
    found: Tensor | None = module._parameters.get(name)
    if found is None:
        found = module._buffers.get(name)
    return getattr(module, name) if found is None else found  # a parametrized tensor, or a replica's


class GatedModule(nn.Module):
    """A module with the gate parameters `mean_weight` and `var_weight`, (K,) for K branches.

    Attributes:
        gate, branches, bn_statistics, num_groups: options, as in `switch_norm`.
        site: name for warnings.
        vertex: the branch that computes the norm that this module replaced.
        synchronize: in training, the `bn` branch uses the batch of all processes of `process_group` (None: all).
        ln_mean_shift, ln_var_scale, in_var_scale: the constants (C,) of a matched layer, as in `switch_norm`, for the
            branches that it mixes; else None.
        fixed_moments: returns, for each input, the moments that `in` and `ln` use as constants, or None for those of
            the input; set inside `fixed_sample_statistics`. Copies and pickles leave it out.
    """

    _version = 1

    gate: Gate
    branches: tuple[Branch, ...]
    bn_statistics: BnStatistics
    num_groups: int = 1
    site: SiteName | None = None
    vertex: Branch = "bn"
    synchronize: bool = False
    process_group: "torch.distributed.ProcessGroup | None" = None
    fixed_moments: Callable[[Tensor], SampleMoments | None] | None = None
    mean_weight: nn.Parameter
    var_weight: nn.Parameter
    ln_mean_shift: Tensor | None
    ln_var_scale: Tensor | None
    in_var_scale: Tensor | None

    def __prepare_scriptable__(self) -> Self:
        """Raise for `torch.jit.script`, which calls this before it compiles.

        Raises:
            LayerError: always.
        """
        raise LayerError(
            f"torch.jit.script cannot compile {type(self).__name__}, which selects its kernels in Python: use "
            "torch.jit.trace(model.eval(), example_input), torch.export.export or torch.onnx.export(..., dynamo=True)"
        )

    def importance_weights(self) -> tuple[Tensor, Tensor]:
        """Return the importance weights of the means and of the variances, each (K,), detached."""
        # From the registry: while FX traces, attributes are proxies without values.
        mean, var = (importance_weights(get_registered(self, name).detach(), self.gate) for name in GATE_PARAMETERS)
        return mean, var

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A process group cannot be copied; the copy shares it.
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        module_copy = self.__new__(type(self))
        memo[id(self)] = module_copy
        module_copy.__setstate__(copy.deepcopy(self._lasting_state(), memo))  # type: ignore[no-untyped-call]
        return module_copy

    def __getstate__(self) -> dict[str, Any]:
        # A process group cannot be pickled; a loaded layer uses all processes.
        state = self._lasting_state()
        return {**state, "process_group": None} if state.get("process_group") is not None else state

    def _lasting_state(self) -> dict[str, Any]:
        """Return the attributes without those of a `with` block."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {name: value for name, value in state.items() if name != "fixed_moments"}

    @property
    def matched(self) -> bool:
        """Whether the branches `ln` and `in` are matched to running statistics."""
        return self.matching is not None

    @property
    def matching(self) -> Matching | None:
        """The constants of matched branches; None if the layer is not matched."""
        find = self._constants.get
        shift, in_scale = find("ln_mean_shift"), find("in_var_scale")
        return None if shift is None and in_scale is None else Matching(shift, find("ln_var_scale"), in_scale)

    def match_to(
        self,
        running_mean: Tensor,
        running_var: Tensor,
        *,
        instance_var: Tensor | None = None,
        eps: float | None = None,
    ) -> None:
        """Match the branches to running statistics (C,): write the constants in place.

        Args:
            running_mean, running_var: statistics of the `bn` branch.
            instance_var: expected variance (C,) of one sample over its positions, measured on data; without it
                `in_var_scale` does not change.
            eps: default that of the layer, or 1e-5 for a functional site, where each call has its own.

        Raises:
            LayerError: the layer is not matched, or has another number of channels.
        """
        if self.matching is None:
            raise LayerError(f"expected a matched layer, got a {type(self).__name__} without matching constants")
        channels = next(each.shape[0] for each in self.matching if each is not None)
        for name, tensor in (
            ("running_mean", running_mean),
            ("running_var", running_var),
            ("instance_var", instance_var),
        ):
            if tensor is not None and tensor.shape != (channels,):
                raise LayerError(f"{name} should have the shape {(channels,)} not {tuple(tensor.shape)}")
        eps = getattr(self, "normalising_eps", 1e-5) if eps is None else eps
        found = match_statistics(running_mean, running_var, eps, self.num_groups, instance_var=instance_var)
        with torch.no_grad():
            for name, value in zip(MATCHING_BUFFERS, found, strict=True):
                own = self._constants.get(name)
                if own is not None and value is not None and (name != "in_var_scale" or instance_var is not None):
                    own.copy_(value)

    def _register_matching(self, like: Tensor, channels: int | None) -> None:
        """Register the constants of the mixed branches, as the identity; for None channels register none."""
        constants = Matching() if channels is None else identity_matching(like, channels)
        for (name, branch), constant in zip(MATCHING_BUFFERS.items(), constants, strict=True):
            self.register_buffer(name, constant if branch in self.branches else None)

    @property
    def _constants(self) -> Mapping[str, Tensor | None]:
        """The registry that contains the matching constants: see `in_place.freeze_buffers`."""
        return self._parameters if FROZEN_BUFFERS in self.__dict__ else self._buffers

    def _reset_matching(self) -> None:
        for name, neutral in zip(MATCHING_BUFFERS, (0, 1, 1), strict=True):
            own = self._constants.get(name)
            if own is not None:
                own.fill_(neutral)

    def sample_moments(self, x: Tensor) -> SampleMoments | None:
        """Return the moments that `in` and `ln` use as constants for this call; None for those of x."""
        return None if self.fixed_moments is None else self.fixed_moments(x)

    def is_at(self, branch: Branch) -> bool:
        """Return whether all weight is exactly on `branch`, so that the module computes that norm."""
        if branch not in self.branches:
            return False
        index = self.branches.index(branch)
        return all(bool(weights[index] == 1) for weights in self.importance_weights())

    def project_gates(self) -> None:
        """Project trained simplex points in place: the second step of projected gradient descent.

        A point on the simplex is not written, so that autograd allows a second forward pass before the backward pass.
        """
        # A trace would record the write without `no_grad`. The traced forward pass projects the points itself.
        if self.gate == "simplex" and not is_jit_tracing():
            points = [get_registered(self, name) for name in GATE_PARAMETERS]
            self._project([point for point in points if point.requires_grad])

    def _project(self, points: list[Tensor]) -> None:
        points = [point for point in points if not (can_read_values(point) and is_on_simplex(point))]
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            points = [point for point in points if not is_captured(point)]  # the forward pass projects these itself
        if not points or project_points(points, self.branches):
            return
        with torch.no_grad():
            if points[0].device.type == "cpu" and needs_custom_op(points[0]):
                custom_ops.project_points(points)
                return
            for point in points:
                # Same precision as the forward pass: a half-precision point is projected in float32.
                point.copy_(importance_weights(point, self.gate))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.gate == "simplex":
            # An optimizer moves points off the simplex until the next forward pass. Formats without `_metadata`, such
            # as safetensors, could not distinguish them from logits.
            points = [point for name in GATE_PARAMETERS if (point := self._parameters.get(name)) is not None]
            self._project([point for point in points if is_eager(point)])
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: integers for name, integers in self._integer_buffers().items()})
        for name in vars(self).get(FROZEN_BUFFERS, ()):  # in the order of buffers
            if prefix + name in destination:
                destination[prefix + name] = destination.pop(prefix + name)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["gate"] = self.gate

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        published = read_published_state(state_dict, prefix, self.branches)
        for name in GATE_PARAMETERS:
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor):
                continue  # torch reports missing values and values that are no tensors
            if published is not None:
                if name in published:  # torch reports a gate of other branches
                    state_dict[prefix + name] = self._from_published(value, published[name])
            elif problem := self.gate_problem(value, local_metadata.get("gate")):
                error_msgs.append(f"{prefix}{name}: {problem}")
                state_dict[prefix + name] = getattr(self, name)  # torch loads the other tensors, then raises
        self._add_missing_constants(state_dict, prefix)
        for name, integers in self._integer_buffers().items():
            stored = state_dict.pop(prefix + name, None)
            if isinstance(stored, Tensor):
                integers.copy_(stored)
            elif strict:
                missing_keys.append(prefix + name)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _integer_buffers(self) -> dict[str, Tensor]:
        """The buffers that `in_place.freeze_buffers` made attributes, by name."""
        own = vars(self)
        return {name: own[name] for name in own.get(FROZEN_BUFFERS, ()) if name in own}

    def _from_published(self, value: Tensor, weights: Tensor) -> Tensor:
        """The gate parameter with the importance weights of a published layer; its own logits if they are these."""
        if self.gate == "simplex":
            return weights
        if value.shape == weights.shape and torch.equal(importance_weights(value, "softmax"), weights):
            return value
        return weights.log().clamp(min=ZERO_LOGIT)

    def _add_missing_constants(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Match the branches to the running statistics of a state dict without constants, such as one of BN.

        A state dict whose gates left the old norm is that of a layer that was not matched, and stays so.
        """
        own = {name: constant for name in MATCHING_BUFFERS if (constant := self._constants.get(name)) is not None}
        missing = [name for name in own if prefix + name not in state_dict]
        if not missing:
            return
        like = own[missing[0]]
        mean, var = (state_dict.get(prefix + name) for name in ("running_mean", "running_var"))
        constants = identity_matching(torch.empty(0, dtype=like.dtype), like.shape[0])
        has_statistics = isinstance(mean, Tensor) and isinstance(var, Tensor) and mean.shape == var.shape == like.shape
        if has_statistics and not self._left_vertex(state_dict, prefix):
            assert isinstance(mean, Tensor)
            assert isinstance(var, Tensor)
            constants = match_statistics(mean, var, getattr(self, "normalising_eps", 1e-5), self.num_groups)
        for name, constant in zip(MATCHING_BUFFERS, constants, strict=True):
            if name in missing:
                state_dict[prefix + name] = constant

    def _left_vertex(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether a state dict has gates with weight on other branches than that of the old norm."""
        gates = [state_dict.get(prefix + name) for name in GATE_PARAMETERS]
        points = [gate.detach() for gate in gates if isinstance(gate, Tensor) and not gate.is_meta]
        if self.vertex not in self.branches:
            return bool(points)
        index = self.branches.index(self.vertex)
        shaped = (point for point in points if point.shape == (len(self.branches),))
        return any(float(importance_weights(point, self.gate)[index]) != 1 for point in shaped)

    def gate_problem(self, value: Tensor, stored_gate: str | None) -> str | None:
        """Return why a stored gate parameter cannot be one of this module, or None; `stored_gate` None: unknown."""
        if stored_gate not in (None, self.gate):
            return f"expected a {self.gate} gate, got a {stored_gate} gate in the state dict"
        if stored_gate is None and self.gate == "simplex" and not value.is_meta and not _is_near_simplex(value):
            return (
                f"expected importance weights (non-negative, with sum 1), got {value.tolist()}; if these are logits, "
                "build the layer with gate='softmax'"
            )
        return None


def _is_near_simplex(value: Tensor) -> bool:
    value = value.detach().float()
    return bool((value >= -_SIMPLEX_TOLERANCE).all()) and abs(float(value.sum()) - 1) <= _SIMPLEX_TOLERANCE


# --- functional sites


class FunctionalSwitchNorm(GatedModule):
    """The gates of a call of `F.batch_norm`; called with its arguments in its place.

    Running statistics and affine parameters remain attributes of their module, under their own names.
    """

    # The function whose call this module replaced; set by the conversion.
    replaced_call = "torch.nn.functional.batch_norm"

    def __init__(
        self,
        *,
        gate: Gate,
        branches: Sequence[Branch],
        bn_statistics: BnStatistics = "batch",
        vertex: Branch = "bn",
        num_groups: int = 1,
        matched_channels: int | None = None,
    ) -> None:
        """Create the gates.

        Args:
            gate, branches, bn_statistics, num_groups: options.
            vertex: the branch with all weight at the start; if it is not mixed, all weights are equal.
            matched_channels: the number of channels of a matched site, whose constants start as the identity and are
                set by `match_to`; None: the site is not matched.
        """
        super().__init__()
        self.gate = check_gate(gate)
        self.branches = check_branches(branches)
        self.bn_statistics = check_bn_statistics(bn_statistics)
        self.num_groups = check_num_groups(num_groups, matched_channels)
        self.vertex = vertex
        self._register_matching(torch.empty(0), matched_channels)
        for name in GATE_PARAMETERS:
            self.register_parameter(name, nn.Parameter(torch.empty(len(self.branches))))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the gates to their initial values, such as all weight on `bn`, and matching constants to the identity.

        A softmax gate starts with equal weights.
        """
        start = self.vertex if self.vertex in self.branches else None
        with torch.no_grad():
            for name in GATE_PARAMETERS:
                getattr(self, name).copy_(initial_point(self.gate, self.branches, vertex=start))
            self._reset_matching()

    def forward(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Normalize x (N, C, *spatial); the arguments are those of `F.batch_norm`."""
        statistics = {"running_mean": running_mean, "running_var": running_var}
        return apply_site(self, x, training, weight=weight, bias=bias, momentum=momentum, eps=eps, **statistics)

    def extra_repr(self) -> str:
        """Return the options of the site, for `print(model)`."""
        return (
            f"gate={self.gate!r}, branches={self.branches}, bn_statistics={self.bn_statistics!r}"
            f"{describe_options(self)}"
        )


def describe_options(module: GatedModule) -> str:
    """Return the options that differ from their defaults, for `extra_repr`."""
    groups = f", num_groups={module.num_groups}" if module.num_groups != 1 else ""
    return f"{groups}{', matched=True' * module.matched}{', synchronize=True' * module.synchronize}"


def apply_site(site: FunctionalSwitchNorm, x: Tensor, training: bool, **options: Any) -> Tensor:
    """Run a functional site. A leaf for FX tracers, as `apply_layer`."""
    if training and site.training:  # a call without running statistics passes training=True in evaluation too
        site.project_gates()
    options |= {"gate": site.gate, "branches": site.branches, "bn_statistics": site.bn_statistics}
    options |= {"synchronize": site.synchronize and site.training, "process_group": site.process_group}
    options |= {"matching": site.matching, "num_groups": site.num_groups, "site": site.site}
    options |= {"sample_moments": site.sample_moments(x)}
    return switch_norm(x, site.mean_weight, site.var_weight, training=training, **options)


torch.fx.wrap("apply_site")
