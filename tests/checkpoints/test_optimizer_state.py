"""Training resumes after a conversion: the old momentum, the old schedule, and gates with a new state."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import timm.scheduler
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler

import normswap
from normswap.checkpoints.content.optimizer_state import (
    has_gates,
    is_optimizer_state,
    is_scheduler_state,
    scheduler_with_gates,
    with_gates,
)
from normswap.errors import CheckpointError, OptimizerError
from normswap.surgery.importance import trainable_gates

TORCH: dict[str, Callable[..., optim.Optimizer]] = {
    "SGD": lambda params: optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=0.05),
    "Adam": lambda params: optim.Adam(params, lr=0.01, weight_decay=0.05, amsgrad=True),
    "AdamW": lambda params: optim.AdamW(params, lr=0.01, weight_decay=0.05),
    "RMSprop": lambda params: optim.RMSprop(params, lr=0.01, momentum=0.9, centered=True),
}
# By default Lamb clips by the norm of all gradients, including those of the gates.
NO_CLIPPING = {"max_grad_norm": None}
TIMM = {
    **{name: {} for name in ("sgd", "momentum", "sgdw", "sgdp", "csgdw", "lars", "nlarc", "novograd", "rmsproptf")},
    **{name: {} for name in ("adamw", "nadam", "nadamw", "cadamw", "adamp", "adopt", "adabelief", "radam", "adamax")},
    **{name: {} for name in ("adan", "lion", "mars", "laprop", "adafactor", "adafactorbv", "muon", "adamuon")},
    **{name: {} for name in ("adagrad", "adadelta", "lookahead_sgd", "lookahead_adamw")},
    **dict.fromkeys(("lamb", "clamb"), NO_CLIPPING),
}


def timms(name: str, **keywords: Any) -> Callable[..., optim.Optimizer]:
    return lambda params: create_optimizer_v2(params, opt=name, lr=0.01, weight_decay=0.05, **keywords)


class Net(nn.Module):
    """No bias before a norm: its gradient is zero but for rounding, which Adam would make a step of full length."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        return self.head(self.norm(self.second(x)).relu().mean((2, 3)))


