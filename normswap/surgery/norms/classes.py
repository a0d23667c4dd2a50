"""The table of norm modules that normswap knows, matched by exact type, and a name for all the others.

A reader turns a module into a `NormSpec`: what it is and what it becomes. A caller adds a class with one entry,
`norms=KNOWN_NORMS | {TheirNorm: read_batch_norm}`. Foreign classes are named, never imported. A class that looks
like a norm and is not in the table is never guessed at: it gets a spec whose `problem` tells what to do.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from normswap.errors import LayerError
from normswap.layers.gated_module import GatedModule
from normswap.layers.gating import Branch
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
from normswap.surgery.norms.candidates import (
    TORCH_KINDS,
    has_batch_norm_name,
    looks_like_norm,
    running_statistics_names,
)

# MERGED DOC: Frozen Batch Normalization under any class name, recognised by what it holds and by what it computes.


_FROZEN_STATE = ("weight", "bias", "running_mean", "running_var")

# What people write; a measured eps this close to one of them is it.
_USUAL_EPS = (0.0, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12)
_RELATIVE_TOLERANCE = 1e-6


def has_frozen_structure(module: nn.Module) -> bool:
    """Say whether `module` holds just what a frozen BN holds: four buffers (C,) under torch's names."""
    if module._parameters or module._modules or {*module._buffers.keys()} != {*_FROZEN_STATE}:
        return False
    buffers = [buffer for buffer in module._buffers.values() if isinstance(buffer, Tensor)]
    return (
        len(buffers) == len(_FROZEN_STATE) and len({buffer.shape for buffer in buffers}) == 1 and buffers[0].dim() == 1
    )


def frozen_eps(module: nn.Module) -> float | None:
    """Return the eps of a frozen BN over (N, C, H, W), or None where `module` is none; its tensors do not matter."""
    return _measured_eps(module) if has_frozen_structure(module) else None


def _without_hooks(module: nn.Module) -> nn.Module:
    """Hooks of a copy may still write to the user's own objects."""
    module_copy = shallow_copy(module)
    module_copy._forward_hooks.clear()
    module_copy._forward_pre_hooks.clear()
    return module_copy


@torch.no_grad()
def _measured_eps(module: nn.Module) -> float | None:
    try:
        # Tensors of its own, so that every channel tells, also where a weight is 0, and on meta.
        probe = copy.deepcopy(_without_hooks(module)).to_empty(device="cpu").double().train()
        channels = len(probe.get_buffer("weight"))
        generator = torch.Generator().manual_seed(0)
        for name in _FROZEN_STATE:
            value = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
            getattr(probe, name).copy_(value * 1e-3 if name == "running_var" else value)
        x = torch.randn(2, channels, 2, 3, generator=generator, dtype=torch.float64)
        with seeded(0):
            y = probe(x)
            scale = (probe(x + 1) - y)[0, :, 0, 0]
        eps = ((probe.weight / scale) ** 2 - probe.running_var).median().item()
        declared_eps = getattr(module, "eps", None)
        candidates = (declared_eps, *_USUAL_EPS) if isinstance(declared_eps, float) else _USUAL_EPS
        eps = next(
            (
                candidate
                for candidate in candidates
                if abs(eps - candidate) <= _RELATIVE_TOLERANCE * max(candidate, 1e-9)
            ),
            eps,
        )
        w, b, mean, var = (getattr(probe, name).reshape(1, -1, 1, 1) for name in _FROZEN_STATE)
        expected = (x - mean) * (var + eps).rsqrt() * w + b
    except Exception:  # noqa: BLE001 - the probe runs foreign code: whatever it raises, this is no frozen BN
        return None
    is_batch_norm = isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, expected, rtol=1e-9, atol=1e-9)
    return eps if is_batch_norm and eps >= 0 else None


# The kinds of norms that can be asked for, each with the branch that computes it and what it is called.
KINDS: Mapping[str, tuple[Branch, str]] = MappingProxyType(
    {
        "bn": ("bn", "Batch Normalization"),
        "in": ("in", "Instance Normalization"),
        "gn1": ("ln", "GroupNorm of one group"),
    }
)


def base_kind(kind: str) -> str:
    """Return the word of `KINDS` that asks for sites of `kind`: all that is nothing else, frozen BN too, is `bn`."""
    return kind if kind in KINDS else "bn"


def branch_of_kind(kind: str) -> Branch:
    """Return the branch that computes, with weight 1, what a norm of `kind` does."""
    return KINDS[base_kind(kind)][0]


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


NormReader = Callable[[nn.Module], NormSpec]
NormTable = Mapping[str | type, NormReader]


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
        return NormSpec("gn", problem=_NO_BATCH_STATISTICS)
    return NormSpec("gn1", module.num_channels, module.eps, None, target)  # type: ignore[arg-type]


