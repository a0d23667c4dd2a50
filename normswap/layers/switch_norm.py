"""The layers `SwitchNorm1d/2d/3d` and `SwitchNormAct`, which also replace other norms.

Names, shapes and the meaning of momentum are those of torch, so the keys of a BatchNorm state dict are a subset of
those of a SwitchNorm. No class derives from torch's `_BatchNorm`: torch's converters would replace it and drop the
gates.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.fx
from torch import Tensor, nn

from normswap.errors import LayerError
from normswap.layers.backends.interface import refuse_non_tensor
from normswap.layers.direct_call import normalise_directly
from normswap.layers.functional import new_site_name, switch_norm
from normswap.layers.gated_module import GatedModule, describe_options, get_registered
from normswap.layers.gating import (
    BRANCHES,
    BnStatistics,
    Branch,
    Gate,
    check_bn_statistics,
    check_branches,
    check_gate,
    check_num_groups,
    initial_point,
)
from normswap.layers.in_place import (
    GATE_PARAMETERS,
    check_replaceable,
    convert_module,
    has_frozen_affine,
    shallow_copy,
)


class SwitchNorm(GatedModule):
    """Switchable Normalization over (N, C, *spatial) of any rank from 2; subclasses fix the rank.

    Arguments and attributes are those of `SwitchNorm2d`.
    """

    _ranks: tuple[int, ...] = ()
    _expected_children: frozenset[str] = frozenset()
    _abbr_ = "bn"  # how mmcv names the layer in its parent, so that weights of a network with BN load

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
        num_groups: int = 1,
        synchronize: bool = False,
        process_group: "torch.distributed.ProcessGroup | None" = None,
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
        self.num_groups = check_num_groups(num_groups, num_features)
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
        self._register_matching(torch.empty(0), None)
        self.reset_parameters()

    @classmethod
    def from_batch_norm(
        cls,
        bn: nn.Module,
        *,
        gate: Gate = "simplex",
        branches: Sequence[Branch] | None = None,
        bn_statistics: BnStatistics = "running",
        matched: bool = True,
    ) -> Self:
        """Return a layer that shares the tensors of a BatchNorm and, with `gate="simplex"`, computes the same function.

        In training this is the function of the BatchNorm in evaluation; with `bn_statistics="batch"`, that of training.
        The gates are trainable unless no affine parameter of `bn` requires a gradient.

        Args:
            bn: a BatchNorm of any rank, or a frozen BatchNorm, whose tensors (C,) are buffers with torch's names.
            gate: `"softmax"` starts with equal weights, which is *not* the same function.
            branches: default all, without `ln` if C = 1; must contain `bn`.
            bn_statistics: as in `switch_norm`.
            matched: match the branches `ln` and `in` to the running statistics, if there are any and the gate is
                `"simplex"`; see `SwitchNorm2d`.

        Returns:
            A new layer; `bn` does not change.

        Raises:
            LayerError: this class does not compute the function of `bn`, or `branches` lacks `bn`.

        Examples:
            >>> import torch, normswap
            >>> bn, x = torch.nn.BatchNorm2d(3), torch.randn(8, 3, 16, 16)
            >>> layer = normswap.SwitchNorm2d.from_batch_norm(bn)
            >>> torch.allclose(layer(x), bn.eval()(x), atol=1e-5)
            True
        """
        check_replaceable(bn, cls, cls._expected_children)
        channels = bn.running_mean.shape[0] if isinstance(bn.running_mean, Tensor) else bn.num_features
        chosen = check_branches(branches or (BRANCHES if channels != 1 else ("in", "bn")))
        if "bn" not in chosen:
            raise LayerError(f"branches: expected `bn` among them to start at batch normalization, got {chosen}")
        affine = [t for t in (bn.weight, bn.bias) if isinstance(t, Tensor)]
        layer = shallow_copy(bn)
        convert_module(
            layer,
            cls,
            gate=check_gate(gate),
            branches=chosen,
            bn_statistics=check_bn_statistics(bn_statistics),
            matched=matched and gate == "simplex" and isinstance(bn.running_mean, Tensor),
            train_gates=not affine or any(t.requires_grad for t in affine),
            synchronize=isinstance(bn, nn.SyncBatchNorm),
        )
        return layer  # type: ignore[return-value]

    @property
    def eps(self) -> float:
        """The number added to the variance.

        Code that folds a norm into a convolution (`fuse_conv_bn_eval`, the `fuse()` and `reparameterize()` methods of
        some models) reads eps and the running statistics and knows no gates. The result is right while all weight is on
        `bn`, and else silently wrong. Layers that replaced an InstanceNorm or a GroupNorm and have no running
        statistics cannot be folded; they answer while they compute that norm.

        Raises:
            LayerError: the importance weights are neither those of BN nor those of such a norm.
        """
        cannot_be_folded = self.running_mean is None and self.is_at(self.vertex)
        if not (cannot_be_folded or self.is_at("bn")):
            raise LayerError(
                "a SwitchNorm layer can be folded as a BatchNorm only while its importance weights are those of BN: "
                "keep the layer, or put the old norm back with normswap.revert(model, discard=True)"
            )
        return self.normalising_eps

    @eps.setter
    def eps(self, value: float) -> None:
        """Set eps; possible with any importance weights."""
        self.normalising_eps = value

    @property
    def frozen(self) -> bool:
        """Whether weight and bias are buffers, as in torchvision's FrozenBatchNorm2d, and cannot be trained."""
        return has_frozen_affine(self)

    def __dir__(self) -> list[str]:
        """List all attributes except `eps`, which can raise: torch.jit.trace reads every attribute (torch 2.14)."""
        names: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return [name for name in names if name != "eps"]

    def reset_running_stats(self) -> None:
        """Reset the running mean to 0, the running variance to 1 and the number of batches to 0."""
        for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            if getattr(self, name) is not None:
                getattr(self, name).fill_(value)

    def reset_parameters(self) -> None:
        """Reset weight to 1, bias to 0, the gates to their initial values, and the running statistics.

        Initially a layer computes the norm that it replaced; with a softmax gate, or if it replaced none, all
        importance weights are equal. Matching constants become the identity, which matches the initial statistics.
        """
        self.reset_running_stats()
        self._reset_matching()
        start = self.vertex if "replaced" in self.__dict__ and self.vertex in self.branches else None
        with torch.no_grad():
            for name in GATE_PARAMETERS:
                getattr(self, name).copy_(initial_point(self.gate, self.branches, vertex=start))
            for name, value in (("weight", 1), ("bias", 0)):
                if getattr(self, name) is not None:
                    getattr(self, name).fill_(value)

    def forward(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:  # noqa: A002 - torch's name
        """Normalize x (N, C, *spatial); see `switch_norm`. `input` is torch's name of this argument."""
        return apply_layer(self, _resolve_input(self, x, input))

    def extra_repr(self) -> str:
        """Return the options of the layer, for `print(model)`."""
        return (
            f"{self.num_features}, eps={self.normalising_eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, gate={self.gate!r}, branches={self.branches}, "
            f"bn_statistics={self.bn_statistics!r}{describe_options(self)}"
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
        if self.frozen:  # has no number of batches and ignores a stored one, as torchvision's FrozenBatchNorm2d
            state_dict.pop(prefix + "num_batches_tracked", None)
        elif "gate" not in local_metadata and self.num_batches_tracked is not None:
            # Saved before torch counted batches (BatchNorm version < 2), or by the paper's code.
            count = self.num_batches_tracked
            stored_count = torch.tensor(0, dtype=torch.long) if count.is_meta else count
            state_dict.setdefault(prefix + "num_batches_tracked", stored_count)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _resolve_input(layer: nn.Module, x: Tensor | None, keyword_input: Tensor | None) -> Tensor:
    """Return the input, passed as x or as `input`; raise TypeError unless exactly one of them is given."""
    if keyword_input is None:
        if x is None:
            raise TypeError(f"{type(layer).__name__}.forward() missing 1 required positional argument: 'input'")
        return x
    if x is None:
        return keyword_input
    raise TypeError(f"{type(layer).__name__}.forward() got multiple values for argument 'input'")


def apply_layer(layer: SwitchNorm, x: Tensor) -> Tensor:
    """Run the forward pass of a layer. A leaf for FX tracers, so that a graph reads `layer.training` at each run."""
    ranks = layer._ranks
    if not isinstance(x, Tensor):
        refuse_non_tensor("input", x)  # type: ignore[unreachable]
    if ranks and x.dim() not in ranks:
        raise LayerError(f"expected a {' or '.join(f'{r}-D' for r in ranks)} input, got shape {tuple(x.shape)}")
    if (y := normalise_directly(layer, x, layer.normalising_eps)) is not None:
        return y
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
        matching=layer.matching,
        num_groups=layer.num_groups,
        sample_moments=layer.sample_moments(x),
        site=layer.site,
    )


torch.fx.wrap("apply_layer")


def _exponential_average_factor(layer: SwitchNorm) -> float:
    """Return the weight of the next batch in the running statistics: the momentum, or that of an average of all."""
    if layer.momentum is not None:
        return layer.momentum
    return 1.0 / (float(layer.num_batches_tracked) + 1.0) if layer.num_batches_tracked is not None else 0.0


class SwitchNorm1d(SwitchNorm):
    """Switchable Normalization over (N, C) or (N, C, L).

    For (N, C) use `branches=("ln", "bn")`, since one position has no variance.

    Args:
        num_features: number of channels C; the other arguments are those of `SwitchNorm2d`.

    Examples:
        >>> import torch, normswap
        >>> normswap.SwitchNorm1d(6)(torch.randn(4, 6, 10)).shape
        torch.Size([4, 6, 10])
        >>> normswap.SwitchNorm1d(6, branches=("ln", "bn"))(torch.randn(4, 6)).shape
        torch.Size([4, 6])
    """

    __module__ = "normswap"
    _ranks = (2, 3)


class SwitchNorm2d(SwitchNorm):
    """Switchable Normalization over (N, C, H, W).

    The layer computes the mean and the variance as weighted sums of instance, layer and batch statistics and learns the
    weights (Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", ICLR 2019, eq. 3 to 5).

    Args:
        num_features: number of channels C.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics; None: average of all batches.
        affine: the layer has weight and bias (C,).
        track_running_stats: the layer has running statistics (C,).
        bias: with `affine`, the layer has a bias.
        gate: `"softmax"`, as in the paper, or `"simplex"`; see `switch_norm`.
        branches: the mixed statistics, of `"in"`, `"ln"` and `"bn"`. Leave out `in` if there is one spatial position,
            `ln` if C = 1.
        bn_statistics: statistics of the `bn` branch in training: `"batch"`, `"running"` or `"renorm"`; see
            `switch_norm`.
        num_groups: `ln` pools over groups of C / num_groups channels, as GroupNorm.
        synchronize: in training, the `bn` branch uses the batch of all processes; see `switch_norm`.
        process_group: these processes, default all; a group implies `synchronize`. Copies of the layer share it,
            pickles leave it out.
        device, dtype: of the tensors.

    Attributes:
        mean_weight, var_weight: gate parameters (K,), K the number of branches.
        weight, bias: (C,), or None.
        running_mean, running_var: (C,), or None.
        num_batches_tracked: number of batches, or None.
        matched: whether the branches `ln` and `in` are matched to the statistics of the BatchNorm that the layer
            replaced: a sample whose own statistics are the running ones has the same output at any mix of `ln` and
            `bn`.
        ln_mean_shift, ln_var_scale, in_var_scale: the constants (C,) of a matched layer, as in `switch_norm`; else
            None.

    Raises:
        LayerError: unknown gate, branch or `bn_statistics`; `num_groups` does not divide C.

    Examples:
        >>> import torch, normswap
        >>> layer = normswap.SwitchNorm2d(6)
        >>> layer(torch.randn(4, 6, 8, 8)).shape
        torch.Size([4, 6, 8, 8])
        >>> mean, var = layer.importance_weights()  # of in, ln and bn
        >>> mean
        tensor([0.3333, 0.3333, 0.3333])
    """

    __module__ = "normswap"
    _ranks = (4,)


class SwitchNorm3d(SwitchNorm):
    """Switchable Normalization over (N, C, D, H, W).

    Args:
        num_features: number of channels C; the other arguments are those of `SwitchNorm2d`.

    Examples:
        >>> import torch, normswap
        >>> normswap.SwitchNorm3d(6)(torch.randn(2, 6, 4, 8, 8)).shape
        torch.Size([2, 6, 4, 8, 8])
    """

    __module__ = "normswap"
    _ranks = (5,)


class SwitchNormAct(SwitchNorm):
    """Switchable Normalization over (N, C, *spatial) of any rank from 2, followed by other modules.

    A layer that replaced a norm with an activation keeps the modules of that norm. `then` has the names of the modules,
    in the order in which they run.

    Args:
        num_features: number of channels C.
        act: activation; default identity.
        drop: runs before the activation; default identity.
        args, options: the other arguments of `SwitchNorm2d`.

    Examples:
        >>> import torch, normswap
        >>> layer = normswap.SwitchNormAct(8, act=torch.nn.ReLU())
        >>> bool((layer(torch.randn(2, 8, 4, 4, 4)) >= 0).all())
        True
    """

    __module__ = "normswap"
    _expected_children = frozenset({"act", "drop"})
    # On the class, because pickles of early versions lack it.
    then: tuple[str, ...] = ("drop", "act")

    def __init__(
        self, num_features: int, *args: Any, act: nn.Module | None = None, drop: nn.Module | None = None, **options: Any
    ) -> None:
        super().__init__(num_features, *args, **options)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:  # noqa: A002 - torch's name
        """Normalize x (N, C, *spatial), then run the modules in `then`. `input` is torch's name of this argument."""
        y = apply_layer(self, _resolve_input(self, x, input))
        for name in self.then:
            y = getattr(self, name)(y)
        return y


class SwitchNormAct2d(SwitchNormAct, SwitchNorm2d):
    """`SwitchNormAct` over (N, C, H, W); replaces timm's BatchNormAct2d."""
