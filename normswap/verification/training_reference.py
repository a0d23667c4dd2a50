"""The reference in training: the original model, with the norms of some sites in evaluation (frozen).

A site with `bn_statistics="running"` uses its running statistics as constants in training too. In training it computes
the function of the original norm in evaluation, gradients included, while everything else trains. A norm that is a
module is put in evaluation by its own training flag, so modules inside it, such as a dropout, stay in training. A call
of `F.batch_norm` has no flag: while the reference runs, the calls of these sites get `training=False`, and no others.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.overrides import TorchFunctionMode

from normswap.layers.backends.custom_ops import is_recomputation
from normswap.layers.gated_module import FunctionalSwitchNorm, GatedModule
from normswap.layers.gating import BnStatistics
from normswap.layers.in_place import STATISTICS
from normswap.layers.switch_norm import SwitchNorm
from normswap.surgery.graphs.module_trace import trace_module_forward
from normswap.surgery.graphs.rewriting import is_called_inside_submodule, unused_names
from normswap.surgery.importance import gated_modules
from normswap.surgery.module_tree import Flags, never_updated, walk_modules
from normswap.surgery.norms.functions import (
    NORM_CALLS,
    NormCall,
    all_results,
    batch_norm_nodes,
    call_tensors,
    is_batch_norm_call,
)
from normswap.text import join_fqn, pluralize

TrainingReferenceName = Literal["original", "frozen", "mixed"]

_MAX_LISTED = 3

# For each batch_norm call in the own forward of a module, in order, whether it is frozen; by the mode of the module.
_FrozenCalls = dict[bool, tuple[bool, ...]]


@dataclass(frozen=True)
class TrainingReference:
    """The original model with which a converted one is compared in training.

    Attributes:
        sites: the names of the sites whose original norms are in evaluation.
        others: the number of sites whose original norms train.
        flags: the training flags of the original's norms that are modules, by their first name.
        skip_reason: why the models are not compared in training; empty if they are.
        untrained: the names of the sites that use statistics which were never updated as constants.
    """

    sites: tuple[str, ...] = ()
    others: int = 0
    flags: Flags = field(default_factory=dict)
    skip_reason: str = ""
    untrained: tuple[str, ...] = ()
    _calls: Mapping[nn.Module, _FrozenCalls] = field(default_factory=dict)
    _gates: tuple[GatedModule, ...] = ()

    @property
    def name(self) -> TrainingReferenceName:
        """Whether the norms of no site, of all sites or of some are in evaluation."""
        if not self.sites:
            return "original"
        return "mixed" if self.others else "frozen"

    @property
    def notes(self) -> tuple[str, ...]:
        """A line that names the reference, if it is not the original as it trains, and one on untrained sites."""
        notes = []
        if self.sites and not self.skip_reason:
            norms = "whose norms are"
            if self.others:
                count = pluralize(len(self.sites) + self.others, "site")
                norms = f"in which the norms of {len(self.sites)} of {count} are"
            listed = f": {_join_limited(self.sites)}" if self.others else ""
            notes.append(f"training is compared with the original {norms} in evaluation (frozen){listed}")
        if self.untrained:
            notes.append(
                f"the running statistics of {pluralize(len(self.untrained), 'site')} were never updated (mean 0, "
                f"variance 1), so as constants they do not normalize: {_join_limited(self.untrained)}"
            )
        return tuple(notes)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Freeze the calls of the reference; the flags are set by the caller, together with those of the mode."""
        if not self._calls and not self._gates:
            yield
            return
        mode = _FreezeCalls()
        before = [(gate, gate.bn_statistics) for gate in self._gates]
        with ExitStack() as stack:
            for owner, calls in self._calls.items():
                vars(owner)["forward"] = mode.forward_of(owner, calls)
                stack.callback(vars(owner).pop, "forward")
            for gate, statistics in before:
                gate.bn_statistics = "running"
                stack.callback(setattr, gate, "bn_statistics", statistics)
            stack.enter_context(mode)
            yield


def training_reference(
    first: nn.Module,
    second: nn.Module,
    bn_statistics: BnStatistics | Mapping[str, BnStatistics] | None = None,
    *,
    plain_only: bool = False,
) -> TrainingReference:
    """Return the reference in training for a converted model.

    Args:
        first: the original model.
        second: the converted model.
        bn_statistics: what the sites of the converted model should use in training: one value for all, or values by
            the name of a site; default is what each site uses.
        plain_only: leave out the sites that are converted in `first` too.
    """
    entries = {name: entry for entry in walk_modules(first) for name in entry.names}
    wanted_by_name = bn_statistics if isinstance(bn_statistics, Mapping) else {}
    default = None if isinstance(bn_statistics, Mapping) else bn_statistics
    frozen: list[str] = []
    untrained: list[str] = []
    flags: dict[str, bool] = {}
    gates: list[GatedModule] = []
    calls: dict[str, set[str]] = {}
    training = renorm = missing = 0
    for name, layer in gated_modules(second).items():
        wanted = wanted_by_name.get(name) or default or layer.bn_statistics
        old = entries[name].module if name in entries else None
        owner, _, child = name.rpartition(".")
        if "bn" not in layer.branches or (plain_only and isinstance(old, GatedModule)):
            continue
        if layer.bn_statistics == "running" and never_updated(*(getattr(layer, n, None) for n in STATISTICS)):
            untrained.append(name)
        if isinstance(layer, SwitchNorm) and layer.frozen:
            continue
        if wanted == "batch" or (isinstance(old, GatedModule) and old.bn_statistics == wanted):
            training += wanted == "batch"
            continue
        renorm += wanted == "renorm"
        frozen.append(name)
        if isinstance(old, GatedModule):
            gates.append(old)
        elif old is not None:
            flags[entries[name].names[0]] = False
        elif isinstance(layer, FunctionalSwitchNorm) and owner in entries:
            calls.setdefault(owner, set()).add(child)
        else:
            missing += 1
    owners: dict[nn.Module, _FrozenCalls] = {}
    for owner, names in calls.items():
        module = entries[owner].module
        found = _trace_calls(module)
        if found is None or not names <= {*found.names}:
            missing += len(names)
            continue
        owners[module] = {mode: tuple(name in names for name in order) for mode, order in found.order.items()}
        untrained += [join_fqn(owner, name) for name in found.untrained if name in names]
    return TrainingReference(
        tuple(frozen), training, flags, _skip_reason(renorm, missing), tuple(untrained), owners, tuple(gates)
    )


