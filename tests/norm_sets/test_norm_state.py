"""Norm states: everything that a norm computes with, loaded bit for bit into the same objects, or refused."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

import normswap
from normswap import adaptation_parameters, convert, load_norm_state, norm_state, set_importance, split_state
from normswap.errors import ArchitectureError, ArgumentError, ModelError, SwapError
from normswap.surgery.graphs.rewriting import is_rewritten
from tests.helpers import zoo

X = zoo.image(4, 3, 9, 9)()


class Net(nn.Module):
    """A norm module, a call, norms of other kinds, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.block = zoo.conv(), zoo.bn(), zoo.FunctionalBlock(8, 8)
        self.group, self.layer, self.head = nn.GroupNorm(2, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.block(self.bn(self.conv(x)).relu()))
        return self.head(self.layer(x.mean((2, 3))))


AFFINE, MOMENTS = ("weight", "bias"), ("running_mean", "running_var")
GATES, CONSTANTS = ("mean_weight", "var_weight"), ("ln_mean_shift", "ln_var_scale", "in_var_scale")
NORM_KEYS = {
    *(f"bn.{name}" for name in (*AFFINE, *GATES, *MOMENTS, "num_batches_tracked", *CONSTANTS)),
    *(f"block.{name}" for name in (*AFFINE, *MOMENTS)),
    *(f"block.batch_norm.{name}" for name in (*GATES, *CONSTANTS)),
    *(f"{norm}.{name}" for norm in ("group", "layer") for name in AFFINE),
}


def net(seed: int = 5) -> Any:
    torch.manual_seed(seed)
    return zoo.randomise(Net())


def converted(seed: int = 5, **options: Any) -> Any:
    return convert(net(seed), X, **options).model


def other_norms(model: nn.Module) -> Any:
    """A copy with other values in all norms and gates, and the same values everywhere else."""
    changed = copy.deepcopy(model)
    torch.manual_seed(99)
    zoo.randomise(changed)
    for old, new in zip(zoo.everything_in(model), zoo.everything_in(changed), strict=True):
        kernels = [p for name, p in old._parameters.items() if name.startswith("weight") and p is not None]
        if any(kernel.dim() > 1 for kernel in kernels):  # a convolution or the like: its bias is not that of a norm
            for name, own in new._parameters.items():
                if own is not None:
                    own.data.copy_(old._parameters[name].data)
    for parameter in normswap.trainable_gates(changed).values():
        weights = torch.rand(parameter.shape) + 0.1
        parameter.data.copy_(weights / weights.sum())
    return changed


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    torch.manual_seed(3)
    args, kwargs = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))


# --- what a state has -------------------------------------------------------------------------------------------------


def test_it_has_norms_gates_statistics_and_constants_and_nothing_else() -> None:
    model = converted()
    state = norm_state(model)
    assert {*state} == NORM_KEYS
    for key, value in state.items():
        own = model.state_dict()[key]
        assert torch.equal(value, own)
        assert value.data_ptr() != own.data_ptr()
        assert not value.requires_grad


def test_a_network_without_gates_has_one_too_without_the_calls() -> None:
    without_call = {key for key in NORM_KEYS if not key.startswith("block.batch_norm")}
    plain = {key for key in without_call if not key.endswith((*GATES, *CONSTANTS))}
    # The block has the tensors of a norm, so it is read as an unknown one.
    assert {*norm_state(net())} == plain


def test_points_off_the_simplex_are_projected_as_in_a_state_dict() -> None:
    model = converted()
    with torch.no_grad():
        model.bn.mean_weight.add_(torch.tensor([0.5, 0.0, 0.0]))
    assert norm_state(model)["bn.mean_weight"].tolist() == [0.25, 0.0, 0.75]


