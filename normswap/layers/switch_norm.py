"""The modules: `SwitchNorm1d/2d/3d`, and the forms that surgery puts in place of other norms.

Names, shapes and the sense of momentum are torch's, so a BatchNorm state dict is a subset of a SwitchNorm one.
None of these classes is a `_BatchNorm`: torch's converters would otherwise swallow it and drop the gates.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.fx
from torch import Tensor, nn

from normswap.errors import LayerError
from normswap.layers.functional import new_site_name, switch_norm
from normswap.layers.gated_module import GatedModule, get_registered
from normswap.layers.gating import (
    BRANCHES,
    BnStatistics,
    Branch,
    Gate,
    check_bn_statistics,
    check_branches,
    check_gate,
    initial_point,
)
from normswap.layers.in_place import GATE_PARAMETERS, check_replaceable, convert_module, shallow_copy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SwitchNorm(GatedModule):
    """Switchable Normalization over (N, C, *spatial) of any rank from 2 up; the children pin the rank.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, bias, device, dtype: as in `torch.nn.BatchNorm2d`.
        gate: `"softmax"`, the published one, or `"simplex"`.
        branches: which of `in`, `ln`, `bn` are mixed. Leave out `in` where there is one spatial position,
            `ln` where C = 1.
        bn_statistics: what the `bn` branch uses in training: the `"batch"`'s, the `"running"` ones as constants, or
            with `"renorm"` the values of the running ones just updated and the gradients of the batch's.
        synchronize: the `bn` branch takes as its batch in training that of all processes; see `switch_norm`.
        process_group: the processes that share it, default all there are; given, it means `synchronize`. Copies share
            it, pickles leave it out.

    Shapes: weight, bias, running_mean, running_var (C,); mean_weight, var_weight (number of branches,).

    Raises:
        LayerError: unknown gate, branch or `bn_statistics`.
    """

    _ranks: tuple[int, ...] = ()
    _expected_children: frozenset[str] = frozenset()

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    normalising_eps: float

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        gate: Gate = "softmax",
        branches: Sequence[Branch] = BRANCHES,
        bn_statistics: BnStatistics = "batch",
        synchronize: bool = False,
        process_group: "ProcessGroup | None" = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.gate = check_gate(gate)
        self.branches = check_branches(branches)
        self.bn_statistics = check_bn_statistics(bn_statistics)
        self.synchronize = synchronize or process_group is not None
        self.process_group = process_group
        self.site = new_site_name(f"a {type(self).__name__} of {num_features} channels")

        def parameter(present: bool, size: int = num_features) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if present else None

        self.register_parameter("weight", parameter(affine))
        self.register_parameter("bias", parameter(affine and bias))
        self.register_parameter("mean_weight", parameter(True, len(self.branches)))
        self.register_parameter("var_weight", parameter(True, len(self.branches)))
        uses_running_stats = track_running_stats and "bn" in self.branches
        for name in ("running_mean", "running_var"):
            self.register_buffer(
                name, torch.empty(num_features, device=device, dtype=dtype) if uses_running_stats else None
            )
        counter = torch.tensor(0, dtype=torch.long, device=device) if uses_running_stats else None
        self.register_buffer("num_batches_tracked", counter)
        self.reset_parameters()

    @classmethod
    def from_batch_norm(
        cls,
        bn: nn.Module,
        *,
        gate: Gate = "simplex",
        branches: Sequence[Branch] | None = None,
        bn_statistics: BnStatistics | None = None,
    ) -> Self:
        """Return a layer that shares the tensors of `bn` and, with `gate="simplex"`, computes the same function.

        The gates are trainable unless every affine parameter of `bn` is frozen.

        Args:
            bn: a BatchNorm of any rank, or a frozen form of it with (C,) tensors under torch's names as buffers.
            gate: `"softmax"` starts at the uniform mix, which is *not* the same function.
            branches: default all, without `ln` where C = 1; must hold `bn`.
            bn_statistics: default `"batch"`, and `"running"` for a frozen form.

        Raises:
            LayerError: this class does not compute the function of `bn`, or `branches` lacks `bn`.
        """
        check_replaceable(bn, cls, cls._expected_children)
        frozen = "weight" in bn._buffers
        channels = bn.running_mean.shape[0] if isinstance(bn.running_mean, Tensor) else bn.num_features
        chosen = check_branches(branches or (BRANCHES if channels != 1 else ("in", "bn")))
        if "bn" not in chosen:
            raise LayerError(f"branches: expected `bn` among them to start from Batch Normalization, got {chosen}")
        affine = [t for t in (bn.weight, bn.bias) if isinstance(t, Tensor)]
        layer = shallow_copy(bn)
        convert_module(
            layer,
            cls,
            gate=check_gate(gate),
            branches=chosen,
            bn_statistics=check_bn_statistics(bn_statistics or ("running" if frozen else "batch")),
            train_gates=not affine or any(t.requires_grad for t in affine),
            synchronize=isinstance(bn, nn.SyncBatchNorm),
        )
        return layer  # type: ignore[return-value]

    @property
    def eps(self) -> float:
        """The eps of the normalisation, for as long as this layer can be folded as a BN or has nothing to fold.

        Whatever folds a norm into a convolution (`fuse_conv_bn_eval`, the `fuse()` and `reparameterize()` of
        re-parameterisable blocks) reads eps and the running statistics from outside and knows nothing of gates. At
        the `bn` vertex that is right in evaluation; anywhere else it would be wrong without a word. What replaced an
        InstanceNorm or a GroupNorm, is it still and has no running statistics cannot be mistaken.

        Raises:
            LayerError: the importance weights are neither exactly those of BN nor those of such a norm.
        """
        cannot_be_folded = self.running_mean is None and self.is_at(self.vertex)
        if not (cannot_be_folded or self.is_at("bn")):
            raise LayerError(
                "a SwitchNorm layer whose importance weights are not those of BN cannot be folded as one: keep the "
                "layer, or put the old norm back with normswap.revert(model, discard=True)"
            )
        return float(self.__dict__["eps"])

    @eps.setter
    def eps(self, value: float) -> None:
        self.__dict__["eps"] = value
        # Under a name that is no property too: the compiler of torch 2.8 reads `__dict__` through properties.
        self.normalising_eps = value

    def __dir__(self) -> list[str]:
        """Leave out `eps`, which may raise: torch.jit.trace reads every attribute that a module lists (torch 2.14)."""
        names: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return [name for name in names if name != "eps"]

    def reset_running_stats(self) -> None:
        """Set running mean 0, running variance 1 and the count of batches 0, where they are kept."""
        for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            if getattr(self, name) is not None:
                getattr(self, name).fill_(value)

    def reset_parameters(self) -> None:
        """Set weight 1, bias 0, the gates where the layer starts, and reset the running statistics.

        A layer that replaced a norm starts as that, any other at the uniform mix.
        """
        self.reset_running_stats()
        start = self.vertex if "replaced" in self.__dict__ else None
        with torch.no_grad():
            for name in GATE_PARAMETERS:
                getattr(self, name).copy_(initial_point(self.gate, self.branches, vertex=start))
            for name, value in (("weight", 1), ("bias", 0)):
                if getattr(self, name) is not None:
                    getattr(self, name).fill_(value)

    def forward(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:  # noqa: A002 - torch's name
        """Normalise x (N, C, *spatial); see `switch_norm`. torch's norms call it `input`, and so may a keyword."""
        return apply_layer(self, _resolve_input(self, x, input))

    def extra_repr(self) -> str:
        """Return the options that differ between layers, for `print(model)`."""
        return (
            f"{self.num_features}, eps={self.__dict__['eps']}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, gate={self.gate!r}, branches={self.branches}, "
            f"bn_statistics={self.bn_statistics!r}{', synchronize=True' * self.synchronize}"
        )

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
        if "weight" in self._buffers:  # a frozen site keeps no count and, as torchvision's does, drops a stored one
            state_dict.pop(prefix + "num_batches_tracked", None)
        elif "gate" not in local_metadata and self.num_batches_tracked is not None:
            # Written before torch counted batches (BatchNorm version < 2), or in the published layout.
            count = self.num_batches_tracked
            stored_count = torch.tensor(0, dtype=torch.long) if count.is_meta else count
            state_dict.setdefault(prefix + "num_batches_tracked", stored_count)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _resolve_input(layer: nn.Module, x: Tensor | None, keyword_input: Tensor | None) -> Tensor:
    """Return the input, given as x or as `input`; raise what Python raises for any other number of them."""
    if keyword_input is None:
        if x is None:
            raise TypeError(f"{type(layer).__name__}.forward() missing 1 required positional argument: 'input'")
        return x
    if x is None:
        return keyword_input
    raise TypeError(f"{type(layer).__name__}.forward() got multiple values for argument 'input'")


