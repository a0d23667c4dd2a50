"""Norm modules: the table of known classes, how their modules are read, and what to do about all other norms.

A reader turns a module into a `NormSpec`. Users add a class with one entry, such as `norms=KNOWN_NORMS | {TheirNorm:
read_batch_norm}`; classes of other libraries are named by strings and not imported. A class that is not in the table
but looks like a norm is not converted, and its spec names a remedy; only frozen BN is recognized under any class name.
"""

import copy
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from normswap.errors import ArgumentError, LayerError
from normswap.layers.gated_module import GatedModule
from normswap.layers.in_place import check_replaceable, qualified_name, shallow_copy
from normswap.layers.switch_norm import (
    SwitchNorm,
    SwitchNorm1d,
    SwitchNorm2d,
    SwitchNorm3d,
    SwitchNormAct,
    SwitchNormAct2d,
)
from normswap.model_state import seeded
from normswap.surgery.selection import branch_of_kind

_logger = logging.getLogger(__name__)

_STATE = ("weight", "bias", "running_mean", "running_var")
NO_BATCH_STATISTICS = "has no batch statistics, so small batches do not harm it: left as it is"


@dataclass(frozen=True)
class NormSpec:
    """The kind and the values of a norm module, and the class that replaces its own.

    Attributes:
        kind: such as `bn`, `frozen bn`; a norm with a target is BN unless its kind is `in`, `gn1` or `gn`.
        num_features, eps, momentum: its values; `num_features` is the number of channels.
        target: the class that it becomes, None if there is a `problem`.
        frozen: it uses running statistics also in training, and its weight and bias are buffers.
        synchronize: it uses the joint batch of all processes.
        problem: why it is not swapped, and the remedy.
        then: the names of the modules that its forward runs after the norm, in order.
        num_groups: of a GroupNorm.
    """

    kind: str
    num_features: int = 0
    eps: float | None = None
    momentum: float | None = None
    target: type[SwitchNorm] | None = None
    frozen: bool = False
    synchronize: bool = False
    problem: str | None = None
    then: tuple[str, ...] = ()
    num_groups: int = 1


NormReader = Callable[[nn.Module], NormSpec]
NormTable = Mapping[str | type, NormReader]


# --- readers ----------------------------------------------------------------------------------------------------------


def read_batch_norm(module: nn.Module, target: type[SwitchNorm] = SwitchNorm) -> NormSpec:
    """Read a module that has the attributes and the forward pass of torch's BatchNorm.

    Args:
        module: an instance of the class for which the table has this reader.
        target: the SwitchNorm class that it becomes; the default takes inputs of any rank.

    Returns:
        A spec of kind `bn`.

    Examples:
        >>> import torch, normswap
        >>> class TheirNorm(torch.nn.BatchNorm2d): ...
        >>> normswap.convert(TheirNorm(8), norms=normswap.KNOWN_NORMS | {TheirNorm: normswap.read_batch_norm})
        Conversion(SwitchNorm, 1 swap, 0 skips)
    """
    return NormSpec("bn", module.num_features, module.eps, module.momentum, target)  # type: ignore[arg-type]


def read_frozen_batch_norm(
    module: nn.Module, target: type[SwitchNorm] = SwitchNorm2d, *, eps: float | None = None
) -> NormSpec:
    """Read a norm whose weight, bias, running_mean and running_var are constant buffers (C,); `eps` if no attribute."""
    channels = module.running_mean.shape[0]  # type: ignore[index]
    return NormSpec("frozen bn", channels, module.eps if eps is None else eps, None, target, frozen=True)  # type: ignore[arg-type]


def read_instance_norm(module: nn.Module, target: type[SwitchNorm] = SwitchNorm) -> NormSpec:
    """Read a module that has the attributes and the forward pass of torch's InstanceNorm.

    Args:
        module, target: as in `read_batch_norm`.

    Returns:
        A spec of kind `in`; with running statistics it has a problem, since no branch computes that norm.

    Examples:
        >>> import torch, normswap
        >>> normswap.read_instance_norm(torch.nn.InstanceNorm2d(8)).kind
        'in'
    """
    spec = NormSpec("in", module.num_features, module.eps, None, target)  # type: ignore[arg-type]
    if module.track_running_stats or isinstance(module.running_mean, Tensor):
        problem = "uses running statistics in evaluation (track_running_stats=True), which no InstanceNorm branch has"
        return replace(spec, target=None, problem=f"{problem}: left as it is")
    return spec


