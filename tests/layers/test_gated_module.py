"""Gates of a module: saved points are on the simplex, training moves them, and loading checks the kind of gate."""

import copy
import io
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap.layers.gated_module import FunctionalSwitchNorm, GatedModule
from normswap.layers.gating import BRANCHES, GATES
from normswap.layers.in_place import GATE_PARAMETERS
from normswap.layers.switch_norm import SwitchNorm1d, SwitchNorm2d, SwitchNorm3d
from tests.helpers import oracles

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SGD, momentum 0.9": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
}
OPTIMIZER_CASES = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
GATE_CASES = pytest.mark.parametrize("gate", GATES)

# Points off the simplex, as after an optimizer step.
OFF_SIMPLEX = {
    "beyond the vertex": [-0.4, -0.1, 1.5],
    "sum too large": [0.9, 0.8, 0.7],
    "negative": [-3.0, -1.0, -2.0],
    "far away": [40.0, -70.0, 3.0],
    "beyond float32's unit": [1e10, -1e10, 5.0],
}


def set_gates(layer: GatedModule, mean: list[float], var: list[float] | None = None) -> None:
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor(mean))
        layer.var_weight.copy_(torch.tensor(mean if var is None else var))


def gate_layer(gate: str = "simplex", **options: Any) -> SwitchNorm2d:
    return SwitchNorm2d(4, gate=gate, **options)  # type: ignore[arg-type]


def assert_on_simplex(point: Tensor) -> None:
    point = point.detach().double()
    assert bool((point >= 0).all())
    assert abs(float(point.sum()) - 1) < 1e-6


@pytest.mark.parametrize("point", OFF_SIMPLEX.values(), ids=OFF_SIMPLEX)
def test_a_training_forward_projects_the_stored_point_as_the_oracle(point: list[float]) -> None:
    layer = gate_layer()
    set_gates(layer, point)
    before = layer.importance_weights()
    layer(torch.randn(3, 4, 5, 5))
    expected = oracles.project_by_enumeration(torch.tensor(point))
    for name, weights in zip(GATE_PARAMETERS, before, strict=True):
        stored = getattr(layer, name).detach()
        assert oracles.relative_error(stored, expected) < 1e-6
        assert stored.equal(weights), "projecting the stored point must not change the function"
        assert_on_simplex(stored)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_point_is_projected_in_float32(dtype: torch.dtype) -> None:
    layer = gate_layer(dtype=dtype)
    set_gates(layer, [0.8, -0.3, 0.9])
    exact = oracles.project_by_enumeration(layer.mean_weight.detach())
    layer(torch.randn(3, 4, 5, 5).to(dtype))
    assert layer.mean_weight.dtype == dtype
    assert layer.mean_weight.detach().equal(exact.to(dtype))


def test_evaluation_softmax_and_frozen_gates_are_not_projected() -> None:
    point = OFF_SIMPLEX["beyond the vertex"]
    evaluating, softmax, frozen = gate_layer().eval(), gate_layer("softmax"), gate_layer()
    for parameter in (frozen.mean_weight, frozen.var_weight):
        parameter.requires_grad_(False)
    for layer in (evaluating, softmax, frozen):
        set_gates(layer, point)
        stored = layer.mean_weight.detach().clone()
        layer(torch.randn(3, 4, 5, 5))
        assert layer.mean_weight.detach().equal(stored)


def test_each_gate_is_projected_on_its_own() -> None:
    layer = gate_layer()
    set_gates(layer, [0.2, 0.3, 0.5], [0.5, 0.5, 2.0])
    layer.var_weight.requires_grad_(False)
    layer.project_gates()
    assert layer.var_weight.tolist() == [0.5, 0.5, 2.0]
    torch.testing.assert_close(layer.mean_weight.detach(), torch.tensor([0.2, 0.3, 0.5]))


def test_training_forwards_do_not_change_a_one_hot_point() -> None:
    layer = SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(4))
    for _ in range(20):
        layer(torch.randn(3, 4, 5, 5))
        assert layer.mean_weight.tolist() == layer.var_weight.tolist() == [0, 0, 1]


def steps_until_moved(layer: SwitchNorm2d, optimizer: torch.optim.Optimizer, *, reproject: bool) -> int:
    """Push the gates outwards for 50 steps, then inwards; count the inward steps until the weights move."""
    x = torch.randn(3, 4, 5, 5)
    outwards = torch.tensor([1.0, 1.0, -2.0]) / 3
    for step in range(200):
        layer.train(reproject)(x)
        for name in GATE_PARAMETERS:
            getattr(layer, name).grad = outwards.clone() if step < 50 else -outwards
        optimizer.step()
        if step < 50:
            assert layer.importance_weights()[0].tolist() == [0, 0, 1]
        elif all(weights.tolist() != [0, 0, 1] for weights in layer.importance_weights()):
            return step - 49
    return 200


