"""Running statistics of several clients as those of all their data: the law of total variance.

torch stores the unbiased variance. With n_k values per channel, mean m_k and variance v_k of client k, the squared
deviations (n_k - 1) v_k add up, and the distances of the means are added:

    m = sum n_k m_k / N,   (N - 1) v = sum (n_k - 1) v_k + sum n_k (m_k - m)^2,   N = sum n_k
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import ArgumentError, DataError, PlanError
from normswap.layers.backends.reference import MomentAccumulator
from normswap.norm_sets.norm_layers import NormLayer, RunningStatistics, norm_layers
from normswap.norm_sets.stored_state import check_state
from normswap.running_stats.calibration import Calibration
from normswap.schema import nearest
from normswap.surgery.arguments import require_type

Counts = int | Mapping[str, int] | Calibration

_EXPECTED = "numbers of values, dicts of these by layer, or results of normswap.calibrate, one for each state"


@torch.no_grad()
def pool_statistics(
    model: nn.Module, states: Sequence[Mapping[str, Tensor]], counts: Sequence[Counts]
) -> dict[str, Tensor]:
    """Return the running statistics of the data of all clients together, from those of each client.

    The result is exact if each client calibrated the same network on its own data: it is what `calibrate` computes on
    all data. Running statistics of training are averages over batches, which know no variance between these; pooled,
    they are as accurate as before. Tracked statistics of InstanceNorm are averages over samples and are left out.

    Args:
        model: a network with the norms of the states, wrapped or not; it does not change.
        states: the norm states of the clients.
        counts: for each state the number of values per channel behind its statistics: a `Calibration`, which has it for
            each layer, a dict by name of the layer (0 without an entry), or one number for all layers. The number of
            images gives the same means, if all have the same size, and variances that differ by about 1 / images.

    Returns:
        Pooled means and variances in the dtype of the first state and the sums of `num_batches_tracked`, by key; layers
        without a value are left out. Update an averaged state dict with it.

    Raises:
        ArgumentError: there are no states, or another number of counts, or a count is not a number of values.
        DataError: a layer has a single value.
        PlanError: a count has a name that is not one of a layer with running statistics.
        ArchitectureError: a state does not fit the model.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(8))
        >>> first, second = torch.randn(16, 8, 9, 9), 3 + torch.randn(4, 8, 9, 9)
        >>> states, counts = [], []
        >>> for images in (first, second):
        ...     counts.append(normswap.calibrate(model, [images]))
        ...     states.append(normswap.norm_state(model))
        >>> pooled = normswap.pool_statistics(model, states, counts)
        >>> union = torch.cat([first, second]).transpose(0, 1).flatten(1)
        >>> torch.allclose(pooled["0.running_var"], union.var(1))
        True
    """
    layers = norm_layers(model)
    tracked = {name: layer for name, layer in layers.items() if layer.statistics is not None}
    if len(states) != len(counts) or not states:
        raise ArgumentError(f"counts: expected {_EXPECTED}, got {len(counts)} for {len(states)} states")
    for index, state in enumerate(states):
        check_state(layers, state, f"states[{index}]")
    values = [_values_by_layer(tracked, each, f"counts[{index}]") for index, each in enumerate(counts)]
    pooled: dict[str, Tensor] = {}
    for name, layer in tracked.items():
        of_clients = [each[name] for each in values]
        if any(of_clients):
            pooled |= _pool_layer(name, layer, states, of_clients)
    return pooled


def _values_by_layer(layers: Mapping[str, NormLayer], counts: Counts, argument: str) -> dict[str, int]:
    require_type(counts, int | Mapping | Calibration, argument, _EXPECTED)
    if isinstance(counts, int):
        counts = dict.fromkeys(layers, counts)
    elif isinstance(counts, Calibration):
        counts = {layer.fqn: layer.values for layer in counts.layers}
    for name, count in counts.items():
        if name not in layers:
            near = nearest(name, layers)
            hint = f"; did you mean {near!r}?" if near else ""
            raise PlanError(f"{argument}: {name!r} is not a layer of the model with running statistics{hint}")
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ArgumentError(f"{argument}: expected {_EXPECTED}, got {count!r} for {name!r}")
    return {name: counts.get(name, 0) for name in layers}


def _pool_layer(
    name: str, layer: NormLayer, states: Sequence[Mapping[str, Tensor]], counts: list[int]
) -> dict[str, Tensor]:
    statistics: Any = layer.statistics
    keys = _keys_of(layer, statistics)
    mean_key, var_key = keys[id(statistics.mean)][0], keys[id(statistics.var)][0]
    moments = MomentAccumulator(len(statistics.mean))
    for state, count in zip(states, counts, strict=True):
        mean, var = (state[key].detach().to("cpu", torch.float64) for key in (mean_key, var_key))
        moments.merge(count, mean, var * (count - 1))
    if moments.count < 2:
        raise DataError(
            f"counts: layer {name!r} has a single value per channel, which has no variance: count all values"
        )
    found = {id(statistics.mean): moments.mean, id(statistics.var): moments.squared_deviations / (moments.count - 1)}
    if statistics.count is not None:
        found[id(statistics.count)] = torch.stack(
            [state[keys[id(statistics.count)][0]].cpu() for state in states]
        ).sum()
    return {key: value.to(states[0][key]) for tensor, value in found.items() for key in keys[tensor]}


def _keys_of(layer: NormLayer, statistics: RunningStatistics) -> dict[int, list[str]]:
    """The keys of each statistic: a shared layer has several."""
    tensors = (statistics.mean, statistics.var, statistics.count)
    return {id(each): [key for key, own in layer.tensors.items() if own is each] for each in tensors}
