"""What the names and shapes of tensors tell of a file without an architecture: weights, norms, copies, optimizers.

Reads no value and builds nothing. A batch norm is known by its running statistics. A module that has only a weight and
a bias of one dimension, or the weight alone, is another norm: LayerNorm, GroupNorm, or one without statistics.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normswap.checkpoints.contents import name_of, optimizers_in, weights_in
from normswap.checkpoints.norm_values import norm_groups
from normswap.checkpoints.prefixes import prefixes_of
from normswap.layers.adoption import GATE_PARAMETERS
from normswap.surgery.tree import join

_STATISTICS = ("running_mean", "running_var")
_AFFINE = ({"weight"}, {"weight", "bias"})


@dataclass(frozen=True)
class NormTensors:
    """The tensors of one norm: the name of its module in the file, its channels, and what they show of it.

    `statistics` says whether it is a batch norm, `converted` whether it has importance weights already.
    """

    fqn: str
    channels: int
    statistics: bool
    converted: bool


@dataclass(frozen=True)
class WeightsSurvey:
    """One set of weights in a file: its entry ("" if the file is nothing else), and what its tensors show.

    `parameters` counts the floating values without running statistics, `prefix` is what wrappers put before all names.
    """

    entry: str
    prefix: str
    tensors: int
    parameters: int
    bytes: int
    norms: tuple[NormTensors, ...]

    @property
    def batch_norms(self) -> tuple[NormTensors, ...]:
        """The norms that `--arch none` converts."""
        return tuple(norm for norm in self.norms if norm.statistics and not norm.converted)

    def groups(self) -> dict[str, tuple[NormTensors, ...]]:
        """Return the norms by the outermost module around them, without the prefix; "" for a norm on its own."""
        found: dict[str, list[NormTensors]] = {}
        for norm in self.norms:
            outer, dot, _ = norm.fqn.removeprefix(self.prefix).partition(".")
            found.setdefault(outer if dot else "", []).append(norm)
        return {name: tuple(norms) for name, norms in found.items()}


@dataclass(frozen=True)
class Survey:
    """All weights in a file, and the entries that are states of optimizers."""

    weights: tuple[WeightsSurvey, ...]
    optimizers: tuple[str, ...]


def survey(content: Any) -> Survey:
    """Return what the names and shapes in a file's content tell."""
    weights = tuple(_surveyed(name_of(place), value) for place, value in weights_in(content).items())
    return Survey(weights, tuple(map(name_of, optimizers_in(content))))


def _surveyed(entry: str, value: Any) -> WeightsSurvey:
    state: Mapping[str, Any] = value.state_dict() if isinstance(value, nn.Module) else value
    tensors = {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    trained = (t for key, t in tensors.items() if t.is_floating_point() and not key.endswith(_STATISTICS))
    return WeightsSurvey(
        entry=entry,
        prefix=max((prefix for prefix in prefixes_of(tensors) if _all_begin(tensors, prefix)), key=len),
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in trained),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        norms=_norms(tensors),
    )


def _all_begin(keys: Mapping[str, Any], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in keys)


def _norms(tensors: Mapping[str, Tensor]) -> tuple[NormTensors, ...]:
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, name = key.rpartition(".")
        modules.setdefault(owner, {})[name] = tensor
    batch = {group.fqn for group in norm_groups(tensors)}
    found = []
    for fqn, own in modules.items():
        own_names = {*own} - {*GATE_PARAMETERS}
        vectors = {tuple(own[name].shape) for name in own_names}
        affine = own_names in _AFFINE and len(vectors) == 1 and len(next(iter(vectors))) == 1
        if fqn in batch or affine:
            channels = (own[_STATISTICS[0]] if fqn in batch else own["weight"]).numel()
            found.append(NormTensors(fqn, channels, fqn in batch, join(fqn, GATE_PARAMETERS[0]) in tensors))
    return tuple(found)