def read_group_norm(module: nn.Module, target: type[SwitchNorm] = SwitchNorm) -> NormSpec:
    """Read a module that has the attributes and the forward pass of torch's GroupNorm.

    Args:
        module, target: as in `read_batch_norm`.

    Returns:
        A spec of kind `gn1` for one group, `gn` for several.

    Examples:
        >>> import torch, normswap
        >>> [normswap.read_group_norm(torch.nn.GroupNorm(groups, 8)).kind for groups in (1, 2)]
        ['gn1', 'gn']
    """
    groups: int = module.num_groups  # type: ignore[assignment]
    return NormSpec("gn" if groups > 1 else "gn1", module.num_channels, module.eps, None, target, num_groups=groups)  # type: ignore[arg-type]


def read_norm_act(
    module: nn.Module, read: NormReader = read_batch_norm, *, then: Sequence[str] = ("drop", "act")
) -> NormSpec:
    """Read a norm of any rank whose forward runs modules of its own after the norm, such as an activation.

    Args:
        module: an instance of the class for which the table has this reader.
        read: the reader of the norm itself, such as `read_batch_norm` or `read_group_norm`.
        then: the names of these modules, in the order in which they run.

    Returns:
        A spec whose target is `SwitchNormAct`, or a spec with the `problem` that `read` found.

    Raises:
        LayerError: `module` has no module or function of such a name.

    Examples:
        >>> import functools, torch, normswap
        >>> class TheirNormAct(torch.nn.BatchNorm3d):
        ...     activation = staticmethod(torch.relu)
        ...     def forward(self, x):
        ...         return self.activation(super().forward(x))
        >>> reader = functools.partial(normswap.read_norm_act, then=("activation",))
        >>> normswap.convert(TheirNormAct(8), norms=normswap.KNOWN_NORMS | {TheirNormAct: reader})
        Conversion(SwitchNormAct, 1 swap, 0 skips)
    """
    missing = [name for name in then if not callable(getattr(module, name, None))]
    if missing:
        raise LayerError(f"read_norm_act: expected modules or functions named {tuple(then)}, found no {missing[0]!r}")
    spec = read(module)
    return spec if spec.target is None else replace(spec, target=SwitchNormAct, then=tuple(then))


def _read_synchronized(module: nn.Module, *, read: NormReader) -> NormSpec:
    return replace(read(module), synchronize=True)


def _read_act_2d(module: nn.Module, *, read: Callable[..., NormSpec] = read_batch_norm) -> NormSpec:
    """Read one of timm's norms (N, C, H, W) with `drop` and `act`."""
    spec = read(module, SwitchNormAct2d)
    if spec.target is None or {"act", "drop"} <= {*module._modules}:
        return spec
    return replace(spec, target=None, problem="expected `act` and `drop` inside it: exclude it, or rebuild the model")


class KnownNorms(Mapping[str | type, NormReader]):
    """A read-only table of norm classes, or their names, with the reader of each; `|` adds entries to a copy.

    Examples:
        >>> import torch, normswap
        >>> normswap.KNOWN_NORMS[torch.nn.GroupNorm] is normswap.read_group_norm
        True
    """

    def __init__(self, readers: Mapping[str | type, NormReader]) -> None:
        self._readers = dict(readers)

    def __getitem__(self, key: str | type) -> NormReader:
        return self._readers[key]

    def __iter__(self) -> Iterator[str | type]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __or__(self, other: NormTable) -> dict[str | type, NormReader]:
        return {**self._readers, **other}

    def __ror__(self, other: NormTable) -> dict[str | type, NormReader]:
        return {**other, **self._readers}

    def __repr__(self) -> str:  # short, since it is the default of arguments
        return "KNOWN_NORMS"