@OPTIMIZER_CASES
def test_after_an_outward_push_the_gates_come_back_within_ten_steps(
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    def moved(*, reproject: bool) -> int:
        layer = SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(4))
        return steps_until_moved(layer, make_optimizer([layer.mean_weight, layer.var_weight]), reproject=reproject)

    assert moved(reproject=True) <= 10
    assert moved(reproject=False) > 20  # what the projection of the stored point is there for


@OPTIMIZER_CASES
def test_training_moves_the_gates_to_the_branch_with_the_lowest_loss(
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    """The target is the output of an IN layer: from `bn` the gates must move to `in`."""
    x = torch.randn(4, 4, 6, 6) * torch.rand(4, 4, 1, 1).add(0.3) + torch.randn(4, 4, 1, 1)
    target = nn.functional.instance_norm(x)
    layer = SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(4))
    optimizer = make_optimizer([layer.mean_weight, layer.var_weight])
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer(x) - target).pow(2).mean()
        for name in GATE_PARAMETERS:
            assert_on_simplex(getattr(layer, name))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < 1e-3 * losses[0]
    assert all(int(weights.argmax()) == BRANCHES.index("in") for weights in layer.importance_weights())


@GATE_CASES
@pytest.mark.parametrize("point", [[0.0, 0.0, 1.0], [0.2, 0.3, 0.5], [1.3, -0.6, 0.4]])
def test_importance_weights_are_the_oracles_and_detached(gate: str, point: list[float]) -> None:
    layer = gate_layer(gate, dtype=torch.float64)
    set_gates(layer, point, point[::-1])
    for weights, parameter in zip(layer.importance_weights(), (layer.mean_weight, layer.var_weight), strict=True):
        assert not weights.requires_grad
        assert oracles.relative_error(weights, oracles.shares_of(parameter.detach(), gate)) < 1e-12


# --- state dicts -----------------------------------------------------------------------------------------------------

ROUND_TRIPS: dict[str, Callable[[], nn.Module]] = {
    f"{gate}, {'+'.join(branches)}": lambda gate=gate, branches=branches: gate_layer(gate, branches=branches)  # type: ignore[misc]
    for gate, k in itertools.product(GATES, (1, 2, 3))
    for branches in itertools.combinations(BRANCHES, k)
}