def apply_layer(layer: SwitchNorm, x: Tensor) -> Tensor:
    """Run a layer's forward pass. A leaf for every FX tracer, so that no trace freezes `layer.training`."""
    ranks = layer._ranks
    if ranks and x.dim() not in ranks:
        raise LayerError(f"expected a {' or '.join(f'{r}-D' for r in ranks)} input, got shape {tuple(x.shape)}")
    training = layer.training
    if training:
        layer.project_gates()
    updates_running_stats = (
        training and layer.track_running_stats and layer.bn_statistics != "running" and "bn" in layer.branches
    )
    uses_running_stats = not training or layer.track_running_stats or layer.bn_statistics == "running"
    return switch_norm(
        x,
        get_registered(layer, "mean_weight"),
        get_registered(layer, "var_weight"),
        get_registered(layer, "running_mean") if uses_running_stats else None,
        get_registered(layer, "running_var") if uses_running_stats else None,
        get_registered(layer, "weight"),
        get_registered(layer, "bias"),
        training,
        _exponential_average_factor(layer) if updates_running_stats else 0.0,
        layer.normalising_eps,
        gate=layer.gate,
        branches=layer.branches,
        bn_statistics=layer.bn_statistics,
        num_batches_tracked=get_registered(layer, "num_batches_tracked") if updates_running_stats else None,
        synchronize=layer.synchronize,
        process_group=layer.process_group,
        site=layer.site,
    )