KNOWN_NORMS = KnownNorms(
    {
        nn.BatchNorm1d: partial(read_batch_norm, target=SwitchNorm1d),
        nn.BatchNorm2d: partial(read_batch_norm, target=SwitchNorm2d),
        nn.BatchNorm3d: partial(read_batch_norm, target=SwitchNorm3d),
        nn.SyncBatchNorm: partial(_read_synchronized, read=read_batch_norm),
        nn.InstanceNorm1d: partial(read_instance_norm, target=SwitchNorm1d),
        nn.InstanceNorm2d: partial(read_instance_norm, target=SwitchNorm2d),
        nn.InstanceNorm3d: partial(read_instance_norm, target=SwitchNorm3d),
        nn.GroupNorm: read_group_norm,
        "timm_3d.layers.norm_act.BatchNormAct3d": read_norm_act,
        "timm_3d.layers.norm_act.SyncBatchNormAct": partial(_read_synchronized, read=read_norm_act),
        "torchvision.ops.misc.FrozenBatchNorm2d": read_frozen_batch_norm,
        "timm.layers.norm_act.BatchNormAct2d": _read_act_2d,
        "timm.layers.norm_act.SyncBatchNormAct": partial(_read_synchronized, read=_read_act_2d),
        "timm.layers.norm_act.FrozenBatchNorm2d": read_frozen_batch_norm,
        "timm.layers.norm_act.FrozenBatchNormAct2d": partial(_read_act_2d, read=read_frozen_batch_norm),
        "timm.layers.norm.GroupNorm": read_group_norm,
        "timm.layers.norm.GroupNorm1": read_group_norm,
        "timm.layers.norm_act.GroupNormAct": partial(_read_act_2d, read=read_group_norm),
        "timm.layers.norm_act.GroupNorm1Act": partial(_read_act_2d, read=read_group_norm),
    }
)


def read_norm(module: nn.Module, norms: NormTable = KNOWN_NORMS) -> NormSpec | None:
    """Return the spec of a norm module, or None if `module` is not a norm; it has a target or a `problem`."""
    cls = type(module)
    if isinstance(module, GatedModule):
        return NormSpec("sn", problem="is Switchable Normalization already: nothing to do")
    reader = norms.get(cls) or norms.get(qualified_name(cls))
    if reader is None:
        return _unknown_norm_spec(module) if looks_like_norm(module) else None
    spec = NormSpec("bn")
    try:
        if not isinstance(spec := reader(module), NormSpec):
            raise ArgumentError(f"norms[{cls.__name__}]: expected a NormSpec from the reader, got {spec!r:.60}")
        if spec.target is None:
            return spec
        if problem := _instance_problem(module):
            return replace(spec, target=None, problem=problem)
        children = frozenset({*spec.then} & {*module._modules}) if spec.then else spec.target._expected_children
        check_replaceable(module, spec.target, children, vertex=branch_of_kind(spec.kind), eps=spec.eps)
    except (LayerError, AttributeError) as error:
        is_builtin = reader in (KNOWN_NORMS.get(cls), KNOWN_NORMS.get(qualified_name(cls)))
        failed = "is left as it is, since the reader registered for its class in norms= failed"
        problem = f"is not a plain {cls.__name__}: {error}" if is_builtin else f"{failed}: {error}"
        return replace(spec, target=None, problem=problem)
    return spec


def _instance_problem(module: nn.Module) -> str | None:
    """A change to the instance that its class does not show."""
    if "forward" in vars(module):
        return "its forward is overridden on the instance: remove that first"
    computed = [name for name in _STATE if isinstance(vars(module).get(name), Tensor)]
    if not computed:
        return None
    return (
        f"its {' and '.join(computed)} is computed before each call (pruned, or weight-normalized): make that "
        "permanent first, as with torch.nn.utils.prune.remove"
    )


def is_norm_layer(module: nn.Module, norms: NormTable = KNOWN_NORMS) -> bool:
    """Whether `module` is a norm by class, so that functions called in its own forward are no functional sites."""
    cls = type(module)
    return (
        cls in norms
        or qualified_name(cls) in norms
        or isinstance(module, (*TORCH_KINDS, GatedModule))
        or has_frozen_structure(module)
    )


# --- unknown classes --------------------------------------------------------------------------------------------------