def test_tables_from_which_a_call_takes_a_row_are_part_of_the_state() -> None:
    class Table(zoo.OwnTensors):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("means", torch.zeros(3, 8))
            self.register_buffer("unused", torch.zeros(3, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(x, self.means[1], self.running_var, self.weight, self.bias)

    model = convert(Table(), zoo.FEATURES()).model
    assert is_rewritten(model)
    assert {"means", "running_var", "weight", "bias"} < {*norm_state(model)}
    assert "unused" not in norm_state(model)


# --- loading ----------------------------------------------------------------------------------------------------------

# A forward draws numbers, a scale beside a norm has the name of a norm's, and others cannot be copied or randomized.
_OTHERS = {"number drawn in forward", "a container named like a norm", "pruned BN", "lazy BN", "TorchScript inside"}
_TRAPS = [trap for trap in zoo.TRAPS if trap.copyable and trap.name not in _OTHERS]


@pytest.mark.slow
@pytest.mark.parametrize("trap", _TRAPS, ids=[trap.name for trap in _TRAPS])
def test_a_network_with_the_norms_of_another_computes_what_that_one_computes(trap: zoo.Trap) -> None:
    readers = dict.fromkeys(trap.also_read_as_batch_norm, normswap.read_batch_norm)
    model = convert(trap.model(), trap.inputs(), norms=normswap.KNOWN_NORMS | readers, **trap.options).model
    other = other_norms(model)
    own, new = norm_state(model), norm_state(other)
    load_norm_state(model, new)
    assert same([*norm_state(model).values()], [*new.values()])
    assert same(outputs(model, trap.inputs()), outputs(other, trap.inputs()))
    load_norm_state(model, own)
    assert same([*norm_state(model).values()], [*own.values()])


def test_parameters_stay_the_same_objects_and_the_optimizer_goes_on() -> None:
    model = converted().train()
    day, before = norm_state(model), {name: id(p) for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.1))
    model(X).square().mean().backward()
    optimizer.step()
    night = norm_state(model)
    load_norm_state(model, day)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert same([*norm_state(model).values()], [*day.values()])
    optimizer.step()
    load_norm_state(model, night)
    assert same([*norm_state(model).values()], [*night.values()])


def test_frozen_parameters_and_shared_layers_are_loaded_too() -> None:
    model = convert(zoo.randomise(zoo.TwoNames()), X).model.requires_grad_(False)
    other = other_norms(model)
    load_norm_state(model, norm_state(other))
    assert same([*model.state_dict().values()], [*other.state_dict().values()])
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_wrappers_change_no_key() -> None:
    model = converted()
    wrapped = DistributedDataParallel(torch.compile(model))
    assert {*norm_state(wrapped)} == NORM_KEYS
    other = norm_state(other_norms(model))
    load_norm_state(wrapped, other)
    assert same([*norm_state(model).values()], [*other.values()])
    assert {*split_state(wrapped).shared} == {*split_state(model).shared}


@pytest.mark.parametrize("gate", ["simplex", "softmax"])
def test_files_of_torch_and_safetensors(tmp_path: Path, gate: Any) -> None:
    model = converted(gate=gate)
    other = other_norms(model)
    new = norm_state(other)
    torch.save(new, tmp_path / "night.pt")
    save_file(new, tmp_path / "night.safetensors")
    for state in (torch.load(tmp_path / "night.pt", weights_only=True), load_file(tmp_path / "night.safetensors")):
        load_norm_state(model, norm_state(converted(gate=gate)))
        load_norm_state(model, state)
        assert same(outputs(model, X), outputs(other, X))


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(model: nn.Module, state: Any, message: str, error: type[Exception] = ArchitectureError) -> None:
    """The state is refused, and nothing is loaded."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        load_norm_state(model, state)
    assert same([*model.state_dict().values()], [*before.values()])


def test_states_of_other_networks_are_refused_by_name() -> None:
    model = converted()
    state = norm_state(other_norms(model))
    bigger = {**state, "bn2.weight": torch.ones(8)}
    del bigger["bn.bias"]
    refused(model, bigger, r"state: .* got another one \(1 missing: bn\.bias, 1 unexpected: bn2\.weight\): save it")
    refused(model, norm_state(net()), r"\(10 missing: bn\.mean_weight, bn\.var_weight, .*, \+7 more, 0 unexpected\)")
    refused(model, {**state, "bn.bias": torch.ones(9)}, r"bn\.bias: expected the shape \(8,\), got \(9,\): load it")
    refused(model, {**state, "bn.bias": [1.0] * 8}, r"bn\.bias: expected a tensor, got list")
    refused(model, 3, "state: expected a norm state, as normswap.norm_state returns it, got an int", ArgumentError)


def test_gates_of_another_kind_or_other_branches_are_refused() -> None:
    model = converted(match=False)
    softmax = norm_state(converted(gate="softmax", match=False))
    refused(model, softmax, r"bn: expected gate='simplex', got 'softmax', and 1 more")
    refused(model, {**softmax}, r"bn\.mean_weight: expected importance weights .* and 1 more")  # without metadata
    pair, other_pair = (converted(branches=branches, match=False) for branches in (("in", "bn"), ("ln", "bn")))
    refused(pair, norm_state(other_pair), r"bn: expected branches=\('in', 'bn'\), got \('ln', 'bn'\)")
    one_group, two_groups = (converted(start="gn", num_groups=number) for number in (1, 2))
    refused(one_group, norm_state(two_groups), r"bn: expected num_groups=1, got 2")


def test_models_without_sizes_and_things_that_are_no_models_are_refused() -> None:
    with pytest.raises(ModelError, match=r"^1 has no sizes yet: run one batch through the model first"):
        norm_state(nn.Sequential(zoo.conv(), nn.LazyBatchNorm2d()))
    with pytest.raises(ArgumentError, match=r"model: expected a torch\.nn\.Module"):
        norm_state("model.pt")  # type: ignore[arg-type]


# --- two parts --------------------------------------------------------------------------------------------------------


def test_both_parts_are_the_state_dict() -> None:
    model = converted()
    shared, local = split_state(model)
    assert {*local} == NORM_KEYS
    assert {*shared} == {"conv.weight", "conv.bias", "block.conv.weight", "block.conv.bias", "head.weight", "head.bias"}
    assert same([{**shared, **local}[key] for key in model.state_dict()], [*model.state_dict().values()])
    other = other_norms(model)
    other.load_state_dict({**shared, **norm_state(other)})
    with torch.no_grad():
        model.conv.weight.add_(1)
    assert not torch.equal(shared["conv.weight"], model.conv.weight)


def test_the_aliases_of_a_shared_norm_are_local() -> None:
    model = zoo.TwoNames()
    shared, local = split_state(model)
    assert {*shared} | {*local} == {*model.state_dict()}
    assert {*shared}.isdisjoint(local)
    assert not any("bn" in key or "norm" in key for key in shared)


# --- adaptation -------------------------------------------------------------------------------------------------------


def test_adaptation_gets_the_affine_parameters_of_all_norms() -> None:
    model = converted()
    parameters, names = adaptation_parameters(model)
    assert {*names} == {f"{owner}.{name}" for owner in ("bn", "block", "group", "layer") for name in AFFINE}
    own = dict(model.named_parameters())
    assert all(own[name] is parameter for name, parameter in zip(names, parameters, strict=True))
    with_gates = adaptation_parameters(model, gates=True)
    assert {*with_gates.names} - {*names} == {f"{owner}.{g}" for owner in ("bn", "block.batch_norm") for g in GATES}


def test_adaptation_selects_norms_by_pattern_and_counts_shared_ones_once() -> None:
    model = converted()
    assert adaptation_parameters(model, include="bn").names == ["bn.weight", "bn.bias"]
    assert "bn.weight" not in adaptation_parameters(model, exclude=["bn"]).names
    shared = zoo.TwoNames()
    parameters, _ = adaptation_parameters(shared)
    assert len({id(p) for p in parameters}) == len(parameters)
    with pytest.raises(ModelError, match=r"no weight or bias of a norm that can be trained: .* pass gates=True"):
        adaptation_parameters(nn.Linear(2, 2))


def test_running_statistics_in_parameter_lists_are_no_affine_parameters() -> None:
    from tests.helpers.functional_networks import TASKS, Learner

    model = convert(Learner(), TASKS()).model
    assert not any("vars_bn" in name for name in adaptation_parameters(model).names)
    assert any("vars_bn" in name for name in norm_state(model))


def test_gates_of_states_are_those_of_the_network() -> None:
    model = converted()
    set_importance(model, {"bn": "ln"})
    night = norm_state(model)
    set_importance(model, {"bn": "bn"})
    load_norm_state(model, night)
    assert normswap.importance_weights(model)["bn"].mean == {"in": 0.0, "ln": 1.0, "bn": 0.0}


def test_a_forward_that_cannot_be_traced_any_more_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from normswap.surgery.graphs import rewriting
    from normswap.surgery.graphs.module_trace import ModuleTrace

    model = converted()
    monkeypatch.setattr(rewriting, "trace_module_forward", lambda _: ModuleTrace(None, None, "it changed"))
    with pytest.raises(SwapError, match="the forward of FunctionalBlock cannot be traced any more: it changed"):
        norm_state(model)
