"""`watch_importance`: what is written and switched after which step, for every wrapper of an optimizer."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from pytorch_lightning.core.optimizer import LightningOptimizer
from timm.optim import Lookahead
from torch import Tensor, nn

from normswap import ImportanceWatch, NormswapError, SwitchNorm2d, convert, param_groups, watch_importance
from normswap.errors import LayerError, OptimizerError, WatchError
from tests.helpers import zoo

X = zoo.image(2, 3, 9, 9)()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = zoo.conv(), zoo.bn(), zoo.bn()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.conv(x)).relu())


def network() -> Any:
    torch.manual_seed(0)
    return convert(
        zoo.randomise(Net()), X, bn_statistics="batch", settings={"second": {"branches": ("ln", "bn")}}
    ).model.train()


def built(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(param_groups(model, lr=0.01, importance_lr=0.5))


def train(model: nn.Module, optimizer: Any, steps: int, accumulated: int = 1) -> Iterator[int]:
    for step in range(1, steps + 1):
        for _ in range(accumulated):
            model(X).square().mul(torch.arange(8.0)[:, None, None]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def recorder() -> tuple[list[tuple[int, dict[str, float]]], Callable[[dict[str, float], int], None]]:
    lines: list[tuple[int, dict[str, float]]] = []
    return lines, lambda values, step: lines.append((step, values))


def set_points(model: Any) -> None:
    with torch.no_grad():
        for site, mean, var in ((model.first, [0.5, 0.25, 0.25], [0, 0, 1]), (model.second, [0.75, 0.25], [1, 0])):
            site.mean_weight.copy_(torch.tensor(mean))
            site.var_weight.copy_(torch.tensor(var))


AVERAGES = {
    "importance/mean/in": 0.25,
    "importance/mean/ln": 0.5,
    "importance/mean/bn": 0.25,
    "importance/var/in": 0.0,
    "importance/var/ln": 0.5,
    "importance/var/bn": 0.5,
}
OF_SITES = {
    "importance/first/mean/in": 0.5,
    "importance/first/mean/ln": 0.25,
    "importance/first/mean/bn": 0.25,
    "importance/first/var/in": 0.0,
    "importance/first/var/ln": 0.0,
    "importance/first/var/bn": 1.0,
    "importance/second/mean/ln": 0.75,
    "importance/second/mean/bn": 0.25,
    "importance/second/var/ln": 1.0,
    "importance/second/var/bn": 0.0,
}


@pytest.mark.parametrize(("per_site", "expected"), [(False, AVERAGES), (True, AVERAGES | OF_SITES)])
def test_averages_and_single_sites_are_reported_by_name(per_site: bool, expected: dict[str, float]) -> None:
    model, (lines, write) = network(), recorder()
    set_points(model)
    watch_importance(model, built(model), write=write, per_site=per_site)
    assert lines == [(0, expected)]


def test_a_summary_writer_gets_every_number() -> None:
    from torch.utils.tensorboard import SummaryWriter

    class Board(SummaryWriter):
        def __init__(self) -> None:
            self.calls: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:  # type: ignore[override]
            self.calls.append((tag, scalar_value, global_step))

    model, board = network(), Board()
    set_points(model)
    watch_importance(model, built(model), write=board)
    assert board.calls == [(name, value, 0) for name, value in AVERAGES.items()]


@pytest.mark.parametrize(("before", "expected"), [(0, [0, 2, 4]), (3, [4, 6]), (4, [6, 8])])
def test_steps_are_counted_and_not_batches(before: int, expected: list[int]) -> None:
    model, (lines, write) = network(), recorder()
    optimizer = built(model)
    with watch_importance(model, optimizer, write=write, every=2, step=before) as watch:
        for _ in train(model, optimizer, 4, accumulated=2):
            pass
    assert watch.step == before + 4
    assert [step for step, _ in lines] == expected
    assert lines[-1][1]["importance/mean/bn"] < 1  # as they are after the step
    for _ in train(model, optimizer, 2):
        pass
    assert [step for step, _ in lines] == expected, "written after the end"


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (0, ["batch", "renorm", "renorm", "running", "running"]),
        (2, ["renorm", "running", "running", "running", "running"]),
        (7, ["running"] * 5),
    ],
)
def test_statistics_are_switched_before_the_step_that_they_are_for(before: int, expected: list[str]) -> None:
    model = network()
    optimizer = built(model)
    watch_importance(model, optimizer, bn_statistics={3: "running", 1: "renorm"}, step=before)
    found = [model.first.bn_statistics]
    found += [model.second.bn_statistics for _ in train(model, optimizer, 4)]
    assert found == expected


def test_a_switch_happens_once_and_leaves_what_the_user_sets_afterwards() -> None:
    model = network()
    optimizer = built(model)
    watch_importance(model, optimizer, bn_statistics={0: "renorm"})
    model.first.bn_statistics = "batch"
    for _ in train(model, optimizer, 2):
        assert (model.first.bn_statistics, model.second.bn_statistics) == ("batch", "renorm")


def in_lightning(optimizer: Any) -> LightningOptimizer:
    """As its Trainer wraps one."""
    wrapped = LightningOptimizer(optimizer)
    wrapped._strategy = SimpleNamespace(optimizer_step=lambda inside, closure: inside.step(closure))  # type: ignore
    return wrapped


WRAPPED: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "bare": lambda optimizer: optimizer,
    "accelerate": lambda optimizer: Accelerator(cpu=True).prepare_optimizer(optimizer),
    "timm Lookahead": Lookahead,
    "Lightning": in_lightning,
    "Lightning around Lookahead": lambda optimizer: in_lightning(Lookahead(optimizer)),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_step_of_a_wrapped_optimizer_counts_once(wrap: Callable[[torch.optim.Optimizer], Any]) -> None:
    model = network()
    wrapped = wrap(built(model))
    watch = watch_importance(model, wrapped, write=lambda *_: None)
    for step in train(model, wrapped, 3):
        assert watch.step == step


def test_a_step_that_a_loss_scaler_leaves_out_does_not_count() -> None:
    model = network()
    optimizer, scaler = built(model), torch.amp.GradScaler("cpu")
    watch = watch_importance(model, optimizer, write=lambda *_: None)
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale(model(X).mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert watch.step == 2


def test_a_watched_optimizer_stores_what_it_did_before() -> None:
    model = network()
    optimizer = built(model)
    before = optimizer.state_dict()
    watch_importance(model, optimizer, write=print, bn_statistics={0: "batch"})
    assert optimizer.state_dict() == before


def scratch(**options: Any) -> nn.Module:
    return nn.Sequential(SwitchNorm2d(8, **options))


Refusal = tuple[Callable[[], Any], type[NormswapError], str]
REFUSED: dict[str, Refusal] = {
    "nothing to do": (
        lambda: watch_importance(model := network(), built(model)),
        WatchError,
        "nothing to do: pass write, such as write=print, bn_statistics=",
    ),
    "every": (
        lambda: watch_importance(model := network(), built(model), write=print, every=0),
        WatchError,
        "every: expected a number of steps of at least 1, got 0",
    ),
    "no model with SN": (
        lambda: watch_importance(model := Net(), built(model), write=print),
        WatchError,
        r"expected a model with SN layers, found none: convert it first with normswap.convert\(model\)",
    ),
    "nothing to switch": (
        lambda: watch_importance(model := scratch(branches=("in", "ln")), built(model), bn_statistics={9: "batch"}),
        WatchError,
        "expected SN layers with a `bn` branch, found none: convert the model first",
    ),
    "mode": (
        lambda: watch_importance(model := network(), built(model), bn_statistics={9: "frozen"}),  # type: ignore[dict-item]
        LayerError,
        r"bn_statistics: expected one of .* got 'frozen'",
    ),
    "key": (
        lambda: watch_importance(model := network(), built(model), bn_statistics={-1: "batch"}),
        WatchError,
        "bn_statistics: expected step numbers such as 0 and 1000 as keys, got -1",
    ),
    "no optimizer": (
        lambda: watch_importance(network(), "adam", write=print),
        OptimizerError,
        "optimizer: expected a torch optimizer, got str",
    ),
    "built before the conversion": (
        lambda: watch_importance(network(), built(Net()), write=print),
        OptimizerError,
        "optimizer: has none of the model's 4 gates, so they would not be trained: build it from normswap.param_groups",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(call: Callable[[], Any], kind: type[NormswapError], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_a_refusal_changes_nothing() -> None:
    model = network()
    optimizer = built(model)
    with pytest.raises(WatchError, match="every"):
        watch_importance(model, optimizer, write=print, every=0, bn_statistics={0: "running"})
    assert model.first.bn_statistics == "batch"
    assert not optimizer._optimizer_step_post_hooks


def test_a_handle_takes_its_callbacks_by_their_old_name() -> None:
    lines: list[int] = []
    callback = SimpleNamespace(on_step=lines.append)
    with pytest.warns(DeprecationWarning, match=r"ImportanceWatch\(parts=\) of normswap was renamed to callbacks"):
        ImportanceWatch(parts=[callback], step=3)
    assert ImportanceWatch([callback], 4).step == 4
    assert lines == [3, 4]


def test_a_switch_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    with caplog.at_level("INFO", logger="normswap"):
        watch_importance(model, built(model), bn_statistics={0: "renorm"})
    assert "bn_statistics='renorm' from step or epoch 0 on" in caplog.text