# Norms that torch defines, most derived first, with their kind.
TORCH_KINDS = {_BatchNorm: "bn", _InstanceNorm: "in", nn.GroupNorm: "gn", nn.LayerNorm: "ln", nn.RMSNorm: "rms"}

_STATISTIC_PATTERN = r"(mean|var|variance|cov|covar|covariance|std|wm|whitening|sqrt|sq)"
# Batch statistics by the names that libraries give them: `ra_mean`, `moving_variance`.
_RUNNING_STATISTIC_NAME = re.compile(
    rf"(^|_)(running|moving|ra|ema|avg|population|pop|global)_(\w+_)?{_STATISTIC_PATTERN}(_|\d|$)"
)
_STATISTIC_NAME = re.compile(rf"^{_STATISTIC_PATTERN}$")
_EXCEPTIONS = r"(?!Free|al(?![a-z]))"  # norm-free, normal
_NAMED_NORM = re.compile(rf"[Nn]orm{_EXCEPTIONS}|(?<![A-Z])BN(?!N)|[a-z]BN(?!N)|ABN")
_NAMED_BATCH_NORM = re.compile(r"[Bb]atch_?(Re)?[Nn]orm|BN(?!N)")


def looks_like_norm(module: nn.Module) -> bool:
    """Whether `module` may be a norm: by its torch ancestry, its running statistics, or its name and tensors."""
    if inspect.getattr_static(type(module), "forward") is nn.Module.forward:  # a container without a forward
        return False
    if isinstance(module, tuple(TORCH_KINDS)):
        return True
    if any(looks_like_norm(child) for child in module.children()):
        return bool({"running_mean", "running_var"} & {*module._buffers.keys()})
    has_norm_name = re.search(rf"Norm{_EXCEPTIONS}", type(module).__name__) is not None
    tensors = _own_tensors(module).values()
    vectors = all(not is_lazy(t) and max(t.shape, default=1) == t.numel() for t in tensors)
    return bool(
        running_statistics_names(module)
        or (has_norm_name and (module._parameters or module._buffers))
        or (vectors and tensors and _NAMED_NORM.search(type(module).__name__))
    )


def running_statistics_names(module: nn.Module) -> tuple[str, ...]:
    """Return the tensors whose names are those of running statistics; `mean` or `std` only if the class is a norm's."""
    has_norm_name = _NAMED_NORM.search(type(module).__name__) is not None
    return tuple(
        name
        for name, tensor in _own_tensors(module).items()
        if (_RUNNING_STATISTIC_NAME.search(name) or (has_norm_name and _STATISTIC_NAME.match(name)))
        and not tensor.requires_grad
        and not is_lazy(tensor)
        and (tensor.is_floating_point() or tensor.is_complex())
    )


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    named_tensors = (*module._parameters.items(), *module._buffers.items())
    return {name: tensor for name, tensor in named_tensors if tensor is not None}


def _unknown_norm_spec(module: nn.Module) -> NormSpec:
    """The spec of a module that looks like a norm and is not in the table: frozen BN, or a problem."""
    kind = next((kind for base, kind in TORCH_KINDS.items() if isinstance(module, base)), "other")
    if isinstance(module, torch.jit.ScriptModule):
        return NormSpec("other", problem="is TorchScript, whose code is fixed: convert the Python model, then trace it")
    eps = frozen_eps(module)
    if eps is not None and _instance_problem(module) is None:
        return read_frozen_batch_norm(module, eps=eps)
    return NormSpec(kind, problem=_unknown_problem(module, kind))


def _unknown_problem(module: nn.Module, kind: str) -> str:
    if isinstance(module, LazyModuleMixin):
        return f"{qualified_name(type(module))} has no sizes yet: run one forward pass, then convert"
    if hasattr(module, "parametrizations"):
        return "is parametrized: call torch.nn.utils.parametrize.remove_parametrizations on it first"
    statistics = running_statistics_names(module)
    standard = {"running_mean", "running_var"}
    if kind in ("bn", "other") and not {*statistics} <= standard:
        return _custom_statistics_problem(module, [name for name in statistics if name not in standard])
    if kind == "bn" or standard <= {*statistics} or _NAMED_BATCH_NORM.search(type(module).__name__):
        return _unknown_class_problem(module, "BatchNorm", "read_batch_norm")
    if kind == "other" and statistics:
        return _custom_statistics_problem(module, statistics)
    if kind == "in":
        return f"{NO_BATCH_STATISTICS}; {_unknown_class_problem(module, 'InstanceNorm', 'read_instance_norm')}"
    if kind == "gn":
        return f"{NO_BATCH_STATISTICS}; {_unknown_class_problem(module, 'GroupNorm', 'read_group_norm')}"
    return NO_BATCH_STATISTICS