def batches(count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
        yield x, torch.randint(0, 5, (6,), generator=generator)


def train(model: nn.Module, optimizer: optim.Optimizer, count: int, seed: int) -> None:
    for x, y in batches(count, seed):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Trained(NamedTuple):
    """A model after some steps, its optimizer, and the optimizer's state dict as it comes out of a file."""

    model: nn.Module
    optimizer: Any
    state: dict[str, Any]


def trained(build: Callable[..., Any], *, by_model: bool) -> Trained:
    model = Net().double()
    optimizer = build(model if by_model else model.parameters())
    train(model, optimizer, 3, seed=1)
    return Trained(model, optimizer, through_a_file(optimizer.state_dict()))


def resumed(start: Trained, build: Callable[..., Any], *, importance_lr: float | None) -> Trained:
    """The conversion of the model, with an optimizer that has loaded the extended state dict."""
    model = normswap.convert(start.model, next(batches(1, 0))[0], bn_statistics="batch").model
    gates = list(trainable_gates(model))
    state = through_a_file(with_gates(start.state, gates=gates, importance_lr=importance_lr))
    optimizer = build(normswap.param_groups(model, like=start.state, importance_lr=importance_lr))
    optimizer.load_state_dict(state)
    return Trained(model, optimizer, state)


def distance(model: nn.Module, converted: nn.Module) -> float:
    """The largest relative distance of an original parameter in the two models."""
    twins = dict(converted.named_parameters())
    pairs = [(p.detach(), twins[name].detach()) for name, p in model.named_parameters()]
    return max(float((p - twin).norm() / p.norm()) for p, twin in pairs)


def state_of(optimizer: Any, parameter: Tensor) -> dict[str, Any]:
    inside = getattr(optimizer, "_base_optimizer", optimizer)  # timm's Lookahead wraps one
    return inside.state.get(parameter, {})  # type: ignore[no-any-return]


def check_momentum(start: Trained, after: Trained) -> None:
    """Every original parameter has by its name the state that it had, bit for bit, and no gate has any."""
    twins = dict(after.model.named_parameters())
    for name, parameter in start.model.named_parameters():
        old, new = state_of(start.optimizer, parameter), state_of(after.optimizer, twins.pop(name))
        assert old
        assert old.keys() == new.keys()
        for entry, value in old.items():
            # load_state_dict gives torch's NAdam's float32 product the type of the parameter.
            assert not isinstance(value, Tensor) or torch.equal(value.to(new[entry]), new[entry]), (name, entry)
    assert len(twins) == 4
    assert not any(state_of(after.optimizer, gate) for gate in twins.values())


OPTIMIZERS = {f"torch {name}": (build, False) for name, build in TORCH.items()} | {
    f"timm {name}": (timms(name, **keywords), True) for name, keywords in TIMM.items()
}


@pytest.mark.slow
@pytest.mark.parametrize(("build", "by_model"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_resumed_after_conversion_continues_with_the_old_momentum(build: Any, by_model: bool) -> None:
    start = trained(build, by_model=by_model)
    after = resumed(start, build, importance_lr=0.0)
    check_momentum(start, after)
    forgetful = copy.deepcopy(after.model)
    rebuilt = build(normswap.param_groups(forgetful, like=start.state, importance_lr=0.0))
    for model, optimizer in ((start.model, start.optimizer), (after.model, after.optimizer), (forgetful, rebuilt)):
        train(model, optimizer, 4, seed=2)
    assert distance(start.model, after.model) < 1e-9
    assert distance(start.model, forgetful) > 1e-3  # what is lost without the old state


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum':UserWarning")
@pytest.mark.parametrize(("name", "near"), [("lamb", 1e-2), ("madgrad", 1e-4), ("madgradw", 1e-4), ("kron", None)])
def test_where_the_gates_are_felt_by_the_others_the_state_is_right_all_the_same(
    name: str, near: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # Kron compiles its steps, which takes long
    # Lamb clips by the norm of all gradients, MADGRAD adds its eps to the rate of 0, Kron draws random numbers.
    start = trained(timms(name), by_model=True)
    after = resumed(start, timms(name), importance_lr=0.0)
    check_momentum(start, after)
    train(start.model, start.optimizer, 4, seed=2)
    train(after.model, after.optimizer, 4, seed=2)
    assert near is None or distance(start.model, after.model) < near


@pytest.mark.parametrize(
    "name", ["lamb", "adan", "novograd", "adamw", "nadam", "lion", "rmsproptf", "adafactor", "muon"]
)
def test_gates_start_as_in_a_new_optimizer(name: str) -> None:
    build = timms(name, **TIMM.get(name, {}))
    after = resumed(trained(build, by_model=True), build, importance_lr=0.05)
    alone = copy.deepcopy(after.model)
    optimizer = build([{"params": list(trainable_gates(alone).values()), "weight_decay": 0.0, "lr": 0.05}])
    train(after.model, after.optimizer, 1, seed=2)
    train(alone, optimizer, 1, seed=2)
    for gate, twin in zip(trainable_gates(after.model).values(), trainable_gates(alone).values(), strict=True):
        assert torch.allclose(gate, twin, rtol=1e-12, atol=1e-12)
        assert gate[-1].item() != 1


def test_an_optimizer_that_makes_its_state_when_built_cannot_take_gates_in() -> None:
    start = trained(timms("adamw"), by_model=True)
    model = normswap.convert(start.model).model
    optimizer = create_optimizer_v2(normswap.param_groups(model, lr=0.1), opt="adahessian", lr=0.1)
    optimizer.load_state_dict({"state": {}, "param_groups": optimizer.state_dict()["param_groups"]})
    F.cross_entropy(model(next(batches(1, 0))[0]), next(batches(1, 0))[1]).backward()
    with pytest.raises(KeyError, match="hessian step"):
        optimizer.step()


def test_an_optimizer_that_lives_on_takes_the_gates_as_one_more_group() -> None:
    build = timms("adamw")
    start = trained(build, by_model=True)
    never = copy.deepcopy(start)
    never = Trained(never.model, build(never.model), never.state)
    never.optimizer.load_state_dict(start.state)
    normswap.convert(start.model, bn_statistics="batch", inplace=True)
    start.optimizer.add_param_group(normswap.param_groups(start.model, like=start.optimizer, importance_lr=0.0)[-1])
    train(start.model, start.optimizer, 4, seed=2)
    train(never.model, never.optimizer, 4, seed=2)
    assert distance(never.model, start.model) < 1e-9


def test_a_file_of_the_converted_model_resumes_by_regrouping_too() -> None:
    build = timms("adamw")
    start = trained(build, by_model=True)
    after = resumed(start, build, importance_lr=0.0)
    optimizer = build(normswap.param_groups(after.model, weight_decay=0.05))
    optimizer.load_state_dict(after.state)  # timm's two groups, then the gates
    check_momentum(start, Trained(after.model, optimizer, after.state))


# --- the state dict of an optimizer


def state_dict(*groups: list[Any], **options: Any) -> dict[str, Any]:
    return {"state": {}, "param_groups": [{"params": params, "lr": 0.1, **options} for params in groups]}


def test_with_gates_appends_a_group_and_shares_the_rest() -> None:
    old = {**state_dict([0, 1], [2], momentum=0.9, weight_decay=0.1, step=7), "rng_state": (1, 2)}
    old["state"] = {0: {"momentum_buffer": torch.ones(2)}}
    before = copy.deepcopy(old["param_groups"])
    new = with_gates(old, gates=["bn.mean_weight", "bn.var_weight"])
    assert new["param_groups"][-1] == {
        **{"params": [3, 4], "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "gates": True}
    }
    assert all(a is b for a, b in zip(new["param_groups"], old["param_groups"], strict=False))
    assert new["state"] is old["state"]
    assert new["rng_state"] == (1, 2)
    assert old["param_groups"] == before
    assert (has_gates(old), has_gates(new)) == (False, True)
    assert with_gates(old, gates=[]) == old


@pytest.mark.parametrize(
    ("options", "importance_lr", "expected"),
    [
        ({"lr": 0.05, "initial_lr": 0.2}, None, {"lr": 0.025, "initial_lr": 0.1}),
        ({"lr": 1e-4}, None, {"lr": 0.01}),
        ({"lr": 0.05, "initial_lr": 0.2}, 0.4, {"lr": 0.1, "initial_lr": 0.4}),
        ({"lr": 0.05, "initial_lr": 0.2}, 0.0, {"lr": 0.0, "initial_lr": 0.0}),
        ({"lr": 0.0, "initial_lr": 0.0}, 0.3, {"lr": 0.3, "initial_lr": 0.3}),
        (
            {"lr": 0.05, "initial_lr": 0.01, "max_lr": 0.1, "min_lr": 0.001},
            0.2,
            {"lr": 0.1, "initial_lr": 0.02, "max_lr": 0.2, "min_lr": 0.002},
        ),
    ],
)
def test_the_rate_of_the_gates(options: Any, importance_lr: float | None, expected: dict[str, float]) -> None:
    group = with_gates(state_dict([0], **options), gates=["g"], importance_lr=importance_lr)["param_groups"][-1]
    assert {name: group[name] for name in expected} == pytest.approx(expected)


def test_names_of_parameters_are_carried_on() -> None:
    named = with_gates(state_dict([0], param_names=["a"]), gates=["g"])["param_groups"][-1]
    assert (named["params"], named["param_names"]) == ([1], ["g"])
    assert with_gates(state_dict(["a", "b"]), gates=["g"])["param_groups"][-1]["params"] == ["g"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (optim.SGD([torch.zeros(1)], lr=0.1).state_dict(), True),
        (state_dict([]), True),
        ({"state": {}}, False),
        ({"state": [], "param_groups": []}, False),
        ({"state": {}, "param_groups": [{"lr": 0.1}]}, False),
        ({"state": {}, "param_groups": {"params": []}}, False),
        (3, False),
    ],
)
def test_an_optimizers_state_dict_is_known_by_its_structure(value: object, expected: bool) -> None:
    assert is_optimizer_state(value) is expected


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            [],
            "expected an optimizer's state dict with 'state' and 'param_groups', got list: pass optimizer.state_dict()",
        ),
        ({"epoch": 1}, r"got entries \['epoch'\]: pass optimizer.state_dict"),
        ({"state": {}, "param_groups": []}, "has no parameter group: save it again"),
        (state_dict([0, "a"]), "is damaged, it mixes parameters by number and by name"),
        (state_dict([0, 1], param_names=["a"]), "is damaged, group 0 has 2 parameters and 1 names"),
        (
            {"state": {}, "param_groups": [{"params": [0], "param_names": ["a"]}, {"params": [1]}]},
            "is damaged, only some of its groups have param_names",
        ),
        ({**state_dict([0]), "state": {5: {"step": 1}}}, "is damaged, parameter 5 has a state and is in no group"),
        (with_gates(state_dict([0]), gates=["g"]), "has a group of gates already: load it without with_gates"),
    ],
)
def test_a_damaged_state_dict_is_refused(state: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        with_gates(state, gates=["g"])


def test_a_rate_that_is_none_is_refused() -> None:
    with pytest.raises(OptimizerError, match=r"importance_lr: expected a finite number >= 0, got -0\.1"):
        with_gates(state_dict([0]), gates=["g"], importance_lr=-0.1)


# --- the state dict of a scheduler

Rates = list[float]


def halved(epoch: int) -> float:
    return 0.5**epoch


SCHEDULERS: dict[str, Callable[[optim.Optimizer, Rates], Any]] = {
    "LambdaLR": lambda o, _: lr_scheduler.LambdaLR(o, halved),
    "MultiplicativeLR": lambda o, _: lr_scheduler.MultiplicativeLR(o, halved),
    "StepLR": lambda o, _: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o, _: lr_scheduler.MultiStepLR(o, [2, 5]),
    "LinearLR": lambda o, _: lr_scheduler.LinearLR(o, total_iters=6),
    "PolynomialLR": lambda o, _: lr_scheduler.PolynomialLR(o, 9),
    "CosineAnnealingLR": lambda o, _: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o, _: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o, rates: lr_scheduler.CyclicLR(o, rates, [5 * r for r in rates], step_size_up=3),
    "OneCycleLR": lambda o, rates: lr_scheduler.OneCycleLR(o, rates, 12),
    "ReduceLROnPlateau": lambda o, rates: lr_scheduler.ReduceLROnPlateau(
        o, factor=0.5, patience=0, min_lr=[0.2 * r for r in rates]
    ),
    "SequentialLR": lambda o, _: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
    ),
    "ChainedScheduler": lambda o, _: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "timm cosine": lambda o, _: timm.scheduler.CosineLRScheduler(o, 8, warmup_t=4, warmup_lr_init=1e-3),
    "timm step": lambda o, _: timm.scheduler.StepLRScheduler(o, 3, decay_rate=0.5, warmup_t=2),
    "timm multistep": lambda o, _: timm.scheduler.MultiStepLRScheduler(o, [2, 5], decay_rate=0.5),
    "timm poly": lambda o, _: timm.scheduler.PolyLRScheduler(o, 9),
    "timm tanh": lambda o, _: timm.scheduler.TanhLRScheduler(o, 9),
}


def scheduled(rates: Rates, name: str) -> tuple[optim.Optimizer, Any]:
    parameters = [nn.Parameter(torch.ones(1)) for _ in rates]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    optimizer = optim.SGD(groups, lr=0.1, momentum=0.9)
    return optimizer, SCHEDULERS[name](optimizer, rates)


def advance(optimizer: optim.Optimizer, scheduler: Any, epochs: range) -> list[Rates]:
    seen = []
    for epoch in epochs:
        optimizer.step()
        if isinstance(scheduler, timm.scheduler.scheduler.Scheduler):
            scheduler.step(epoch)
        else:
            scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
    return seen


@pytest.mark.parametrize("importance_lr", [0.02, 0.005])
@pytest.mark.parametrize("stopped", [2, 5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_schedule_goes_on_as_if_the_gates_had_been_there(name: str, stopped: int, importance_lr: float) -> None:
    whole = advance(*scheduled([0.1, 0.02, importance_lr], name), range(1, 11))
    optimizer, scheduler = scheduled([0.1, 0.02], name)
    advance(optimizer, scheduler, range(1, stopped + 1))
    own = importance_lr
    if name == "ReduceLROnPlateau":  # which keeps no initial rate: the present one is asked for
        own *= optimizer.param_groups[-1]["lr"] / 0.02
    optimizer_state = with_gates(through_a_file(optimizer.state_dict()), gates=["g"], importance_lr=own)
    state = scheduler_with_gates(scheduler.state_dict(), optimizer_state=optimizer_state)
    optimizer, scheduler = scheduled([0.1, 0.02, importance_lr], name)
    optimizer.load_state_dict(optimizer_state)
    scheduler.load_state_dict(state)
    for after, expected in zip(advance(optimizer, scheduler, range(stopped + 1, 11)), whole[stopped:], strict=True):
        assert after == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_untouched_a_schedule_would_leave_the_gates_where_they_are() -> None:
    optimizer, scheduler = scheduled([0.1, 0.02], "timm poly")
    advance(optimizer, scheduler, range(1, 3))
    state, optimizer_state = scheduler.state_dict(), with_gates(optimizer.state_dict(), gates=["g"])
    optimizer, scheduler = scheduled([0.1, 0.02, 0.02], "timm poly")
    optimizer.load_state_dict(optimizer_state)
    scheduler.load_state_dict(state)
    rates = [epoch[-1] for epoch in advance(optimizer, scheduler, range(3, 6))]
    assert len(set(rates)) == 1


def test_what_schedules_something_else_is_not_scaled() -> None:
    state = {"base_values": [0.9], "param_name": "momentum"}
    optimizer_state = with_gates(state_dict([0]), gates=["g"], importance_lr=0.5)
    assert scheduler_with_gates(state, optimizer_state=optimizer_state)["base_values"] == [0.9, 0.9]


def test_functions_with_a_state_keep_it() -> None:
    state = {"base_lrs": [0.1], "lr_lambdas": [{"warmup": 3}]}
    new = scheduler_with_gates(state, optimizer_state=with_gates(state_dict([0]), gates=["g"]))
    assert new["lr_lambdas"] == [{"warmup": 3}] * 2
    assert state["lr_lambdas"] == [{"warmup": 3}]


def test_a_scheduler_without_lists_is_none() -> None:
    assert not is_scheduler_state({"best": 1.0, "last_epoch": 3})
    assert not is_scheduler_state([0.1])
    assert not is_scheduler_state({"_schedulers": [3]})


@pytest.mark.parametrize(
    ("state", "optimizer_state", "message"),
    [
        (
            {"best": 1},
            with_gates(state_dict([0]), gates=["g"]),
            "expected a scheduler's state dict with lists per group",
        ),
        ({"base_lrs": [0.1]}, state_dict([0]), "with a last group of gates: pass the result of normswap.with_gates"),
        (
            {"base_lrs": [0.1, 0.2]},
            with_gates(state_dict([0]), gates=["g"]),
            "has 2 entries in 'base_lrs', expected 1, one for each group of the optimizer: take both from one file",
        ),
    ],
)
def test_a_scheduler_that_does_not_fit_is_refused(state: Any, optimizer_state: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        scheduler_with_gates(state, optimizer_state=optimizer_state)
