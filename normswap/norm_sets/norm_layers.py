"""The norm layers of a model with the live tensors of each: norm modules, SN layers and functional sites.

The tensors of a functional site belong to the module that makes the call, under any names; the graph of its forward
shows which they are. The gates are those of a child of this module.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from normswap.errors import ModelError
from normswap.layers.in_place import GATE_PARAMETERS, STATISTICS
from normswap.surgery.arguments import require_module
from normswap.surgery.graphs.rewriting import SiteTensors, functional_site_tensors
from normswap.surgery.module_tree import ModuleEntry, walk_modules
from normswap.surgery.norms.classes import NormSpec, read_norm, running_statistics_names
from normswap.surgery.wrappers import unwrap
from normswap.text import join_fqn


@dataclass(frozen=True, eq=False)
class RunningStatistics:
    """The running mean and variance (C,) of a layer, and its counter of batches, if it has one."""

    mean: Tensor
    var: Tensor
    count: Tensor | None


@dataclass(frozen=True, eq=False)
class NormLayer:
    """One norm of a model.

    Attributes:
        names: all names of its module, or of the gates of a functional site.
        module: this module.
        tensors: its tensors by every key that they have in the state dict.
        statistics: of a layer with BN or the `bn` branch; None for other norms, whose statistics are averages over
            samples.
    """

    names: tuple[str, ...]
    module: nn.Module
    tensors: Mapping[str, Tensor]
    statistics: RunningStatistics | None

    def affine(self) -> dict[str, nn.Parameter]:
        """Return weight and bias by key: all parameters except gates and statistics."""
        buffers = () if self.statistics is None else (self.statistics.mean, self.statistics.var)
        others = {id(tensor) for tensor in (*buffers, *(self.module._parameters.get(n) for n in GATE_PARAMETERS))}
        return {
            key: tensor
            for key, tensor in self.tensors.items()
            if isinstance(tensor, nn.Parameter) and id(tensor) not in others
        }

    def gates(self) -> dict[str, nn.Parameter]:
        """Return the gate parameters by key."""
        gates = {id(self.module._parameters.get(name)) for name in GATE_PARAMETERS}
        return {
            key: tensor
            for key, tensor in self.tensors.items()
            if isinstance(tensor, nn.Parameter) and id(tensor) in gates
        }


def norm_layers(model: nn.Module) -> dict[str, NormLayer]:
    """Return the norm layers of `model`, which may be wrapped, by first name; without those inside TorchScript.

    Raises:
        ArgumentError: `model` is not a module.
        ModelError: a norm has no sizes yet.
        SwapError: the forward of a module with functional sites cannot be traced any more.
    """
    everything = walk_modules(unwrap(require_module(model)))
    # The code of TorchScript is fixed, and its tensors are new objects at each access.
    entries = tuple(entry for entry in everything if not isinstance(entry.module, torch.jit.ScriptModule))
    keys = _keys_by_tensor(entries)
    calls = {entry.module: found for entry in entries if (found := functional_site_tensors(entry.module))}
    sites = {owner.get_submodule(child): tensors for owner, found in calls.items() for child, tensors in found.items()}
    # The graph of a module that makes calls shows which of its tensors are those of a norm.
    norms = {entry: read_norm(entry.module) for entry in entries if entry.module not in calls}
    return {
        entry.names[0]: _norm_layer(entry, spec, sites.get(entry.module), keys)
        for entry, spec in norms.items()
        if spec is not None
    }


def _keys_by_tensor(entries: tuple[ModuleEntry, ...]) -> dict[int, list[str]]:
    keys: dict[int, list[str]] = {}
    for entry in entries:
        for name, tensor in (*entry.module._parameters.items(), *entry.module._buffers.items()):
            if tensor is not None:
                keys.setdefault(id(tensor), []).extend(join_fqn(owner, name) for owner in entry.names)
    return keys


def _norm_layer(
    entry: ModuleEntry, spec: NormSpec, site: SiteTensors | None, keys: Mapping[int, list[str]]
) -> NormLayer:
    tensors = [*_own_tensors(entry.module)]
    if any(is_lazy(tensor) for tensor in tensors):
        raise ModelError(f"{entry.names[0] or 'the model'} has no sizes yet: run one batch through the model first")
    if spec.kind == "other":  # it may be more than a norm, such as a convolution with statistics
        known = {id(getattr(entry.module, name)) for name in running_statistics_names(entry.module)}
        tensors = [tensor for tensor in tensors if _is_vector(tensor) or id(tensor) in known]
    find = entry.module._buffers.get
    statistics = _statistics(*(find(name) for name in STATISTICS))
    if site is not None:
        # Without those that are in no registry: they are in no state dict either.
        tensors = [tensor for tensor in site if tensor is not None and id(tensor) in keys] + tensors
        statistics = _statistics(site.running_mean, site.running_var, None)
    if isinstance(entry.module, _InstanceNorm):
        statistics = None
    found = {key: tensor for tensor in tensors for key in keys[id(tensor)]}
    return NormLayer(entry.names, entry.module, found, statistics)


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The tensors of a norm, also those from which a parametrized one is computed, but not those of other children."""
    parametrizations = module._modules.get("parametrizations")
    owners = (module, *(() if parametrizations is None else parametrizations.modules()))
    for owner in owners:
        yield from (t for t in (*owner._parameters.values(), *owner._buffers.values()) if t is not None)


def _is_vector(tensor: Tensor) -> bool:
    return tensor.numel() == max(tensor.shape, default=1)


def _statistics(mean: Tensor | None, var: Tensor | None, count: Tensor | None) -> RunningStatistics | None:
    if mean is None or var is None or mean.dim() != 1 or mean.shape != var.shape:
        return None
    return RunningStatistics(mean, var, count)