def read_norm_act(
    module: nn.Module, read: NormReader = read_batch_norm, *, then: Sequence[str] = ("drop", "act")
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


_NO_BATCH_STATISTICS = "has no batch statistics to lose at small batches: stays as it is"


class KnownNorms(Mapping[str | type, NormReader]):
    """A read-only table of norm classes, with a short `repr`: it is the default of arguments."""

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


def read_norm(module: nn.Module, norms: NormTable = KNOWN_NORMS) -> NormSpec | None:
    """Return what norm `module` is, or None where it is none.

    A spec without `problem` has a target; all others explain in `problem` why the module stays as it is.
    """
    cls = type(module)
    if isinstance(module, GatedModule):
        return NormSpec("sn", problem="is Switchable Normalization already: nothing to do")
    reader = norms.get(cls) or norms.get(qualified_name(cls))
    if reader is None:
        return _unknown_norm_spec(module) if looks_like_norm(module) else None
    spec = NormSpec("bn")
    try:
        spec = reader(module)
        if spec.target is None:
            return spec
        problem = _instance_problem(module)
        if problem is not None:
            return replace(spec, target=None, problem=problem)
        children = frozenset({*spec.then} & {*module._modules}) if spec.then else spec.target._expected_children
        check_replaceable(module, spec.target, children, vertex=branch_of_kind(spec.kind), eps=spec.eps)
    except (LayerError, AttributeError) as error:
        is_builtin = reader in (KNOWN_NORMS.get(cls), KNOWN_NORMS.get(qualified_name(cls)))
        reader_failed = "is left as it is, since the reader registered for its class in norms= failed"
        expected = f"is not a plain {cls.__name__}" if is_builtin else reader_failed
        return replace(spec, target=None, problem=f"{expected}: {error}")
    return spec


def shape_problem(spec: NormSpec, shapes: Sequence[tuple[int, ...]]) -> str | None:
    """Return why a norm that was fed these shapes cannot become its target, or None."""
    ranks = spec.target._ranks if spec.target is not None else ()
    # Two dimensions are (N, C) for a SwitchNorm1d, and (C, L) without a batch for an InstanceNorm1d.
    wrong = next((s for s in shapes if (ranks and len(s) not in ranks) or (spec.kind == "in" and len(s) < 3)), None)
    if wrong is None:
        return None
    shape = "x".join(map(str, wrong))
    if ranks and len(wrong) > ranks[0]:
        any_rank = "SwitchNormAct" if issubclass(spec.target, SwitchNormAct) else "SwitchNorm"  # type: ignore[arg-type]
        accepted = " or ".join(f"{rank}-D" for rank in ranks)
        return (
            f"was fed {shape}, and the target of its reader in norms= takes {accepted} input: register it with "
            f"target={any_rank}, which takes any rank"
        )
    return f"was fed {shape}, and Switchable Normalization takes (N, C, *spatial): add the dimension of the batch"


def _instance_problem(module: nn.Module) -> str | None:
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


def is_norm_layer(module: nn.Module, norms: NormTable = KNOWN_NORMS) -> bool:
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


def _unknown_norm_spec(module: nn.Module) -> NormSpec:
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
    if eps is not None and _instance_problem(module) is None:
        return read_frozen_batch_norm(module, eps=eps)
    statistics = running_statistics_names(module)
    custom_names = [key for key in statistics if key not in ("running_mean", "running_var")]
    if kind in ("bn", "other") and custom_names:
        return NormSpec(kind, problem=_custom_statistics_problem(module, custom_names))
    if kind == "bn" or {"running_mean", "running_var"} <= {*statistics} or has_batch_norm_name(type(module)):
        return NormSpec(kind, problem=_unknown_class_problem(module, "BatchNorm", "read_batch_norm"))
    if kind == "other" and statistics:
        return NormSpec(kind, problem=_custom_statistics_problem(module, statistics))
    if kind == "in":
        return NormSpec(
            kind,
            problem=f"{_NO_BATCH_STATISTICS}; {_unknown_class_problem(module, 'InstanceNorm', 'read_instance_norm')}",
        )
    if kind == "gn" and module.num_groups == 1:
        return NormSpec(
            kind, problem=f"{_NO_BATCH_STATISTICS}; {_unknown_class_problem(module, 'GroupNorm', 'read_group_norm')}"
        )
    return NormSpec(kind, problem=_NO_BATCH_STATISTICS)


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
        f"{name} keeps batch statistics under names of its own ({', '.join(statistics)}), which are not read: stays as "
        "it is; if its forward is that of BatchNorm, rename them to running_mean and running_var and pass "
        f'norms=KNOWN_NORMS | {{"{name}": read_batch_norm}}'
    )
