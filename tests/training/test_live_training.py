"""convert_training: optimizer, schedulers and averages go on as if the gates had been there from the start."""

import copy
import doctest
from collections.abc import Callable
from typing import Any

import pytest
import timm.scheduler
import timm.utils
import torch
from torch import nn, optim
from torch.optim import lr_scheduler, swa_utils

import normswap
from normswap.errors import OptimizerError, PlanError, SwapError
from normswap.surgery.importance import gate_parameters, trainable_gates

Rates = list[float]
X = torch.linspace(-2, 2, 2 * 3 * 6 * 6).view(2, 3, 6, 6)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    ).double()


def two_groups(model: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """Convolutions, then norms, and the gates in a third group if there is a rate for it."""
    gates = gate_parameters(model)
    named = [(name, p) for name, p in model.named_parameters() if name not in gates]
    sets = [[p for _, p in named if p.ndim > 1], [p for _, p in named if p.ndim == 1], list(gates.values())]
    return [{"params": ps, "lr": rate, "weight_decay": 0.0} for ps, rate in zip(sets, rates, strict=False)]


def warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 4)


SCHEDULERS: dict[str, Callable[[optim.Optimizer, Rates], Any]] = {
    "LambdaLR": lambda o, _: lr_scheduler.LambdaLR(o, warm_up),
    "LambdaLR, a function a group": lambda o, rates: lr_scheduler.LambdaLR(o, [lambda e: 0.9**e] * len(rates)),
    "MultiplicativeLR": lambda o, _: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o, _: lr_scheduler.StepLR(o, 2),
    "CosineAnnealingLR": lambda o, _: lr_scheduler.CosineAnnealingLR(o, 9),
    "CosineAnnealingLR to a floor": lambda o, _: lr_scheduler.CosineAnnealingLR(o, 9, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o, _: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, eta_min=1e-3),
    "CyclicLR": lambda o, rates: lr_scheduler.CyclicLR(o, rates, [5 * r for r in rates], step_size_up=3),
    "OneCycleLR": lambda o, rates: lr_scheduler.OneCycleLR(o, rates, 20),
    "ReduceLROnPlateau": lambda o, _: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SWALR": lambda o, rates: swa_utils.SWALR(o, [0.5 * r for r in rates], anneal_epochs=9),
    "SequentialLR": lambda o, _: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 9, eta_min=1e-3)], [4]
    ),
    "ChainedScheduler of a SequentialLR": lambda o, _: lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]),
            lr_scheduler.ExponentialLR(o, 0.95),
        ]
    ),
    "ChainedScheduler": lambda o, _: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=4), lr_scheduler.LambdaLR(o, warm_up)]
    ),
    "timm cosine": lambda o, _: timm.scheduler.CosineLRScheduler(o, 9, warmup_t=4, warmup_lr_init=1e-4, lr_min=1e-5),
    "timm step": lambda o, _: timm.scheduler.StepLRScheduler(o, 3, decay_rate=0.5, warmup_t=2),
    "timm poly": lambda o, _: timm.scheduler.PolyLRScheduler(o, 12),
    "timm tanh": lambda o, _: timm.scheduler.TanhLRScheduler(o, 12),
}


def train(model: nn.Module, optimizer: Any, scheduler: Any, steps: range, average: Any = None) -> list[Rates]:
    seen = []
    for step in steps:
        optimizer.zero_grad()
        model(X.to(torch.float64)).square().mean().backward()
        optimizer.step()
        if average is not None:
            getattr(average, "update_parameters", getattr(average, "update", None))(model)
        if isinstance(scheduler, timm.scheduler.scheduler.Scheduler):
            scheduler.step(step)
        elif scheduler is not None:
            scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
    return seen


def run(name: str, rates: Rates, *, converted: bool) -> tuple[nn.Module, optim.Optimizer, Any]:
    model = network()
    if converted:
        normswap.convert(model, X.double(), bn_statistics="batch", match=False, inplace=True)
    optimizer = optim.SGD(two_groups(model, rates), momentum=0.9)
    return model, optimizer, SCHEDULERS[name](optimizer, rates)