torch.fx.wrap("apply_layer")


def _exponential_average_factor(layer: SwitchNorm) -> float:
    """The share of the next batch in the running statistics: the momentum, or that of a plain average."""
    if layer.momentum is not None:
        return layer.momentum
    return 1.0 / (float(layer.num_batches_tracked) + 1.0) if layer.num_batches_tracked is not None else 0.0


class SwitchNorm1d(SwitchNorm):
    """Switchable Normalization over (N, C) or (N, C, L). For (N, C) give `branches=("ln", "bn")`."""

    _ranks = (2, 3)


class SwitchNorm2d(SwitchNorm):
    """Switchable Normalization over (N, C, H, W)."""

    _ranks = (4,)


class SwitchNorm3d(SwitchNorm):
    """Switchable Normalization over (N, C, D, H, W)."""

    _ranks = (5,)


class SwitchNormAct(SwitchNorm):
    """Switchable Normalization over (N, C, *spatial) of any rank from 2 up, then the modules named in `then`, in order.

    Args:
        act, drop: modules, identity by default; the rest as in `SwitchNorm`.

    A layer that replaced another norm has that norm's own modules, and their names in `then`.

    Examples:
        >>> layer = SwitchNormAct(8, act=torch.nn.ReLU())
        >>> bool((layer(torch.randn(2, 8, 4, 4, 4)) >= 0).all())
        True
    """

    _expected_children = frozenset({"act", "drop"})
    # Attributes, so that what was pickled before there was a choice has it too.
    then: tuple[str, ...] = ("drop", "act")

    def __init__(
        self, num_features: int, *args: Any, act: nn.Module | None = None, drop: nn.Module | None = None, **options: Any
    ) -> None:
        super().__init__(num_features, *args, **options)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:  # noqa: A002 - torch's name
        """Normalise x (N, C, *spatial), then run what `then` names; `input` is another name for x."""
        y = apply_layer(self, _resolve_input(self, x, input))
        for name in self.then:
            y = getattr(self, name)(y)
        return y


class SwitchNormAct2d(SwitchNormAct, SwitchNorm2d):
    """`SwitchNormAct` over (N, C, H, W): what replaces timm's BatchNormAct2d."""


class FunctionalSwitchNorm(GatedModule):
    """The gates of a functional site; called with the arguments of `F.batch_norm` in its place.

    Running statistics and affine parameters stay where the owner keeps them, under their own names.
    """

    # Which of the functions that normalize it was put in place of; surgery tells.
    replaced_call = "torch.nn.functional.batch_norm"

    def __init__(self, *, gate: Gate, branches: Sequence[Branch], bn_statistics: BnStatistics = "batch") -> None:
        super().__init__()
        self.gate = check_gate(gate)
        self.branches = check_branches(branches)
        self.bn_statistics = check_bn_statistics(bn_statistics)
        for name in GATE_PARAMETERS:
            self.register_parameter(name, nn.Parameter(torch.empty(len(self.branches))))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Put the gates back where a functional site starts: at the `bn` vertex, or at the uniform softmax."""
        with torch.no_grad():
            for name in GATE_PARAMETERS:
                getattr(self, name).copy_(initial_point(self.gate, self.branches, vertex="bn"))

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
        """Normalise x (N, C, *spatial); arguments as in `F.batch_norm`."""
        statistics = {"running_mean": running_mean, "running_var": running_var}
        return apply_site(self, x, training, weight=weight, bias=bias, momentum=momentum, eps=eps, **statistics)

    def extra_repr(self) -> str:
        """Return the options that differ between sites."""
        return (
            f"gate={self.gate!r}, branches={self.branches}, bn_statistics={self.bn_statistics!r}"
            f"{', synchronize=True' * self.synchronize}"
        )


def apply_site(site: FunctionalSwitchNorm, x: Tensor, training: bool, **options: Any) -> Tensor:
    """Run a functional site. A leaf for every FX tracer, as `apply_layer`."""
    if training and site.training:  # without running statistics, `training=True` comes in evaluation too
        site.project_gates()
    options |= {"gate": site.gate, "branches": site.branches, "bn_statistics": site.bn_statistics}
    options |= {"synchronize": site.synchronize and site.training, "process_group": site.process_group}
    options["site"] = site.site
    return switch_norm(x, site.mean_weight, site.var_weight, training=training, **options)


torch.fx.wrap("apply_site")