def spread(module: nn.Module) -> nn.Module:
    """Set random values, with simplex points on the simplex."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else torch.tensor(9))
            if name.endswith(GATE_PARAMETERS):
                tensor.div_(tensor.sum())
    return module


@pytest.mark.parametrize("make", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_a_state_dict_round_trip_is_bit_identical(make: Callable[[], nn.Module]) -> None:
    source, target = nn.Sequential(nn.Conv2d(4, 4, 1), spread(make())), nn.Sequential(nn.Conv2d(4, 4, 1), make())
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=True)
    assert stored._metadata["1"]["gate"] == source[1].gate
    result = target.load_state_dict(stored)
    assert not result.missing_keys
    assert not result.unexpected_keys
    x = torch.randn(3, 4, 5, 5)
    assert target(x).equal(source(x))
    assert all(value.equal(source.state_dict()[name]) for name, value in target.state_dict().items())


def without_metadata(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in state.items()}


@pytest.mark.parametrize(("stored", "expected"), [("softmax", "simplex"), ("simplex", "softmax")])
@pytest.mark.parametrize(
    "make",
    [
        gate_layer,
        lambda gate: FunctionalSwitchNorm(gate=gate, branches=BRANCHES),
    ],
    ids=["layer", "functional site"],
)
def test_a_gate_of_the_other_kind_is_refused(make: Callable[[str], nn.Module], stored: str, expected: str) -> None:
    source, target = nn.Sequential(make(stored)), nn.Sequential(make(expected))
    before = copy.deepcopy(target.state_dict())
    nn.init.uniform_(source[0].mean_weight)  # type: ignore[arg-type]
    with pytest.raises(
        RuntimeError,
        match=rf"(?s)0\.mean_weight: expected a {expected} gate, got a {stored} gate in the state dict"
        rf".*0\.var_weight: expected a {expected} gate, got a {stored} gate in the state dict",
    ):
        target.load_state_dict(source.state_dict())
    for name, value in target.state_dict().items():
        assert value.equal(before[name]) or not name.endswith(GATE_PARAMETERS), "a refused gate is not written"


def test_a_gate_of_the_other_kind_is_refused_on_the_meta_device_too() -> None:
    source, target = gate_layer("softmax", device="meta"), gate_layer("simplex", device="meta")
    with pytest.raises(RuntimeError, match="expected a simplex gate, got a softmax gate in the state dict"):
        target.load_state_dict(source.state_dict())
    target.load_state_dict(without_metadata(gate_layer("simplex", device="meta").state_dict()), assign=True)


PLAIN_POINTS: dict[str, tuple[list[float], bool]] = {
    "a vertex": ([0.0, 0.0, 1.0], True),
    "inside": ([0.2, 0.3, 0.5], True),
    "rounded to float16": ([0.3333, 0.3333, 0.3335], True),
    "published logits": ([1.0, 1.0, 1.0], False),
    "trained logits": ([0.7, -1.2, 1.5], False),
    "sum of 1, one negative": ([-0.2, 0.2, 1.0], False),
    "not a number": ([float("nan"), 0.5, 0.5], False),
}


@pytest.mark.parametrize(("values", "accepted"), PLAIN_POINTS.values(), ids=PLAIN_POINTS)
@pytest.mark.parametrize("keep_vars", [False, True])
def test_a_dict_without_metadata_must_have_points_on_the_simplex(
    values: list[float], accepted: bool, keep_vars: bool
) -> None:
    state = dict(gate_layer().state_dict(keep_vars=keep_vars))
    state["mean_weight"] = torch.tensor(values, requires_grad=keep_vars)
    target = gate_layer()
    if accepted:
        target.load_state_dict(state)
        assert target.mean_weight.tolist() == torch.tensor(values).tolist()
        return
    message = (
        f"mean_weight: expected importance weights (non-negative, with sum 1), got {torch.tensor(values).tolist()}; "
        "if these are logits, build the layer with gate='softmax'"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        target.load_state_dict(state)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "make",
    [lambda: gate_layer("simplex"), lambda: FunctionalSwitchNorm(gate="simplex", branches=BRANCHES)],
    ids=["layer", "functional site"],
)
def test_points_saved_after_a_step_are_on_the_simplex(make: Callable[[], nn.Module], frozen: bool) -> None:
    """After an optimizer step; the importance weights do not change, and saved tensors are those of the parameters."""
    layer: Any = make()
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.375, -0.25, 1.0]))
        layer.var_weight.copy_(torch.tensor([0.25, 0.25, 0.5]))
    layer.requires_grad_(not frozen)
    before = layer.importance_weights()
    state = layer.state_dict()
    assert state["mean_weight"].tolist() == [0.1875, 0.0, 0.8125]
    assert state["var_weight"].tolist() == [0.25, 0.25, 0.5]
    assert state["mean_weight"].data_ptr() == layer.mean_weight.data_ptr()
    assert all(map(torch.equal, layer.importance_weights(), before))
    make().load_state_dict(without_metadata(state))


def test_saved_logits_are_not_projected() -> None:
    layer = gate_layer("softmax")
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.375, -0.25, 1.0]))
    assert layer.state_dict()["mean_weight"].tolist() == [0.375, -0.25, 1.0]


def test_a_softmax_layer_takes_any_values_without_metadata() -> None:
    state = without_metadata(gate_layer("softmax").state_dict())
    state["mean_weight"] = torch.tensor([0.7, -1.2, 1.5])
    target = gate_layer("softmax")
    target.load_state_dict(state)
    assert target.mean_weight.detach().equal(state["mean_weight"])


def published(channels: int, logits: int, *, spatial: int, tracked: bool = True) -> "OrderedDict[str, Tensor]":
    """Return the entries of a layer as in the files of the paper's authors."""
    shape = (1, channels, *(1,) * spatial)
    state = OrderedDict(weight=torch.rand(shape) + 0.5, bias=torch.randn(shape))
    state["mean_weight"], state["var_weight"] = torch.randn(logits), torch.randn(logits)
    if tracked:
        state["running_mean"] = torch.randn(1, channels, *(1,) * min(spatial, 1))
        state["running_var"] = torch.rand(1, channels, *(1,) * min(spatial, 1)) + 0.5
    return state


PUBLISHED: dict[str, tuple[Any, tuple[str, ...], int, int, bool]] = {
    # (class, branches, spatial dimensions, channels, running statistics)
    "2d": (SwitchNorm2d, BRANCHES, 2, 4, True),
    "2d, one channel": (SwitchNorm2d, BRANCHES, 2, 1, True),
    "2d without bn": (SwitchNorm2d, ("in", "ln"), 2, 4, False),
    "1d": (SwitchNorm1d, ("ln", "bn"), 0, 4, True),
    "3d": (SwitchNorm3d, BRANCHES, 3, 4, True),
}