@pytest.mark.slow
@pytest.mark.parametrize("importance_lr", [0.02, 0.005])
@pytest.mark.parametrize("stopped", [1, 6])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_goes_on_as_if_the_gates_had_been_there_from_the_start(
    name: str, stopped: int, importance_lr: float
) -> None:
    own = importance_lr
    whole = run(name, [0.1, 0.02, own], converted=True)
    for gate in trainable_gates(whole[0]).values():
        gate.requires_grad_(False)  # they begin to learn where the other run has them
    expected = train(*whole, range(1, stopped + 1))
    for gate in gate_parameters(whole[0]).values():
        gate.requires_grad_(True)
    expected += train(*whole, range(stopped + 1, stopped + 6))

    model, optimizer, scheduler = run(name, [0.1, 0.02], converted=False)
    train(model, optimizer, scheduler, range(1, stopped + 1))
    if name == "ReduceLROnPlateau":  # which keeps no initial rate: the present one is asked for
        importance_lr *= optimizer.param_groups[-1]["lr"] / 0.02
    done = normswap.convert_training(
        model,
        optimizer,
        scheduler,
        example_inputs=X.double(),
        importance_lr=importance_lr,
        bn_statistics="batch",
        match=False,
    )
    assert done.model is model
    assert done.group is optimizer.param_groups[-1]
    assert (done.group["weight_decay"], done.group["gates"]) == (0.0, True)
    assert type(scheduler).__name__ in done.schedulers or "_schedulers" in vars(scheduler)
    seen = train(model, optimizer, scheduler, range(stopped + 1, stopped + 6))
    for rates, wanted in zip(seen, expected[stopped:], strict=True):
        assert rates == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    if own != 0.02 and name == "timm cosine":  # whose rate is right from its next step on
        return
    for parameter, other in zip(model.parameters(), whole[0].parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-7)

    # What is stored now loads into what is built from scratch with the gates, and goes on alike.
    fresh, again, other_scheduler = run(name, [0.1, 0.02, own], converted=True)
    fresh.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    after = range(stopped + 6, stopped + 9)
    assert train(fresh, again, other_scheduler, after) == train(model, optimizer, scheduler, after)


AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "AveragedModel": lambda m: swa_utils.AveragedModel(m, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5)),
    "AveragedModel with buffers": lambda m: swa_utils.AveragedModel(
        m, avg_fn=lambda a, b, _: (a + b) / 2, use_buffers=True
    ),
    "ModelEmaV2": lambda m: timm.utils.ModelEmaV2(m, 0.5),
    "ModelEmaV3": lambda m: timm.utils.ModelEmaV3(m, 0.5),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_goes_on_as_if_it_had_been_made_of_the_converted_model(name: str) -> None:
    twins = []
    for converted in (True, False):
        model = network()
        if converted:
            normswap.convert(model, X.double(), bn_statistics="batch", match=False, inplace=True)
            for gate in gate_parameters(model).values():
                gate.requires_grad_(False)
        average = AVERAGES[name](model)
        optimizer = optim.SGD(two_groups(model, [0.1, 0.02, 0.05]), momentum=0.9)
        train(model, optimizer, None, range(2), average)
        if converted:
            for gate in gate_parameters(model).values():
                gate.requires_grad_(True)
        else:
            options: Any = {"importance_lr": 0.05, "bn_statistics": "batch", "match": False}
            done = normswap.convert_training(model, optimizer, ema=average, example_inputs=X.double(), **options)
            assert done.averages == (type(average).__name__,)
        train(model, optimizer, None, range(3), average)
        twins.append(average)
    expected, got = (average.state_dict() for average in twins)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-12)
    moved = got["module.1.mean_weight"]
    assert not torch.equal(moved, torch.tensor([0.0, 0.0, 1.0], dtype=moved.dtype))


class ListAverage:
    """As torch_ema and diffusers keep an average."""

    def __init__(self, parameters: Any) -> None:
        self.shadow_params = [p.detach().clone() for p in parameters]
        self.collected_params = None

    def update(self, model: nn.Module) -> None:
        for shadow, parameter in zip(self.shadow_params, model.parameters(), strict=True):
            shadow.lerp_(parameter.detach(), 0.5)


