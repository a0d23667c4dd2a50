"""The table of norm modules that normswap knows, matched by exact type, and a name for all the others.

A reader turns a module into a `NormSpec`: what it is and what it becomes. A caller adds a class with one entry,
`norms=KNOWN_NORMS | {TheirNorm: read_batch_norm}`. Foreign classes are named, never imported. A class that looks
like a norm and is not in the table is never guessed at: it gets a spec whose `problem` tells what to do.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from normswap.errors import LayerError
from normswap.layers.adoption import check_replaceable, qualified_name
from normswap.layers.gates import GatedModule
from normswap.layers.importance import Branch
from normswap.layers.modules import (
    SwitchNorm,
    SwitchNorm1d,
    SwitchNorm2d,
    SwitchNorm3d,
    SwitchNormAct,
    SwitchNormAct2d,
)
from normswap.surgery.frozen import frozen_eps, has_frozen_structure
from normswap.surgery.norm_candidates import TORCH_KINDS, is_called_batch_norm, looks_like_norm, own_statistics

# The kinds of norms that can be asked for, each with the branch that computes it and what it is called.
KINDS: Mapping[str, tuple[Branch, str]] = MappingProxyType(
    {
        "bn": ("bn", "Batch Normalization"),
        "in": ("in", "Instance Normalization"),
        "gn1": ("ln", "GroupNorm of one group"),
    }
)


def requested_kind(kind: str) -> str:
    """Return the word of `KINDS` that asks for sites of `kind`: all that is nothing else, frozen BN too, is `bn`."""
    return kind if kind in KINDS else "bn"


def vertex_of(kind: str) -> Branch:
    """Return the branch that computes, with weight 1, what a norm of `kind` does."""
    return KINDS[requested_kind(kind)][0]


@dataclass(frozen=True)
class NormSpec:
    """What a norm module is.

    `kind` is the word for it in reports and `target` the class it becomes; `problem` says why it stays, and then
    there is no target. `frozen` norms use running statistics in training too and keep weight and bias as buffers.
    A norm of kind `in` or `gn1` has no running statistics; any other one with a target is BN. `then` names the modules
    that its forward runs after the norm, in order.
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


Reader = Callable[[nn.Module], NormSpec]
Norms = Mapping[str | type, Reader]


def read_batch_norm(module: nn.Module, target: type[SwitchNorm] = SwitchNorm) -> NormSpec:
    """Read a module with torch's BatchNorm attributes and forward pass.

    Args:
        module: of the class that the table has this reader for.
        target: the SwitchNorm class that it becomes; the default takes inputs of any rank.
    """
    return NormSpec("bn", module.num_features, module.eps, module.momentum, target)  # type: ignore[arg-type]


def read_frozen_batch_norm(
    module: nn.Module, target: type[SwitchNorm] = SwitchNorm2d, *, eps: float | None = None
) -> NormSpec:
    """Read a norm whose weight, bias, running_mean and running_var are buffers (C,) that never change.

    Args:
        eps: where it is a constant in the forward of the class, and no attribute.
    """
    channels = module.running_mean.shape[0]  # type: ignore[index]
    return NormSpec("frozen bn", channels, module.eps if eps is None else eps, None, target, frozen=True)  # type: ignore[arg-type]


def read_instance_norm(module: nn.Module, target: type[SwitchNorm] = SwitchNorm) -> NormSpec:
    """Read a module with torch's InstanceNorm attributes and forward pass.

    Args:
        module: of the class that the table has this reader for.
        target: the SwitchNorm class that it becomes; the default takes inputs of any rank.
    """
    spec = NormSpec("in", module.num_features, module.eps, None, target)  # type: ignore[arg-type]
    if module.track_running_stats or isinstance(module.running_mean, Tensor):
        problem = "uses running statistics in evaluation (track_running_stats=True), which no InstanceNorm branch has"
        return replace(spec, target=None, problem=f"{problem}: stays as it is")
    return spec


def read_group_norm(module: nn.Module, target: type[SwitchNorm] = SwitchNorm) -> NormSpec:
    """Read a module with torch's GroupNorm attributes and forward pass; of more than one group it stays as it is.

    Args:
        module: of the class that the table has this reader for.
        target: the SwitchNorm class that it becomes; the default takes inputs of any rank.
    """
    if module.num_groups != 1:
        return NormSpec("gn", problem=_STAYS)
    return NormSpec("gn1", module.num_channels, module.eps, None, target)  # type: ignore[arg-type]


def read_norm_act(
    module: nn.Module, read: Reader = read_batch_norm, *, then: Sequence[str] = ("drop", "act")
) -> NormSpec:
    """Read a norm of any rank whose forward runs modules of its own after the norm, such as an activation.

    Args:
        read: reads the norm itself: `read_batch_norm`, `read_frozen_batch_norm`, `read_instance_norm` or
            `read_group_norm`.
        then: the names of these modules, in the order in which they run.

    Returns:
        A spec whose target is `SwitchNormAct`, or a spec with the `problem` that `read` found.

    Raises:
        LayerError: `module` has no attribute of such a name that can be called.

    Examples:
        >>> norms = normswap.KNOWN_NORMS | {TheirNormAct3d: partial(normswap.read_norm_act, then=("activation",))}
        >>> converted = normswap.convert(model, x, norms=norms).model
    """
    missing = [name for name in then if not callable(getattr(module, name, None))]
    if missing:
        raise LayerError(f"read_norm_act: expected modules or functions named {tuple(then)}, found no {missing[0]!r}")
    spec = read(module)
    return spec if spec.target is None else replace(spec, target=SwitchNormAct, then=tuple(then))


