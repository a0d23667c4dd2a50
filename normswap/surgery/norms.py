"""The table of norm modules that normswap knows, matched by exact type, and a name for all the others.

A reader turns a module into a `NormSpec`: what it is and what it becomes. A caller adds a class with one entry,
`norms=KNOWN_NORMS | {TheirNorm: read_batch_norm}`. Foreign classes are named, never imported. A class that looks
like a norm and is not in the table is never guessed at: it gets a spec whose `problem` tells what to do.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from normswap.errors import LayerError
from normswap.layers.adoption import check_replaceable, qualified_name
from normswap.layers.gates import GatedModule
from normswap.layers.importance import Branch
from normswap.layers.modules import SwitchNorm, SwitchNorm1d, SwitchNorm2d, SwitchNorm3d, SwitchNormAct2d
from normswap.surgery.frozen import frozen_eps, has_frozen_structure

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
    A norm of kind `in` or `gn1` has no running statistics; any other one with a target is BN.
    """

    kind: str
    num_features: int = 0
    eps: float | None = None
    momentum: float | None = None
    target: type[SwitchNorm] | None = None
    frozen: bool = False
    synchronize: bool = False
    problem: str | None = None


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
        check_replaceable(module, spec.target, spec.target._children, vertex=vertex_of(spec.kind), eps=spec.eps)
    except (LayerError, AttributeError) as error:
        return replace(spec, target=None, problem=f"is not what norms= says of its class: {error}")
    return spec


def refused_shape(spec: NormSpec, shapes: Sequence[tuple[int, ...]]) -> str | None:
    """Return why a norm that was fed these shapes cannot become its target, or None."""
    ranks = spec.target._ranks if spec.target is not None else ()
    # Two dimensions are (N, C) for a SwitchNorm1d, and (C, L) without a batch for an InstanceNorm1d.
    wrong = next((s for s in shapes if (ranks and len(s) not in ranks) or (spec.kind == "in" and len(s) < 3)), None)
    if wrong is None:
        return None
    shape = "x".join(map(str, wrong))
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
        or isinstance(module, (*_TORCH_KINDS, GatedModule))
        or has_frozen_structure(module)
    )


def looks_like_norm(module: nn.Module) -> bool:
    """Say whether `module` is a norm by its torch ancestry, its running statistics, or its name and tensors."""
    if inspect.getattr_static(type(module), "forward") is nn.Module.forward:  # it only holds tensors for another
        return False
    if isinstance(module, tuple(_TORCH_KINDS)) or {"running_mean", "running_var"} & {*module._buffers.keys()}:
        return True
    named = re.search("Norm", type(module).__name__) is not None
    return (
        named
        and bool(module._parameters or module._buffers)
        and not any(looks_like_norm(child) for child in module.children())
    )


_STATE = ("weight", "bias", "running_mean", "running_var")

# Norms that torch defines, most derived first, with their kind.
_TORCH_KINDS: dict[type, str] = {
    _BatchNorm: "bn",
    _InstanceNorm: "in",
    nn.GroupNorm: "gn",
    nn.LayerNorm: "ln",
    nn.RMSNorm: "rms",
}


def _unknown(module: nn.Module) -> NormSpec:
    name = type(module).__name__
    kind = next((kind for base, kind in _TORCH_KINDS.items() if isinstance(module, base)), "other")
    if isinstance(module, torch.jit.ScriptModule):
        return NormSpec("other", problem="is TorchScript, whose code is fixed: convert before scripting")
    if isinstance(module, LazyModuleMixin):
        return NormSpec(kind, problem=f"{name} has no sizes yet: run one forward pass, then convert")
    if hasattr(module, "parametrizations"):
        problem = "is parametrized: call torch.nn.utils.parametrize.remove_parametrizations on it first"
        return NormSpec(kind, problem=problem)
    eps = frozen_eps(module)
    if eps is not None and _unfit(module) is None:
        return read_frozen_batch_norm(module, eps=eps)
    if kind == "bn" or (kind == "other" and {"running_mean", "running_var"} <= {*module._buffers.keys()}):
        return NormSpec(kind, problem=_not_in_the_table(name, "BatchNorm", "read_batch_norm"))
    if kind == "in":
        return NormSpec(kind, problem=f"{_STAYS}; {_not_in_the_table(name, 'InstanceNorm', 'read_instance_norm')}")
    if kind == "gn" and module.num_groups == 1:
        return NormSpec(kind, problem=f"{_STAYS}; {_not_in_the_table(name, 'GroupNorm', 'read_group_norm')}")
    return NormSpec(kind, problem=_STAYS)


def _not_in_the_table(name: str, what: str, reader: str) -> str:
    return (
        f"{name} is not in the table of known norms, and its forward may do more than {what}: if it does not, "
        f"pass norms=KNOWN_NORMS | {{{name}: {reader}}}"
    )