@GATE_CASES
@pytest.mark.parametrize(("cls", "branches", "spatial", "channels", "tracked"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_files_load_into_either_gate_as_the_same_function(
    cls: Any, branches: tuple[str, ...], spatial: int, channels: int, tracked: bool, gate: str
) -> None:
    state = published(channels, len(branches), spatial=spatial, tracked=tracked)
    layer = cls(channels, gate=gate, branches=branches).eval()
    before = {name: value.clone() for name, value in state.items()}
    result = layer.load_state_dict(state)
    assert not result.missing_keys
    for name, value in before.items():
        assert state[name].equal(value), "the caller's dict is left as it was"
        loaded = layer.state_dict()[name]
        if name in GATE_PARAMETERS and gate == "simplex":
            assert oracles.relative_error(loaded, oracles.softmax(value)) < 1e-6
        else:
            assert loaded.equal(value.flatten())
    x = torch.randn(3, channels, *(5,) * spatial)
    constants = oracles.Constants(state["running_mean"].flatten(), state["running_var"].flatten()) if tracked else None
    expected = oracles.forward(
        x,
        oracles.softmax(state["mean_weight"]),
        oracles.softmax(state["var_weight"]),
        state["weight"].flatten().double(),
        state["bias"].flatten().double(),
        branches,
        constants,
    )
    assert oracles.relative_error(layer(x).detach(), expected) < 1e-5
    if tracked:
        assert int(layer.num_batches_tracked) == 0


def test_published_double_precision_logits_lose_nothing() -> None:
    state = {name: value.double() for name, value in published(4, 3, spatial=2).items()}
    layer = gate_layer(dtype=torch.float64)
    layer.load_state_dict(state)
    assert oracles.relative_error(layer.mean_weight.detach(), oracles.softmax(state["mean_weight"])) < 1e-15


def test_a_published_file_with_other_branches_is_refused() -> None:
    for gate in GATES:
        with pytest.raises(RuntimeError, match=r"size mismatch for mean_weight: .*torch.Size\(\[2\]\)"):
            gate_layer(gate).load_state_dict(published(4, 2, spatial=2))


def test_a_batch_norm_state_dict_is_a_subset() -> None:
    bn = spread(nn.BatchNorm2d(4))
    for gate in GATES:
        layer = gate_layer(gate)
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "mean_weight", "var_weight"'):
            layer.load_state_dict(bn.state_dict())
        result = layer.load_state_dict(bn.state_dict(), strict=False)
        assert result.missing_keys == ["mean_weight", "var_weight"]
        assert not result.unexpected_keys
        assert all(layer.state_dict()[name].equal(value) for name, value in bn.state_dict().items())


@pytest.mark.parametrize("count", [0, 5])
def test_a_state_dict_from_before_batches_were_counted_keeps_the_count_as_batch_norm_does(count: int) -> None:
    for layer in (nn.BatchNorm2d(4), gate_layer()):
        layer.num_batches_tracked.fill_(count)  # type: ignore[operator, union-attr]
        state = without_metadata(spread(copy.deepcopy(layer)).state_dict())
        del state["num_batches_tracked"]
        layer.load_state_dict(state)
        assert int(layer.num_batches_tracked) == count  # type: ignore[arg-type]


def test_a_state_dict_of_ours_without_the_count_is_incomplete() -> None:
    state = gate_layer().state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "num_batches_tracked"'):
        gate_layer().load_state_dict(state)


def test_a_missing_count_on_the_meta_device_becomes_zero_on_assignment() -> None:
    state = without_metadata(gate_layer().state_dict())
    del state["num_batches_tracked"]
    layer = gate_layer(device="meta")
    layer.load_state_dict(state, assign=True)
    assert int(layer.num_batches_tracked) == 0  # type: ignore[arg-type]


def test_a_value_that_is_no_tensor_gets_torchs_own_message() -> None:
    state: dict[str, Any] = dict(gate_layer().state_dict())
    state["mean_weight"] = [0.0, 0.0, 1.0]
    with pytest.raises(RuntimeError, match=r'"mean_weight", expected torch\.Tensor'):
        gate_layer().load_state_dict(state)


def test_a_stripped_prefix_keeps_the_kind_of_gate() -> None:
    wrapped = nn.Module()
    wrapped.add_module("module", nn.Sequential(gate_layer("softmax")))
    state = wrapped.state_dict()
    nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")
    with pytest.raises(RuntimeError, match="expected a simplex gate, got a softmax gate in the state dict"):
        nn.Sequential(gate_layer("simplex")).load_state_dict(state)


def test_the_kind_of_gate_is_refused_without_strict_too() -> None:
    with pytest.raises(RuntimeError, match="expected a simplex gate, got a softmax gate in the state dict"):
        gate_layer("simplex").load_state_dict(gate_layer("softmax").state_dict(), strict=False)