def _read_sync(module: nn.Module) -> NormSpec:
    return replace(read_batch_norm(module), synchronize=True)


def _read_act(module: nn.Module) -> NormSpec:
    return _with_activation(module, read_batch_norm(module, SwitchNormAct2d))


def _read_sync_act(module: nn.Module) -> NormSpec:
    return replace(_read_act(module), synchronize=True)


def _read_frozen_act(module: nn.Module) -> NormSpec:
    return _with_activation(module, read_frozen_batch_norm(module, SwitchNormAct2d))


def _read_group_act(module: nn.Module) -> NormSpec:
    return _with_activation(module, read_group_norm(module, SwitchNormAct2d))


def _with_activation(module: nn.Module, spec: NormSpec) -> NormSpec:
    if spec.target is None or {"act", "drop"} <= {*module._modules}:
        return spec
    return replace(spec, target=None, problem="expected `act` and `drop` inside it: exclude it, or rebuild the model")


_STAYS = "has no batch statistics to lose at small batches: stays as it is"


class KnownNorms(Mapping[str | type, Reader]):
    """A read-only table of norm classes, with a short `repr`: it is the default of arguments."""

    def __init__(self, readers: Mapping[str | type, Reader]) -> None:
        self._readers = dict(readers)

    def __getitem__(self, key: str | type) -> Reader:
        return self._readers[key]

    def __iter__(self) -> Iterator[str | type]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __or__(self, other: Norms) -> dict[str | type, Reader]:
        return {**self._readers, **other}

    def __ror__(self, other: Norms) -> dict[str | type, Reader]:
        return {**other, **self._readers}

    def __repr__(self) -> str:
        return "KNOWN_NORMS"


KNOWN_NORMS = KnownNorms(
    {
        nn.BatchNorm1d: partial(read_batch_norm, target=SwitchNorm1d),
        nn.BatchNorm2d: partial(read_batch_norm, target=SwitchNorm2d),
        nn.BatchNorm3d: partial(read_batch_norm, target=SwitchNorm3d),
        nn.SyncBatchNorm: _read_sync,
        nn.InstanceNorm1d: partial(read_instance_norm, target=SwitchNorm1d),
        nn.InstanceNorm2d: partial(read_instance_norm, target=SwitchNorm2d),
        nn.InstanceNorm3d: partial(read_instance_norm, target=SwitchNorm3d),
        nn.GroupNorm: read_group_norm,
        "timm_3d.layers.norm_act.BatchNormAct3d": read_norm_act,
        "timm_3d.layers.norm_act.SyncBatchNormAct": lambda module: replace(read_norm_act(module), synchronize=True),
        "torchvision.ops.misc.FrozenBatchNorm2d": read_frozen_batch_norm,
        "timm.layers.norm_act.BatchNormAct2d": _read_act,
        "timm.layers.norm_act.SyncBatchNormAct": _read_sync_act,
        "timm.layers.norm_act.FrozenBatchNorm2d": read_frozen_batch_norm,
        "timm.layers.norm_act.FrozenBatchNormAct2d": _read_frozen_act,
        "timm.layers.norm.GroupNorm": read_group_norm,
        "timm.layers.norm.GroupNorm1": read_group_norm,
        "timm.layers.norm_act.GroupNormAct": _read_group_act,
        "timm.layers.norm_act.GroupNorm1Act": _read_group_act,
    }
)


def read_norm(module: nn.Module, norms: Norms = KNOWN_NORMS) -> NormSpec | None:
    """Return what norm `module` is, or None where it is none.

    A spec without `problem` has a target; all others explain in `problem` why the module stays as it is.
    """
    cls = type(module)
    if isinstance(module, GatedModule):
        return NormSpec("sn", problem="is Switchable Normalization already: nothing to do")
    reader = norms.get(cls) or norms.get(qualified_name(cls))
    if reader is None:
        return _unknown(module) if looks_like_norm(module) else None
    spec = NormSpec("bn")
    try:
        spec = reader(module)
        if spec.target is None:
            return spec
        problem = _unfit(module)
        if problem is not None:
            return replace(spec, target=None, problem=problem)
        children = frozenset({*spec.then} & {*module._modules}) if spec.then else spec.target._children
        check_replaceable(module, spec.target, children, vertex=vertex_of(spec.kind), eps=spec.eps)
    except (LayerError, AttributeError) as error:
        known = reader in (KNOWN_NORMS.get(cls), KNOWN_NORMS.get(qualified_name(cls)))
        reader_failed = "is left as it is, since the reader registered for its class in norms= failed"
        expected = f"is not a plain {cls.__name__}" if known else reader_failed
        return replace(spec, target=None, problem=f"{expected}: {error}")
    return spec


