"""The norm state of a network: what a domain changes. Norms, gates and statistics are copied, checked and loaded.

A norm state is a part of the state dict under the same keys, so `torch.save` stores it. Its `_metadata` has the kind
and the branches of each gate, which the shapes of the tensors do not show. Nothing is written before every entry was
checked.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normswap.errors import ArchitectureError
from normswap.layers.gated_module import GatedModule
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.norm_sets.norm_layers import NormLayer, norm_layers
from normswap.surgery.arguments import require_type
from normswap.surgery.wrappers import unwrap
from normswap.text import join_fqn

# The options of a gated layer that decide what its tensors mean.
_OPTIONS = ("gate", "branches", "num_groups")
_MAX_LISTED = 3
_EXPECTED = "a norm state, as normswap.norm_state returns it"

State = Mapping[str, Tensor]


def norm_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the norms, gates and statistics of a network: one set for one domain, some kilobytes.

    It has the weights, biases and running statistics of all norms, converted or not, the gates, and the constants of
    matched branches. `load_norm_state` puts it back. The points of simplex gates are projected first, as by
    `state_dict`. A call of `F.batch_norm` is included if it was converted.

    Args:
        model: a model, converted or not, wrapped or not.

    Returns:
        Detached copies by their keys in the state dict of the model inside its wrappers. `torch.save` stores them with
        the kind of each gate; safetensors stores the tensors alone.

    Raises:
        ArgumentError: `model` is not a module.
        ModelError: a norm has no sizes yet.
        SwapError: a module with converted calls cannot be traced any more.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> state = normswap.norm_state(normswap.convert(model).model)
        >>> [*state][:4]
        ['1.weight', '1.bias', '1.mean_weight', '1.var_weight']
    """
    return _copied(norm_layers(model).values())


def load_norm_state(model: nn.Module, state: State) -> None:
    """Load a norm state into a network, in place: parameters stay the same objects, also for an optimizer.

    Frozen parameters are loaded too. State dicts and norm states do not contain options such as `bn_statistics`, which
    do not change.

    Args:
        model: a model with the same norms as the one whose `norm_state` it was, wrapped or not.
        state: the norm state; values are cast to the dtype of the model.

    Raises:
        ArchitectureError: a key is missing or unexpected, a shape is another one, or a gate has another kind or other
            branches; nothing is loaded.
        ArgumentError: `model` is not a module, or `state` is not a mapping.
        ModelError: a norm has no sizes yet.
        SwapError: a module with converted calls cannot be traced any more.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).train()
        >>> day = normswap.norm_state(model)
        >>> _ = model(torch.randn(4, 3, 8, 8))  # updates the running statistics
        >>> night = normswap.norm_state(model)
        >>> normswap.load_norm_state(model, day)
        >>> int(model[1].num_batches_tracked)
        0
    """
    layers = norm_layers(model)
    check_state(layers, state)
    tensors = _live_tensors(layers.values())
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(state[key])


class SplitState(NamedTuple):
    """The state of a network in two parts; both together are its state dict.

    Attributes:
        shared: copies of everything except norms, gates and statistics, by key.
        local: the norm state.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> [*normswap.split_state(model).shared]
        ['0.weight', '0.bias']
    """

    shared: dict[str, Tensor]
    local: dict[str, Tensor]


SplitState.__module__ = "normswap"  # not in the body, which a NamedTuple keeps for its fields