def test_an_average_kept_as_a_list_gets_the_gates_at_their_places() -> None:
    model = network()
    average = ListAverage(model.parameters())
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, None, range(2), average)
    shadows = list(average.shadow_params)
    normswap.convert_training(model, optimizer, ema=average)
    assert [s.shape for s in average.shadow_params] == [p.shape for p in model.parameters()]
    assert all(any(one is shadow for shadow in average.shadow_params) for one in shadows)
    train(model, optimizer, None, range(2), average)


OPTIMIZERS = [
    "Adam",
    "AdamW",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "NAdam",
    "RAdam",
    "Adamax",
    "ASGD",
    "Rprop",
    "Adafactor",
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_the_gates_and_keeps_its_state(name: str) -> None:
    model = network()
    optimizer = getattr(optim, name)(model.parameters(), lr=0.01)
    train(model, optimizer, None, range(2))
    before = {p: dict(state) for p, state in optimizer.state.items()}
    normswap.convert_training(model, optimizer)
    for parameter, state in before.items():
        assert optimizer.state[parameter].keys() == state.keys()
        assert all(optimizer.state[parameter][key] is value for key, value in state.items())
    train(model, optimizer, None, range(3))
    assert any(not layer.is_at("bn") for layer in (model[1], model[4]))


def test_of_two_optimizers_the_one_with_the_norms_gets_the_gates() -> None:
    model = network()
    matrices = optim.Muon([model[0].weight.flatten(1).detach().requires_grad_()], lr=0.01)
    kernels = optim.SGD([model[0].weight, model[3].weight], lr=0.1)
    vectors = optim.AdamW([p for p in model.parameters() if p.ndim == 1], lr=0.01)
    with pytest.raises(OptimizerError, match="optimizer: 1 of its parameters are not the model's"):
        normswap.convert_training(model, [matrices, vectors])
    schedule = lr_scheduler.LambdaLR(vectors, warm_up)
    done = normswap.convert_training(model, [kernels, vectors], schedule)
    assert done.group is vectors.param_groups[-1]
    assert len(kernels.param_groups) == 1
    assert len(schedule.base_lrs) == 2


def state_of(model: nn.Module, optimizer: Any, scheduler: Any, average: nn.Module) -> list[Any]:
    modules = [(type(m), set(vars(m)), list(m._parameters)) for whole in (model, average) for m in whole.modules()]
    lists = {name: list(v) for name, v in vars(scheduler).items() if isinstance(v, list)}
    return [modules, [len(g["params"]) for g in optimizer.param_groups], lists]


FAILURES: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "a scheduler of another optimizer": (
        lambda m, o, s, e: normswap.convert_training(m, o, lr_scheduler.StepLR(optim.SGD(m.parameters(), lr=1), 1), e),
        OptimizerError,
        "expected schedulers of the optimizer that gets the gates, but StepLR steps another optimizer",
    ),
    "a scheduler for another number of groups": (
        lambda m, o, s, e: (s.base_lrs.append(1.0), normswap.convert_training(m, o, s, e)),
        OptimizerError,
        "scheduler: LambdaLR was built for another number of parameter groups; expected 1, as in",
    ),
    "no scheduler": (
        lambda m, o, s, e: normswap.convert_training(m, o, 0.1, e),
        OptimizerError,
        "scheduler: expected a scheduler of torch or timm, got float",
    ),
    "a scheduler without its optimizer": (
        lambda m, o, s, e: normswap.convert_training(m, None, s, e),
        OptimizerError,
        "scheduler: expected its optimizer too, got none: pass optimizer=optimizer",
    ),
    "an average of another model": (
        lambda m, o, s, e: normswap.convert_training(
            m, o, s, [e, nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(9))]
        ),
        PlanError,
        "ema: Sequential is the average of another model: the plan was made for another model",
    ),
    "the model as its average": (
        lambda m, o, s, e: normswap.convert_training(m, o, s, [e, m]),
        OptimizerError,
        "ema: expected a copy of the model, got the model itself",
    ),
    "no average": (
        lambda m, o, s, e: normswap.convert_training(m, o, s, 0.99),
        OptimizerError,
        "ema: expected torch's AveragedModel, timm's ModelEma or a copy of the model, got float",
    ),
    "an average in another order": (
        lambda m, o, s, e: normswap.convert_training(m, o, s, ListAverage(reversed(list(m.parameters())))),
        OptimizerError,
        "ema: expected the tensors in ListAverage in the order of the model's parameters, found another",
    ),
    "an optimizer without the norms": (
        lambda m, o, s, e: normswap.convert_training(m, optim.SGD(m[0].parameters(), lr=1), None, e),
        OptimizerError,
        "optimizer: 6 trainable parameters are in no group",
    ),
    "two optimizers with norms": (
        lambda m, o, s, e: normswap.convert_training(m, [o, optim.Adam(m.parameters())], None, e),
        OptimizerError,
        r"optimizer: expected one with parameters of norms, got 2 \(SGD, Adam\): convert without optimizer",
    ),
    "LBFGS": (
        lambda m, o, s, e: normswap.convert_training(m, optim.LBFGS(m.parameters()), None, e),
        OptimizerError,
        r"optimizer: LBFGS supports one parameter group only: call normswap.convert\(model, inplace=True\), and train",
    ),
    "a bad rate": (
        lambda m, o, s, e: normswap.convert_training(m, o, s, e, importance_lr=-1.0),
        OptimizerError,
        "importance_lr: expected a finite number >= 0",
    ),
    "on a copy": (
        lambda m, o, s, e: normswap.convert_training(m, o, s, e, inplace=False),
        PlanError,
        "convert_training always converts in place",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), FAILURES.values(), ids=FAILURES)