def _unknown_class_problem(module: nn.Module, what: str, reader: str) -> str:
    name, then = qualified_name(type(module)), tuple(module._modules)
    if then:
        what += f" followed by {', '.join(then)}"
        reader = f"partial(read_norm_act, {f'read={reader}, ' * (reader != 'read_batch_norm')}then={then})"
    return (
        f"{name} is not in the table of known norms, and its forward may do more than {what}: if it does not, "
        f'pass norms=KNOWN_NORMS | {{"{name}": {reader}}}'
    )


def _custom_statistics_problem(module: nn.Module, statistics: Sequence[str]) -> str:
    name = qualified_name(type(module))
    return (
        f"{name} has running statistics under other names ({', '.join(statistics)}), which cannot be read: left as it "
        "is; if its forward is that of BatchNorm, rename them to running_mean and running_var and pass "
        f'norms=KNOWN_NORMS | {{"{name}": read_batch_norm}}'
    )


# --- frozen BN under any class name -----------------------------------------------------------------------------------

# Usual values of eps; a measured eps this close to one of them is that value.
_USUAL_EPS = (0.0, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12)
_RELATIVE_TOLERANCE = 1e-6


def has_frozen_structure(module: nn.Module) -> bool:
    """Whether `module` has exactly the state of a frozen BN: four buffers (C,) with torch's names."""
    if module._parameters or module._modules or {*module._buffers.keys()} != {*_STATE}:
        return False
    shapes = [buffer.shape for buffer in module._buffers.values() if isinstance(buffer, Tensor)]
    return len(shapes) == len(_STATE) and len({*shapes}) == 1 and len(shapes[0]) == 1


@torch.no_grad()
def frozen_eps(module: nn.Module) -> float | None:
    """Return the eps of a frozen BN over (N, C, H, W), or None if `module` is none; its values do not matter.

    A copy with known tensors runs on two inputs: the difference gives eps, and the result must be that of a BN.
    """
    if not has_frozen_structure(module):
        return None
    try:
        bare = shallow_copy(module)  # without hooks, which may write to the user's own objects
        bare._forward_hooks.clear()
        bare._forward_pre_hooks.clear()
        # Tensors of its own, so that a weight of 0 or a tensor on meta does not matter.
        probe = copy.deepcopy(bare).to_empty(device="cpu").double().train()
        channels = len(probe.get_buffer("weight"))
        generator = torch.Generator().manual_seed(0)
        for name in _STATE:
            value = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
            getattr(probe, name).copy_(value * 1e-3 if name == "running_var" else value)
        x = torch.randn(2, channels, 2, 3, generator=generator, dtype=torch.float64)
        with seeded(0):
            y = probe(x)
            scale = (probe(x + 1) - y)[0, :, 0, 0]
        eps = _round_eps(
            ((probe.weight / scale) ** 2 - probe.running_var).median().item(), getattr(module, "eps", None)
        )
        w, b, mean, var = (getattr(probe, name).reshape(1, -1, 1, 1) for name in _STATE)
        expected = (x - mean) * (var + eps).rsqrt() * w + b
    except Exception as error:  # noqa: BLE001 - the probe runs foreign code: if it raises, this is no frozen BN
        _logger.debug("%s is not a frozen BN: %s", qualified_name(type(module)), error)
        return None
    is_batch_norm = isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, expected, rtol=1e-9, atol=1e-9)
    return eps if is_batch_norm and eps >= 0 else None


def _round_eps(measured: float, declared: object) -> float:
    candidates = (declared, *_USUAL_EPS) if isinstance(declared, float) else _USUAL_EPS
    close = (c for c in candidates if abs(measured - c) <= _RELATIVE_TOLERANCE * max(c, 1e-9))
    return next(close, measured)