def split_state(model: nn.Module) -> SplitState:
    """Return what clients of federated learning share, and what stays local with each: norms, gates and statistics.

    Clients that keep their own Batch Normalization are those of FedBN (Li et al., ICLR 2021, "FedBN: Federated Learning
    on Non-IID Features via Local Batch Normalization").

    Args:
        model: a model, converted or not, wrapped or not.

    Returns:
        A `SplitState`. Average `shared` over the clients and load it by
        `model.load_state_dict({**shared, **normswap.norm_state(model)})`, which checks every key.

    Raises:
        ArgumentError: `model` is not a module.
        ModelError: a norm has no sizes yet.
        SwapError: a module with converted calls cannot be traced any more.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> shared, local = normswap.split_state(model)
        >>> model.load_state_dict({**shared, **local})
        <All keys matched successfully>
    """
    layers = norm_layers(model)
    tensors = _live_tensors(layers.values())
    norms = {id(tensor) for tensor in tensors.values()}
    everything = unwrap(model).state_dict(keep_vars=True)
    shared = {
        key: value.detach().clone() if isinstance(value, Tensor) else value
        for key, value in everything.items()
        if id(value) not in norms and key not in tensors
    }
    return SplitState(shared, _copied(layers.values()))


# --- checks -----------------------------------------------------------------------------------------------------------


def check_state(layers: Mapping[str, NormLayer], state: State, argument: str = "state") -> None:
    """Refuse a state that is not one of a network with these layers.

    Raises:
        ArgumentError: it is not a mapping.
        ArchitectureError: its keys, shapes or gates are others.
    """
    require_type(state, Mapping, argument, _EXPECTED)
    tensors = _live_tensors(layers.values())
    missing, unexpected = [key for key in tensors if key not in state], [key for key in state if key not in tensors]
    if missing or unexpected:
        raise ArchitectureError(
            f"{argument}: expected the norm state of a network with the same norms, got another one "
            f"({len(missing)} missing{_listed(missing)}, {len(unexpected)} unexpected{_listed(unexpected)}): save it "
            "with normswap.norm_state after the same conversion"
        )
    metadata: Mapping[str, Any] = getattr(state, "_metadata", {})
    problems = [_shape_problem(key, tensor, state[key]) for key, tensor in tensors.items()]
    for layer in layers.values():
        problems += [_gate_problem(layer, name, state, metadata.get(name, {})) for name in layer.names]
    found = [problem for problem in problems if problem]
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise ArchitectureError(f"{argument}: {found[0]}{more}: load it into a network with the same plan")


def _listed(names: list[str]) -> str:
    more = [f"+{len(names) - _MAX_LISTED} more"] if len(names) > _MAX_LISTED else []
    return f": {', '.join(names[:_MAX_LISTED] + more)}" if names else ""


def _shape_problem(key: str, own: Tensor, value: object) -> str | None:
    if not isinstance(value, Tensor):
        return f"{key}: expected a tensor, got {type(value).__name__}"
    if value.shape != own.shape:
        return f"{key}: expected the shape {tuple(own.shape)}, got {tuple(value.shape)}"
    return None


def _gate_problem(layer: NormLayer, name: str, state: State, stored: Mapping[str, Any]) -> str | None:
    module = layer.module
    if not isinstance(module, GatedModule):
        return None
    for option in _OPTIONS:
        own = getattr(module, option)
        if option in stored and stored[option] != own:
            return f"{name}: expected {option}={own!r}, got {stored[option]!r}"
    for gate in GATE_PARAMETERS:
        value = state.get(join_fqn(name, gate))
        if value is not None and (problem := module.gate_problem(value, stored.get("gate"))):
            return f"{join_fqn(name, gate)}: {problem}"
    return None


# --- copies -----------------------------------------------------------------------------------------------------------


def _live_tensors(layers: Iterable[NormLayer]) -> dict[str, Tensor]:
    return {key: tensor for layer in layers for key, tensor in layer.tensors.items()}


def _copied(layers: Iterable[NormLayer]) -> dict[str, Tensor]:
    """The norm state of layers, an ordered dict with `_metadata`, as state dicts have it."""
    state: Any = OrderedDict()
    state._metadata = OrderedDict()
    for layer in layers:
        if isinstance(layer.module, GatedModule):
            layer.module.project_gates()
            options = {option: getattr(layer.module, option) for option in _OPTIONS}
            state._metadata.update({name: dict(options) for name in layer.names})
        state.update({key: tensor.detach().clone() for key, tensor in layer.tensors.items()})
    return state  # type: ignore[no-any-return]