def test_a_failure_leaves_everything_as_it_was(call: Any, error: type[Exception], message: str) -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, warm_up)
    average = swa_utils.AveragedModel(model)
    before = state_of(model, optimizer, scheduler, average)
    if "another number" in message:
        before[2]["base_lrs"].append(1.0)
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        call(model, optimizer, scheduler, average)
    assert state_of(model, optimizer, scheduler, average) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


class OwnSchedule(lr_scheduler.LRScheduler):
    """A class of the user's, which keeps a list per group under a name of its own, or none."""

    def __init__(self, optimizer: optim.Optimizer, shares: Rates | None) -> None:
        self.shares = shares
        super().__init__(optimizer)

    def get_lr(self) -> Rates:
        return [rate * share for rate, share in zip(self.base_lrs, self.shares or [0.5] * 9, strict=bool(self.shares))]


def test_an_own_scheduler_goes_on_or_is_refused_before_anything_changes() -> None:
    """Its next step raised, in the middle of the run."""
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scheduler = OwnSchedule(optimizer, [0.5])
    before = state_of(model, optimizer, scheduler, network())
    with pytest.raises(OptimizerError, match="OwnSchedule does not return 2 learning rates, one for each group"):
        normswap.convert_training(model, optimizer, scheduler, example_inputs=X.double())
    assert state_of(model, optimizer, scheduler, network()) == before
    scheduler.shares = None
    normswap.convert_training(model, [optimizer, optimizer], scheduler, example_inputs=X.double())
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.05, 0.05])


def test_a_failure_of_the_optimizer_itself_leaves_everything_as_it_was() -> None:
    class Full(optim.SGD):
        def add_param_group(self, group: dict[str, Any]) -> None:
            if self.param_groups:
                raise SwapError("no more groups")
            super().add_param_group(group)

    model = network()
    optimizer = Full(model.parameters(), lr=0.1)
    scheduler, average = lr_scheduler.LambdaLR(optimizer, warm_up), swa_utils.AveragedModel(model)
    before = state_of(model, optimizer, scheduler, average)
    with pytest.raises(SwapError, match="no more groups"):
        normswap.convert_training(model, optimizer, scheduler, average)
    assert state_of(model, optimizer, scheduler, average) == before


def test_a_model_without_norms_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    done = normswap.convert_training(model, optimizer, lr_scheduler.LambdaLR(optimizer, warm_up), copy.deepcopy(model))
    assert (done.plan.swaps, done.group, done.schedulers, done.averages) == ((), None, (), ())
    assert len(optimizer.param_groups) == 1


def test_the_example_in_the_docstring_runs() -> None:
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(normswap.convert_training, "convert_training", globs={}):
        runner.run(example)
    assert runner.summarize(verbose=False).attempted >= 5
    assert runner.summarize(verbose=False).failed == 0
