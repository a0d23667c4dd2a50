"""What every module with gates shares: reading them, projecting them, and never mistaking their kind.

Points and logits share names and shapes, so a state dict carries the kind of gate in its `_metadata`, and a
mismatch is refused on loading. Published checkpoints (weights of shape (1, C, 1, 1)) hold logits; a simplex
module stores their softmax, which is the same function.
"""

import copy
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from normswap.errors import LayerError
from normswap.layers.backends import custom_ops
from normswap.layers.backends.interface import is_captured
from normswap.layers.backends.selection import (
    can_read_values,
    is_eager,
    is_jit_tracing,
    needs_custom_op,
    project_points,
)
from normswap.layers.functional import SiteName
from normswap.layers.gating import BnStatistics, Branch, Gate, importance_weights, is_on_simplex
from normswap.layers.in_place import GATE_PARAMETERS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# How far from the simplex a stored point may lie and still be taken for one: float16 rounding of three shares.
_SIMPLEX_TOLERANCE = 1e-2


def get_registered(module: nn.Module, name: str) -> Any:
    """Return a parameter or buffer at a fifth of what an attribute of a module costs, which small layers feel."""
    found: Tensor | None = module._parameters.get(name)
    if found is None:
        found = module._buffers.get(name)
    return getattr(module, name) if found is None else found  # elsewhere where it is parametrized or a replica's


class GatedModule(nn.Module):
    """A module with `mean_weight` and `var_weight` of shape (number of branches,), and what they mean.

    `site` is its name for warnings. `vertex` is the branch at which it is the norm it replaced.
    With `synchronize` its `bn` branch takes, in training, the batch of all processes of `process_group` (None: all of
    them).
    """

    _version = 1

    gate: Gate
    branches: tuple[Branch, ...]
    bn_statistics: BnStatistics
    site: SiteName | None = None
    vertex: Branch = "bn"
    synchronize: bool = False
    process_group: "ProcessGroup | None" = None
    mean_weight: nn.Parameter
    var_weight: nn.Parameter

    def __prepare_scriptable__(self) -> Self:
        """Refuse `torch.jit.script`, which calls this before it compiles.

        Raises:
            LayerError: always.
        """
        raise LayerError(
            f"torch.jit.script cannot compile {type(self).__name__}, which chooses its kernels in Python: use "
            "torch.jit.trace(model.eval(), example_input), torch.export.export or torch.onnx.export(..., dynamo=True)"
        )

    def importance_weights(self) -> tuple[Tensor, Tensor]:
        """Return the importance weights of means and of variances, each (K,), detached."""
        # From the registry: FX hands out proxies for attributes while it traces, and these are values.
        mean, var = (importance_weights(get_registered(self, name).detach(), self.gate) for name in GATE_PARAMETERS)
        return mean, var

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A group of processes cannot be copied: the copy shares it.
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        module_copy = self.__new__(type(self))
        memo[id(self)] = module_copy
        module_copy.__setstate__(copy.deepcopy(super().__getstate__(), memo))  # type: ignore[no-untyped-call]
        return module_copy

    def __getstate__(self) -> dict[str, Any]:
        # Nor can it be stored: what is loaded shares with all processes.
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "process_group": None} if state.get("process_group") is not None else state

    def is_at(self, branch: Branch) -> bool:
        """Say whether the weights are exactly one-hot at `branch`, where the module computes just that norm."""
        if branch not in self.branches:
            return False
        index = self.branches.index(branch)
        return all(bool(weights[index] == 1) for weights in self.importance_weights())

    def project_gates(self) -> None:
        """Put trained simplex points back on the simplex: the second half of projected gradient descent.

        A point that lies there is left alone, so that a second forward pass before a backward pass does not count as a
        change; it has to be readable at no cost, or met by a kernel that reads it on its device.
        """
        # A trace would record the write without its `no_grad`; what it computes projects the points itself.
        if self.gate == "simplex" and not is_jit_tracing():
            points = [get_registered(self, name) for name in GATE_PARAMETERS]
            self._project([point for point in points if point.requires_grad])

    def _project(self, points: list[Tensor]) -> None:
        points = [point for point in points if not (can_read_values(point) and is_on_simplex(point))]
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            points = [point for point in points if not is_captured(point)]  # which the forward pass projects by itself
        if not points or project_points(points, self.branches):
            return
        with torch.no_grad():
            if points[0].device.type == "cpu" and needs_custom_op(points[0]):
                custom_ops.project_points(points)
                return
            for point in points:
                # Read as the forward pass reads it: a half-precision point is projected in float32.
                point.copy_(importance_weights(point, self.gate))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.gate == "simplex":
            # An optimizer has moved points off the simplex, where the next forward pass would put them back: what is
            # stored without `_metadata`, as in safetensors, could not be told from logits.
            points = [point for name in GATE_PARAMETERS if (point := self._parameters.get(name)) is not None]
            self._project([point for point in points if is_eager(point)])
        super()._save_to_state_dict(destination, prefix, keep_vars)
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
        published = _flatten_published(state_dict, prefix)
        for name in GATE_PARAMETERS:
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor):
                continue  # missing, or not a tensor: torch says so in its own words
            if published and self.gate == "simplex":
                state_dict[prefix + name] = importance_weights(value.detach(), "softmax").to(value.dtype)
            elif not published and (problem := self._gate_problem(value, local_metadata.get("gate"))):
                error_msgs.append(f"{prefix}{name}: {problem}")
                state_dict[prefix + name] = getattr(self, name)  # torch loads the rest and then raises
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _gate_problem(self, value: Tensor, stored_gate: str | None) -> str | None:
        if stored_gate not in (None, self.gate):
            return f"expected a {self.gate} gate, the state dict holds a {stored_gate} one"
        if stored_gate is None and self.gate == "simplex" and not value.is_meta and not _is_near_simplex(value):
            return (
                f"expected a point of the simplex (shares >= 0 of sum 1), got {value.tolist()}; "
                "if these are logits, build the layer with gate='softmax'"
            )
        return None


def _is_near_simplex(value: Tensor) -> bool:
    value = value.detach().float()
    return bool((value >= -_SIMPLEX_TOLERANCE).all()) and abs(float(value.sum()) - 1) <= _SIMPLEX_TOLERANCE


def _flatten_published(state_dict: dict[str, Any], prefix: str) -> bool:
    """Flatten (1, C, 1, 1) tensors of the published layout to (C,) in place; say whether that layout was met."""
    published = False
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and value.dim() > 1 and value.numel() == value.shape[1]:
            state_dict[prefix + name] = value.flatten()
            published = True
    return published