def _join_limited(names: tuple[str, ...]) -> str:
    listed = [name or "the model" for name in names[:_MAX_LISTED]]
    return ", ".join(listed) + (", ..." if len(names) > _MAX_LISTED else "")


def _skip_reason(renorm: int, missing: int) -> str:
    if renorm:
        return (
            f"skipped: {pluralize(renorm, 'site')} with bn_statistics='renorm', whose function in training the "
            "original model does not have"
        )
    if missing:
        sites = f"{pluralize(missing, 'site')} with running statistics in training {'is' if missing == 1 else 'are'}"
        return f"skipped: {sites} at no norm of the original model"
    return ""


class _OwnCalls(NamedTuple):
    """The batch_norm calls in the own forward of a module, by the names that a conversion gives to their gates.

    Attributes:
        names: the names of the sites, in order.
        order: by the mode of the module, the name for each call in order, None for a call on a kernel.
        untrained: the names of the sites whose running statistics were never updated.
    """

    names: tuple[str, ...]
    order: dict[bool, tuple[str | None, ...]]
    untrained: tuple[str, ...]


def _trace_calls(owner: nn.Module) -> _OwnCalls | None:
    own = trace_module_forward(owner)
    if own.training is None or own.evaluation is None:
        return None
    nodes = batch_norm_nodes(own.evaluation)
    names = unused_names(owner, len(nodes))
    order: dict[bool, tuple[str | None, ...]] = {}
    for training, graph in ((True, own.training), (False, own.evaluation)):
        name_of = dict(zip(batch_norm_nodes(graph), names, strict=True))
        order[training] = tuple(name_of.get(node) for node in graph.nodes if is_batch_norm_call(node))
    statistics = (call_tensors(owner, node, STATISTICS[:2]) for node in nodes)
    untrained = tuple(name for name, found in zip(names, statistics, strict=True) if never_updated(*found))
    return _OwnCalls(tuple(names), order, untrained)


def constant_buffers(converted: nn.Module) -> set[str]:
    """Return the names of the layers' buffers that no forward pass may change: all but the statistics of a batch."""
    return {
        join_fqn(name, buffer)
        for name, layer in gated_modules(converted).items()
        for buffer in layer._buffers
        if layer.bn_statistics == "running" or buffer not in STATISTICS
    }


@dataclass
class _RunningForward:
    """The forward of an owner while it runs: its frozen calls, and the number of its calls so far."""

    frozen: tuple[bool, ...]
    count: int = 0


class _FreezeCalls(TorchFunctionMode):
    """Gives `training=False` to the batch_norm calls of the sites, in the forward of their owners."""

    def __init__(self) -> None:
        super().__init__()
        self._running: list[_RunningForward] = []
        self._frozen_means: dict[int, Any] = {}  # by id, which stays valid while the tensor is referenced

    def forward_of(self, owner: nn.Module, calls: _FrozenCalls) -> Callable[..., Any]:
        """Return a forward of `owner` for an instance attribute, in which the calls are frozen."""
        original = owner.forward

        def run_frozen_forward(*args: Any, **kwargs: Any) -> Any:
            self._running.append(_RunningForward(calls[owner.training]))
            try:
                return original(*args, **kwargs)
            finally:
                self._running.pop()

        self._forward_code = run_frozen_forward.__code__
        return run_frozen_forward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = NORM_CALLS.get(func)
        if call is None or call.kind != "bn":
            return func(*args, **kwargs)
        arguments = dict(zip(call.parameters, args, strict=False)) | kwargs | dict(call.fixed_arguments)
        if not self._is_frozen(arguments):
            return func(*args, **kwargs)
        return _call_in_evaluation(call, arguments)

    def _is_frozen(self, arguments: Mapping[str, Any]) -> bool:
        mean = arguments.get("running_mean")
        if not self._running:
            # Activation checkpointing inside the forward of an owner: the backward pass runs the call again.
            return mean is not None and is_recomputation() and id(mean) in self._frozen_means
        if is_called_inside_submodule(self._forward_code):
            return False
        forward = self._running[-1]
        frozen = forward.count < len(forward.frozen) and forward.frozen[forward.count]
        forward.count += 1
        if mean is None or not frozen:  # without running statistics a call is the same in both modes
            return False
        self._frozen_means[id(mean)] = mean
        return True


def _call_in_evaluation(call: NormCall, arguments: dict[str, Any]) -> Any:
    options = {name: value for name, value in arguments.items() if name not in ("input", "cudnn_enabled")}
    y = nn.functional.batch_norm(arguments["input"], **{**options, "training": False})
    return y if call.results is None else all_results(call, y, arguments)


def is_reference_forward(module: nn.Module) -> bool:
    """Return whether the forward of this object was replaced by `TrainingReference.applied`."""
    forward = vars(module).get("forward")
    return getattr(forward, "__module__", None) == __name__