def refused_shape(spec: NormSpec, shapes: Sequence[tuple[int, ...]]) -> str | None:
    """Return why a norm that was fed these shapes cannot become its target, or None."""
    ranks = spec.target._ranks if spec.target is not None else ()
    # Two dimensions are (N, C) for a SwitchNorm1d, and (C, L) without a batch for an InstanceNorm1d.
    wrong = next((s for s in shapes if (ranks and len(s) not in ranks) or (spec.kind == "in" and len(s) < 3)), None)
    if wrong is None:
        return None
    shape = "x".join(map(str, wrong))
    if ranks and len(wrong) > ranks[0]:
        any_rank = "SwitchNormAct" if issubclass(spec.target, SwitchNormAct) else "SwitchNorm"  # type: ignore[arg-type]
        taken = " or ".join(f"{rank}-D" for rank in ranks)
        return (
            f"was fed {shape}, and the target of its reader in norms= takes {taken} input: register it with "
            f"target={any_rank}, which takes any rank"
        )
    return f"was fed {shape}, and Switchable Normalization takes (N, C, *spatial): add the dimension of the batch"


def _unfit(module: nn.Module) -> str | None:
    """What was done to an instance that its class does not tell."""
    if "forward" in vars(module):
        return "its forward is overridden on the instance: remove that first"
    computed = [name for name in _STATE if isinstance(vars(module).get(name), Tensor)]
    if computed:
        return (
            f"its {' and '.join(computed)} is computed before each call (pruned, or weight-normalized): make that "
            "permanent first, as with torch.nn.utils.prune.remove"
        )
    return None


def is_norm_layer(module: nn.Module, norms: Norms = KNOWN_NORMS) -> bool:
    """Say whether `module` is a norm by class: known, derived from a torch norm, or a SwitchNorm.

    What such a module calls in its own forward pass is its own affair and no functional site.
    """
    cls = type(module)
    return (
        cls in norms
        or qualified_name(cls) in norms
        or isinstance(module, (*TORCH_KINDS, GatedModule))
        or has_frozen_structure(module)
    )


_STATE = ("weight", "bias", "running_mean", "running_var")


def _unknown(module: nn.Module) -> NormSpec:
    kind = next((kind for base, kind in TORCH_KINDS.items() if isinstance(module, base)), "other")
    if isinstance(module, torch.jit.ScriptModule):
        return NormSpec("other", problem="is TorchScript, whose code is fixed: convert the Python model, then trace it")
    if isinstance(module, LazyModuleMixin):
        return NormSpec(
            kind, problem=f"{qualified_name(type(module))} has no sizes yet: run one forward pass, then convert"
        )
    if hasattr(module, "parametrizations"):
        problem = "is parametrized: call torch.nn.utils.parametrize.remove_parametrizations on it first"
        return NormSpec(kind, problem=problem)
    eps = frozen_eps(module)
    if eps is not None and _unfit(module) is None:
        return read_frozen_batch_norm(module, eps=eps)
    statistics = own_statistics(module)
    foreign = [key for key in statistics if key not in ("running_mean", "running_var")]
    if kind in ("bn", "other") and foreign:
        return NormSpec(kind, problem=_keeps_own_statistics(module, foreign))
    if kind == "bn" or {"running_mean", "running_var"} <= {*statistics} or is_called_batch_norm(type(module)):
        return NormSpec(kind, problem=_not_in_the_table(module, "BatchNorm", "read_batch_norm"))
    if kind == "other" and statistics:
        return NormSpec(kind, problem=_keeps_own_statistics(module, statistics))
    if kind == "in":
        return NormSpec(kind, problem=f"{_STAYS}; {_not_in_the_table(module, 'InstanceNorm', 'read_instance_norm')}")
    if kind == "gn" and module.num_groups == 1:
        return NormSpec(kind, problem=f"{_STAYS}; {_not_in_the_table(module, 'GroupNorm', 'read_group_norm')}")
    return NormSpec(kind, problem=_STAYS)


def _not_in_the_table(module: nn.Module, what: str, reader: str) -> str:
    name, then = qualified_name(type(module)), tuple(module._modules)
    if then:
        what += f" followed by {', '.join(then)}"
        reader = f"partial(read_norm_act, {f'read={reader}, ' * (reader != 'read_batch_norm')}then={then})"
    return (
        f"{name} is not in the table of known norms, and its forward may do more than {what}: if it does not, "
        f'pass norms=KNOWN_NORMS | {{"{name}": {reader}}}'
    )


def _keeps_own_statistics(module: nn.Module, statistics: Sequence[str]) -> str:
    name = qualified_name(type(module))
    return (
        f"{name} keeps batch statistics under names of its own ({', '.join(statistics)}), which are not read: stays as "
        "it is; if its forward is that of BatchNorm, rename them to running_mean and running_var and pass "
        f'norms=KNOWN_NORMS | {{"{name}": read_batch_norm}}'
    )
