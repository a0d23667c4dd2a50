"""Parameter groups: regrouped, or like those of an optimizer, with the gates in a last group of their own."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn

import normswap
from normswap.errors import OptimizerError

X = torch.randn(4, 3, 6, 6)


class Net(nn.Module):
    def __init__(self, **bn: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6, **bn)
        self.token = nn.Parameter(torch.zeros(1, 6, 1, 1))
        self.second = nn.Conv2d(6, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8, **bn)
        self.head = nn.Linear(8, 5)

    def no_weight_decay(self) -> set[str]:
        return {"token"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x)).relu() + self.token
        return self.head(self.norm(self.second(x)).mean((2, 3)))


def converted(model: nn.Module | None = None, **settings: Any) -> nn.Module:
    return normswap.convert(Net() if model is None else model, X, **settings).model


GATES = ["bn.mean_weight", "bn.var_weight", "norm.mean_weight", "norm.var_weight"]
DECAYED = ["conv.weight", "second.weight", "head.weight"]
PLAIN = ["conv.bias", "bn.weight", "bn.bias", "norm.weight", "norm.bias", "head.bias"]
ORDINARY = [name for name, _ in Net().named_parameters()]
TIMM_PLAIN = ["token", *PLAIN]


def names(model: nn.Module, groups: list[dict[str, Any]]) -> list[list[str]]:
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [[name_of[parameter] for parameter in group["params"]] for group in groups]


def of(model: nn.Module, *parts: list[str], **options: Any) -> list[dict[str, Any]]:
    return [{"params": [model.get_parameter(name) for name in part], **options} for part in parts]


def options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


# --- regrouped


def test_regrouped_groups_are_timms_and_the_gates() -> None:
    model = converted()
    groups = normswap.param_groups(model, lr=0.1, weight_decay=0.05, importance_lr=0.01)
    assert names(model, groups) == [TIMM_PLAIN, DECAYED, GATES]
    assert [options(group) for group in groups] == [
        {"weight_decay": 0.0, "lr": 0.1},
        {"weight_decay": 0.05, "lr": 0.1},
        {"weight_decay": 0.0, "lr": 0.01, "gates": True},
    ]
    theirs = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert names(model, theirs)[1] == DECAYED  # and all gates are among those without decay
    assert set(names(model, theirs)[0]) == {*TIMM_PLAIN, *GATES}


def test_regrouped_without_rates_leaves_them_to_the_optimizer() -> None:
    model = converted()
    groups = normswap.param_groups(model)
    assert names(model, groups) == [ORDINARY, GATES]
    assert [options(group) for group in groups] == [{"weight_decay": 0.0}, {"weight_decay": 0.0, "gates": True}]
    optimizer = torch.optim.AdamW(groups, lr=0.2, weight_decay=0.3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.2, 0.0), (0.2, 0.0)]
    assert normswap.param_groups(model, importance_lr=0.5)[-1]["lr"] == 0.5


def test_what_does_not_train_is_left_out() -> None:
    model = converted(settings={"bn": {"train_gates": False}})
    model.head.requires_grad_(False)
    groups = normswap.param_groups(model, weight_decay=0.1)
    assert names(model, groups) == [
        [name for name in TIMM_PLAIN if not name.startswith("head")],
        DECAYED[:-1],
        GATES[2:],
    ]


def test_a_model_without_trainable_gates_gets_no_group_of_gates() -> None:
    model = Net()
    assert names(model, normswap.param_groups(model, weight_decay=0.1)) == [TIMM_PLAIN, DECAYED]
    frozen = converted(settings={"*": {"train_gates": False}})
    optimizer = torch.optim.SGD(frozen.parameters(), lr=0.1)
    assert names(frozen, normswap.param_groups(frozen, like=optimizer)) == [ORDINARY]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "muon", "lookahead_adam"])
def test_groups_go_through_timms_factory(name: str) -> None:
    model = converted()
    optimizer = create_optimizer_v2(normswap.param_groups(model, lr=0.1, weight_decay=0.05), opt=name, lr=0.1)
    assert names(model, optimizer.param_groups) == [TIMM_PLAIN, DECAYED, GATES]
    model(X).square().mean().backward()
    optimizer.step()
    assert all((model.get_parameter(name).detach() != torch.tensor([0.0, 0.0, 1.0])).any() for name in GATES)


# --- like an optimizer


def test_like_keeps_groups_and_options_and_takes_gates_out_of_them() -> None:
    model = converted()
    mixed = [DECAYED + GATES[:1], GATES[1:3] + PLAIN + ["token"]]
    old = of(model, *mixed)
    old[0] |= {"weight_decay": 0.3, "lr": 0.1}
    optimizer = torch.optim.SGD(old, lr=0.2, momentum=0.9, nesterov=True)
    before = [dict(group) for group in optimizer.param_groups]
    groups = normswap.param_groups(model, like=optimizer)
    assert names(model, groups) == [DECAYED, [*PLAIN, "token"], GATES]
    for group, of_old in zip(
        groups, [*before, before[-1] | {"lr": 0.1, "weight_decay": 0.0, "gates": True}], strict=True
    ):
        assert options(group) == options(of_old)
    assert optimizer.param_groups == before
    assert normswap.param_groups(model, like=optimizer.param_groups) == groups
    assert torch.optim.SGD(groups).param_groups[-1]["nesterov"] is True


def test_like_without_gates_among_the_groups_appends_them() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.2)
    normswap.convert(model, X, inplace=True)
    groups = normswap.param_groups(model, like=optimizer)
    assert names(model, groups) == [ORDINARY, GATES]
    optimizer.add_param_group(groups[-1])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]


def test_like_its_own_result_changes_nothing() -> None:
    model = converted()
    groups = normswap.param_groups(model, like=torch.optim.SGD(model.parameters(), lr=0.1), importance_lr=0.7)
    again = normswap.param_groups(model, like=groups)
    assert again == groups
    assert again[-1]["lr"] == 0.7


def test_a_group_of_gates_made_by_hand_keeps_its_options_but_decay_and_comes_last() -> None:
    model = converted()
    by_hand = [*of(model, GATES, lr=0.5, weight_decay=0.1, momentum=0.0), *of(model, ORDINARY, lr=0.1)]
    groups = normswap.param_groups(model, like=torch.optim.SGD(by_hand, momentum=0.9))
    assert names(model, groups) == [ORDINARY, GATES]
    assert (groups[-1]["lr"], groups[-1]["momentum"], groups[-1]["weight_decay"]) == (0.5, 0.0, 0.0)


@pytest.mark.parametrize("importance_lr", [None, 0.05])
def test_in_the_middle_of_a_schedule_gates_are_where_the_last_group_is(importance_lr: float | None) -> None:
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    gates = normswap.param_groups(model, like=optimizer, importance_lr=importance_lr)[-1]
    initial = 0.1 if importance_lr is None else importance_lr
    assert (gates["initial_lr"], gates["lr"]) == pytest.approx((initial, initial / 4))


def test_a_rate_that_is_a_tensor_is_no_alias() -> None:
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.2))
    groups = normswap.param_groups(model, like=optimizer, importance_lr=0.1)
    assert [float(group["lr"]) for group in groups] == pytest.approx([0.2, 0.1])
    groups[-1]["lr"].fill_(9)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.2)
    assert float(normswap.param_groups(model, like=optimizer)[-1]["lr"]) == pytest.approx(0.1)


def test_a_rate_of_zero_or_none_is_no_obstacle() -> None:
    model = converted()
    for rate in (0.0, None):
        groups = normswap.param_groups(model, like=of(model, ORDINARY, lr=rate), importance_lr=0.3)
        assert groups[-1]["lr"] == 0.3
        assert normswap.param_groups(model, like=of(model, ORDINARY, lr=rate))[-1]["lr"] == rate


def test_frozen_parameters_stay_in_their_place_and_frozen_gates_go() -> None:
    model = converted(settings={"bn": {"train_gates": False}})
    model.conv.requires_grad_(False)
    groups = normswap.param_groups(model, like=torch.optim.SGD(model.parameters(), lr=0.1))
    assert names(model, groups) == [ORDINARY, GATES[2:]]


def test_parameter_names_are_kept_and_the_gates_get_theirs() -> None:
    model = converted()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    groups = normswap.param_groups(model, like=optimizer)
    assert [group["param_names"] for group in groups] == [ORDINARY, GATES]
    assert names(model, torch.optim.SGD(groups, lr=0.1).param_groups) == [ORDINARY, GATES]
    with_empty = [*optimizer.param_groups, {"params": [], "param_names": [], "lr": 0.1}]
    assert normswap.param_groups(model, like=with_empty)[-1]["param_names"] == GATES
    pairs = [{"params": list(model.named_parameters()), "lr": 0.1}]
    assert normswap.param_groups(model, like=pairs)[-1]["param_names"] == GATES


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrapped_models_are_looked_into(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = converted()
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.named_parameters(), lr=0.1)
    groups = normswap.param_groups(wrapped, like=optimizer)
    assert names(model, groups) == [ORDINARY, GATES]
    prefix = optimizer.param_groups[0]["param_names"][0].removesuffix("token")
    assert groups[-1]["param_names"] == [prefix + name for name in GATES]
    assert names(model, normswap.param_groups(wrapped, like=optimizer.state_dict())) == [ORDINARY, GATES]
    assert names(model, normswap.param_groups(wrapped, weight_decay=0.1)) == [TIMM_PLAIN, DECAYED, GATES]


def test_gates_that_no_registry_knows_move_where_the_optimizer_has_them() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)
            self.norms = [nn.BatchNorm2d(6)]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norms[0](self.conv(x))

    model = converted(Hidden())
    layer = model.norms[0]
    assert len(normswap.param_groups(model, like=torch.optim.SGD(model.parameters(), lr=0.1))) == 1
    optimizer = torch.optim.SGD([*model.parameters(), *layer.parameters()], lr=0.1)
    groups = normswap.param_groups(model, like=optimizer)
    assert groups[0]["params"] == [*model.parameters(), layer.weight, layer.bias]
    assert groups[1]["params"] == [layer.mean_weight, layer.var_weight]


# --- like a state dict, where parameters are numbers


def two(first: list[str], second: list[str], *decay: float) -> Callable[[nn.Module], list[dict[str, Any]]]:
    return lambda model: [
        {**group, "weight_decay": value} for group, value in zip(of(model, first, second), decay, strict=True)
    ]


NORMS = ["bn.weight", "bn.bias", "norm.weight", "norm.bias"]
OTHERS = [name for name in ORDINARY if name not in NORMS]
LAYOUTS = {
    "all": (lambda model: list(model.parameters()), [ORDINARY]),
    "timm": (two(TIMM_PLAIN, DECAYED, 0.0, 0.1), [TIMM_PLAIN, DECAYED]),
    "decayed first": (two(["token", *DECAYED], PLAIN, 0.1, 0.0), [["token", *DECAYED], PLAIN]),
    "torchvision": (two(OTHERS, NORMS, 0.1, 0.0), [OTHERS, NORMS]),
    "torchvision, decayed": (two(OTHERS, NORMS, 0.1, 0.2), [OTHERS, NORMS]),
}


@pytest.mark.parametrize(("build", "expected"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("stepped", [True, False])
def test_numbers_are_read_by_the_known_orders(build: Any, expected: list[list[str]], stepped: bool) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(build(model), lr=0.1)
    if stepped:
        model(X).square().mean().backward()
        optimizer.step()
    state = optimizer.state_dict()
    twin = converted(model)
    groups = normswap.param_groups(twin, like=state)
    assert names(twin, groups) == [*expected, GATES]
    assert [group["weight_decay"] for group in groups[:-1]] == [
        group["weight_decay"] for group in state["param_groups"]
    ]
    assert names(twin, normswap.param_groups(twin, like=state["param_groups"])) == [*expected, GATES]


def test_timms_own_groups_are_read() -> None:
    model = Net()
    state = create_optimizer_v2(model, opt="adamw", lr=0.1, weight_decay=0.1).state_dict()
    twin = converted(model)
    assert names(twin, normswap.param_groups(twin, like=state)) == [TIMM_PLAIN, DECAYED, GATES]


def test_only_what_trained_may_be_numbered() -> None:
    model = Net()
    model.conv.requires_grad_(False)
    twin = converted(model)
    trained = [name for name in ORDINARY if not name.startswith("conv")]
    state = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).state_dict()
    assert names(twin, normswap.param_groups(twin, like=state)) == [trained, GATES]


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, torch.compile])
def test_names_in_a_state_dict_decide_in_any_order(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = Net()
    shuffled = list(reversed(list(wrap(model).named_parameters())))
    state = torch.optim.SGD(shuffled, lr=0.1).state_dict()
    twin = converted(model)
    groups = normswap.param_groups(twin, like=state)
    assert names(twin, groups) == [ORDINARY[::-1], GATES]
    by_name = [{"params": [name for name, _ in shuffled], "lr": 0.1}]
    assert names(twin, normswap.param_groups(twin, like=by_name)) == [ORDINARY[::-1], GATES]


def test_the_state_dict_of_a_converted_models_optimizer_is_read() -> None:
    model = converted()
    optimizer = torch.optim.SGD(normswap.param_groups(model, lr=0.1, weight_decay=0.1, importance_lr=0.7))
    groups = normswap.param_groups(model, like=optimizer.state_dict())
    assert names(model, groups) == [TIMM_PLAIN, DECAYED, GATES]
    assert groups[-1]["lr"] == 0.7


# --- refused

MODEL = converted()
ANOTHER = Net()


def refusals() -> dict[str, tuple[Callable[[], Any], dict[str, Any], str]]:
    def state(*parts: list[str], **extra: Any) -> dict[str, Any]:
        counts = itertools.count()
        groups = [{"params": [next(counts) for _ in part], "weight_decay": 0.0, "lr": 0.1, **extra} for part in parts]
        return {"state": {}, "param_groups": groups}

    def wrong_shapes() -> dict[str, Any]:
        return {**state(ORDINARY), "state": {0: {"exp_avg": torch.zeros(7), "step": torch.tensor(1.0)}}}

    return {
        "a copy": (
            lambda: torch.optim.SGD(ANOTHER.parameters(), lr=0.1),
            {},
            r"like: 10 of its parameters are not the model's \(1x6x1x1, 6x3x3x3, 6\): build the optimizer from the "
            r"converted model, or convert with inplace=True",
        ),
        "one missing": (
            lambda: torch.optim.SGD(MODEL.head.parameters(), lr=0.1),
            {},
            r"like: 8 trainable parameters are in no group \(token, conv.weight, conv.bias, \+5 more\): add them",
        ),
        "parameters": (
            lambda: list(MODEL.parameters()),
            {},
            "like: expected an optimizer, its param_groups or its state dict, got list: pass like=optimizer",
        ),
        "a model": (lambda: MODEL, {}, "expected an optimizer, .* got Net"),
        "no groups": (lambda: [], {}, "expected an optimizer, .* got list"),
        "another dict": (lambda: {"epoch": 3}, {}, "expected an optimizer, .* got dict"),
        "unknown order": (
            lambda: state(ORDINARY[:2], ORDINARY[2:]),
            {},
            r"like: its parameters are numbers, and its groups of 2 and 8 of the model's 10 parameters fit no known "
            r"order \(model.parameters\(\), timm's factory, .*\): pass like=the optimizer that your code builds",
        ),
        "wrong shapes": (wrong_shapes, {}, "its groups of 10 of the model's 10 parameters fit no known order"),
        "unknown names": (
            lambda: state(["a.b", "c"], param_names=["a.b", "head.bias"]),
            {},
            r"like: 1 of its names are not the model's \(a.b\): pass like=the optimizer",
        ),
        "another number of gates": (
            lambda: {"state": {}, "param_groups": state(ORDINARY)["param_groups"] + [{"params": [10], "gates": True}]},
            {},
            "its group of gates has 1 parameters, but the model has 4 trainable gates",
        ),
        "decay with like": (
            lambda: torch.optim.SGD(MODEL.parameters(), lr=0.1),
            {"weight_decay": 0.1},
            "like= keeps the lr and weight_decay of the old groups: remove lr and weight_decay",
        ),
        "rate with like": (lambda: torch.optim.SGD(MODEL.parameters(), lr=0.1), {"lr": 0.1}, "like= keeps the lr"),
        "a negative rate": (lambda: None, {"lr": -1.0}, "lr: expected a finite number >= 0, got -1.0"),
        "no decay": (
            lambda: None,
            {"weight_decay": float("nan")},
            "weight_decay: expected a finite number >= 0, got nan",
        ),
        "no rate": (
            lambda: None,
            {"importance_lr": float("inf")},
            "importance_lr: expected a finite number >= 0, got inf",
        ),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_does_not_fit_is_refused(case: str) -> None:
    like, arguments, message = refusals()[case]
    with pytest.raises(OptimizerError, match=message):
        normswap.param_groups(MODEL, like=like(), **arguments)


def test_two_orders_that_both_fit_are_refused() -> None:
    model = converted(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, bias=False)))
    groups = [{"params": [0, 1], "lr": 0.1}, {"params": [2, 3], "lr": 0.1}]
    with pytest.raises(
        OptimizerError, match="groups of 2 and 2 of the model's 4 parameters fit more than one known order"
    ):
        normswap.param_groups(model, like=[groups[0], groups[1] | {"weight_decay": 0.1}])
