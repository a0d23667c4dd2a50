"""Calibration: the statistics of a whole data set, compared with float64 oracles; nothing else changes."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers.norm_act import FrozenBatchNorm2d
from torch import Tensor, nn

from normswap import calibrate, convert, freeze_statistics
from normswap.errors import DataError, ModelError, NothingToDo
from tests.helpers import guarantees, zoo

BATCHES = [zoo.image(n, 3, 9, 9)().double() * n + n for n in (4, 2, 3)]
EVERYTHING = torch.cat(BATCHES)
LIMIT = 1e-12
STATISTICS = ("running_mean", "running_var")


def chain() -> Any:
    """conv, bn, ReLU, bn of a plain average: what an oracle computes by hand."""
    torch.manual_seed(5)
    second = nn.BatchNorm2d(8, eps=1e-3, momentum=None)
    return zoo.randomise(nn.Sequential(zoo.conv(), zoo.bn(), nn.ReLU(), second)).double().train()


def mixed(model: nn.Module) -> Any:
    """The conversion, as if trained: all gates but the first one's in the middle of the simplex."""
    converted: Any = convert(model, BATCHES[0]).model
    for parameter in (converted[3].mean_weight, converted[3].var_weight):
        parameter.data.copy_(torch.tensor([0.25, 0.25, 0.5]))
    return converted


MAKES: dict[str, Callable[[], Any]] = {
    "BN": chain,
    "SN": lambda: convert(chain(), BATCHES[0]).model,
    "SN, mixed": lambda: mixed(chain()),
    "SN and BN": lambda: convert(chain(), BATCHES[0], exclude=["3"]).model,
    "SN of batch statistics": lambda: convert(chain(), BATCHES[0], bn_statistics="batch").model,
    "SN, raw": lambda: convert(chain(), BATCHES[0], match=False).model,
}
every_make = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def moments(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance per channel of everything in a list."""
    flat = torch.cat([x.double().transpose(0, 1).reshape(x.shape[1], -1) for x in values], 1)
    return flat.mean(1), flat.var(1, correction=1)


def normalized(x: Tensor, bn: Any, mean: Tensor, var: Tensor) -> Tensor:
    mean, var, weight, bias = (t.reshape(1, -1, 1, 1) for t in (mean, var, bn.weight, bn.bias))
    return (x - mean) / (var + bn.eps).sqrt() * weight + bias


def assert_statistics(layer: Any, expected: tuple[Tensor, Tensor], limit: float = LIMIT) -> None:
    for name, value in zip(STATISTICS, expected, strict=True):
        assert guarantees.distance(value, getattr(layer, name).double()) <= limit, name


# --- what is stored ---------------------------------------------------------------------------------------------------


@every_make
@torch.no_grad()
def test_in_one_pass_each_layer_gets_the_statistics_of_batch_normalized_inputs(make: Callable[[], Any]) -> None:
    model, original = make(), chain()
    result = calibrate(model, BATCHES)
    first = [original[0](x) for x in BATCHES]
    second = [normalized(x, original[1], x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)).relu() for x in first]
    assert_statistics(model[1], moments(first))
    assert_statistics(model[3], moments(second))
    assert [layer.values for layer in result.layers] == [9 * 81, 9 * 81]
    assert (model[1].num_batches_tracked, model[3].num_batches_tracked) == (3, 3)
    assert (result.batches, result.passes, result.skipped) == (3, 1, ())


@every_make
@torch.no_grad()
def test_layer_by_layer_each_layer_gets_the_statistics_of_its_inputs_in_evaluation(make: Callable[[], Any]) -> None:
    model, original = make(), chain()
    result = calibrate(model, BATCHES, layer_by_layer=True)
    x = original[0](EVERYTHING)
    first = moments([x])
    assert_statistics(model[1], first)
    assert_statistics(model[3], moments([normalized(x, original[1], *first).relu()]))
    assert ([layer.fqn for layer in result.layers], result.passes, result.batches) == (["1", "3"], 2, 3)


@pytest.mark.parametrize("convert_it", [False, True], ids=["BN", "SN"])
def test_statistics_in_float32_are_exact_where_the_mean_is_large(convert_it: bool) -> None:
    model: Any = nn.Sequential(nn.BatchNorm2d(3))
    batches = [torch.randn(n, 3, 7, 7, generator=torch.Generator().manual_seed(n)) / 2 + 3000 for n in (1, 5, 2)]
    if convert_it:
        model = convert(model, batches[1]).model
    calibrate(model, batches)
    assert_statistics(model[0], moments(batches), limit=1e-6)


def test_a_second_calibration_moves_nothing() -> None:
    model = MAKES["SN"]()
    assert calibrate(model, BATCHES).largest_shift > 0.1
    before = copy.deepcopy(model.state_dict())
    assert calibrate(model, BATCHES).largest_shift == 0
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_the_shift_is_the_most_that_a_normalized_value_moves() -> None:
    model = nn.Sequential(zoo.randomise(nn.BatchNorm2d(3, affine=False)).double()).eval()
    old = copy.deepcopy(model)
    (layer,) = calibrate(model, BATCHES).layers
    mean, var = old[0].running_mean, old[0].running_var
    ends = torch.stack([mean + sign * (var + 1e-5).sqrt() for sign in (-1, 1)])
    moved = (model(ends[:, :, None, None]) - old(ends[:, :, None, None])).abs()
    assert layer.shift == pytest.approx(float(moved.max()))
    centre = mean[None, :, None, None]
    assert layer.mean_shift == pytest.approx(float((model(centre) - old(centre)).abs().max()))
    ratio = ((var + 1e-5) / (model[0].running_var + 1e-5)).sqrt()
    assert layer.deviation_ratio == pytest.approx(float(ratio[ratio.log().abs().argmax()]))


def test_old_statistics_that_are_no_numbers_are_replaced() -> None:
    model = chain()
    model[1].running_var.fill_(float("nan"))
    result = calibrate(model, BATCHES)
    assert result.largest_shift == float("inf")
    assert result.to_dict()["layers"][0]["shift"] == float("inf")
    assert all(buffer.isfinite().all() for buffer in model.buffers())


class Shared(nn.Module):
    """One norm run twice in a pass, dropout before it, and one norm that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.idle = zoo.conv(3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.bn(self.drop(x))))


@pytest.mark.parametrize("layer_by_layer", [False, True])
@torch.no_grad()
def test_a_shared_layer_counts_all_its_calls_and_dropout_is_off(layer_by_layer: bool) -> None:
    model = zoo.randomise(Shared()).double().train()
    before = copy.deepcopy(model)
    result = calibrate(model, BATCHES, layer_by_layer=layer_by_layer)
    between = [
        before.conv(normalized(x, before.bn, x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))) for x in BATCHES
    ]
    assert_statistics(model.bn, moments([*BATCHES, *between]))
    assert [(layer.fqn, layer.calls, layer.values) for layer in result.layers] == [("bn", 6, 2 * 9 * 81)]
    assert [(left.fqn, left.reason) for left in result.skipped] == [("idle", "did not run")]
    assert model.idle.running_mean.equal(before.idle.running_mean)


class Sometimes(nn.Module):
    """Its second norm runs on large batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if len(x) > 2 else x


def test_a_layer_that_runs_on_later_batches_only_is_met() -> None:
    model = Sometimes().double()
    result = calibrate(model, BATCHES[1:], layer_by_layer=True)
    assert ([layer.fqn for layer in result.layers], result.passes) == (["first", "second"], 2)
    assert_statistics(model.second, moments([copy.deepcopy(model).eval().first(BATCHES[2])]))


# --- functional sites -------------------------------------------------------------------------------------------------


class TwoBlocks(nn.Module):
    """A functional site after a module site."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.block = nn.BatchNorm2d(3), zoo.FunctionalBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.bn(x))


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_the_buffers_of_a_functional_site_are_calibrated(training: bool) -> None:
    model: Any = convert(zoo.randomise(TwoBlocks()).double().train(training), BATCHES[0]).model
    before = copy.deepcopy(model)
    result = calibrate(model, BATCHES)
    fed = [normalized(x, before.bn, x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) for x in BATCHES]
    assert_statistics(model.block, moments([before.block.conv(x) for x in fed]))
    assert ([layer.fqn for layer in result.layers], result.skipped) == (["bn", "block.batch_norm"], ())
    once = calibrate(before, BATCHES, layer_by_layer=True)
    assert (once.passes, len(once.layers)) == (2, 2)
    assert not before.block.running_var.equal(model.block.running_var)


def test_a_functional_call_that_is_no_site_yet_is_reported() -> None:
    model = TwoBlocks().double()
    before = model.block.running_mean.clone()
    (left,) = calibrate(model, BATCHES).skipped
    assert (left.fqn, left.reason) == ("block", "calls F.batch_norm itself: convert the model first, then calibrate it")
    assert model.block.running_mean.equal(before)


class Steps(nn.Module):
    """Statistics of their own for each of two steps, as few-shot learners keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(2, 3))
        self.register_buffer("variances", torch.ones(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.means[0], self.variances[0], training=self.training).exp()
        return F.batch_norm(x, self.means[1], self.variances[1], training=self.training)


class Wobbling(zoo.OwnTensors):
    """Running statistics computed at each call: nothing to write to."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean * 1, self.running_var * 1, training=self.training)


@torch.no_grad()
def test_rows_of_a_table_of_statistics_are_distinguished() -> None:
    model: Any = convert(Steps().double(), BATCHES[0]).model
    result = calibrate(model, BATCHES)
    second = [F.batch_norm(x, None, None, training=True).exp() for x in BATCHES]
    assert [layer.fqn for layer in result.layers] == ["batch_norm", "batch_norm_1"]
    for row, (mean, var) in enumerate((moments(BATCHES), moments(second))):
        assert guarantees.distance(mean, model.means[row]) <= LIMIT
        assert guarantees.distance(var, model.variances[row]) <= LIMIT


def test_statistics_computed_at_each_call_are_left() -> None:
    model: Any = convert(nn.Sequential(nn.BatchNorm2d(3), Wobbling(3)).double(), BATCHES[0]).model
    (left,) = calibrate(model, BATCHES).skipped
    assert (left.fqn, left.reason) == ("1.batch_norm", "its running statistics are computed again in each call")


# --- what is left alone -----------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """A norm of every sort that has a reason to be left, and one that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.ice = nn.BatchNorm2d(3), FrozenBatchNorm2d(3)
        self.cold, self.untracked = nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)
        self.each, self.lazy = nn.InstanceNorm2d(3, track_running_stats=True), nn.LazyBatchNorm2d()

    def forward(self, x: Tensor) -> Tensor:
        return self.each(self.untracked(self.cold(self.ice(self.bn(x)))))


def test_reasons_are_given_for_what_is_left() -> None:
    model = Everything().double()
    freeze_statistics(model.cold)
    result = calibrate(model, BATCHES)
    assert [layer.fqn for layer in result.layers] == ["bn"]
    reasons = {left.fqn: left.reason for left in result.skipped}
    frozen = "frozen, its running statistics are constants: use include_frozen=True to calibrate it too"
    assert reasons == {
        "ice": "a frozen BatchNorm: convert the model first, then calibrate it with include_frozen=True",
        "cold": frozen,
        "untracked": "keeps no running statistics",
        "each": "an InstanceNorm, whose running statistics are averages over samples",
        "lazy": "has seen no input yet: run one batch through the model first",
    }
    assert model.cold.running_mean.equal(torch.zeros(3).double())
    assert [layer.fqn for layer in calibrate(model, BATCHES, include_frozen=True).layers] == ["bn", "cold"]


def test_what_replaced_a_frozen_norm_is_calibrated_on_request() -> None:
    def model() -> Any:
        return convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), FrozenBatchNorm2d(3)).double(), BATCHES[0]).model

    (left,) = calibrate(model(), BATCHES).skipped
    assert left.fqn == "2"
    assert left.reason.startswith("frozen")
    everything = model()
    assert [layer.fqn for layer in calibrate(everything, BATCHES, include_frozen=True).layers] == ["0", "2"]
    assert_statistics(everything[2], moments([F.batch_norm(x, None, None, training=True).relu() for x in BATCHES]))


def test_what_has_no_bn_branch_is_left() -> None:
    model = nn.Sequential(nn.InstanceNorm2d(3), nn.BatchNorm2d(3)).double()
    converted = convert(model, BATCHES[0], kinds=("bn", "in")).model
    (left,) = calibrate(converted, BATCHES).skipped
    assert (left.fqn, left.reason) == ("0", "has no `bn` branch")


@every_make
@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_only_statistics_and_what_follows_from_them_change(make: Callable[[], Any], layer_by_layer: bool) -> None:
    model = make()
    model[2].train(False)
    model.register_buffer("other", torch.ones(3))
    record = guarantees.Record.of(model)
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda *args: seen.append(args[2]))
    calibrate(model, BATCHES, layer_by_layer=layer_by_layer)
    handle.remove()
    after = guarantees.Record.of(model)
    assert (after.modules, after.classes, after.flags) == (record.modules, record.classes, record.flags)
    assert after.hooks == record.hooks
    assert {p: {n: id(v) for n, v in a.items()} for p, a in after.attributes.items()} == {
        p: {n: id(v) for n, v in a.items()} for p, a in record.attributes.items()
    }
    assert {name: id(tensor) for name, tensor in after.tensors.items()} == {
        name: id(tensor) for name, tensor in record.tensors.items()
    }
    changed = {name for name, value in after.values.items() if not value.equal(record.values[name])}
    at_bn = [f"{i}." for i in (1, 3) if getattr(model[i], "matched", False) and model[i].is_at("bn")]
    matched = {f"{prefix}{name}" for prefix in at_bn for name in ("ln_mean_shift", "ln_var_scale")}
    assert changed == {f"{i}.{name}" for i in (1, 3) for name in (*STATISTICS, "num_batches_tracked")} | matched
    assert not any(y.requires_grad for y in seen)


@pytest.mark.parametrize(
    "as_batch",
    [lambda x: (x, "label"), lambda x: [x, "label"], lambda x: {"input": x}, lambda x: ((x,), "label")],
    ids=["tuple", "list", "keywords", "arguments"],
)
def test_batches_are_what_loaders_give(as_batch: Callable[[Tensor], Any]) -> None:
    plain, model = chain(), chain()
    calibrate(plain, BATCHES)
    calibrate(model, [as_batch(x) for x in BATCHES], device="cpu")
    assert all(value.equal(plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_names_are_those_inside_wrappers() -> None:
    plain, inside = chain(), chain()
    calibrate(plain, BATCHES)
    torch.compiler.reset()
    inside[3].compile(backend="eager")
    model: Any = torch.compile(nn.DataParallel(inside), backend="eager")
    with torch.no_grad():
        model(BATCHES[0])
    inside.load_state_dict(chain().state_dict())
    assert [layer.fqn for layer in calibrate(model, BATCHES).layers] == ["1", "3"]
    assert all(value.equal(plain.state_dict()[name]) for name, value in inside.state_dict().items())


def test_empty_batches_count_for_nothing() -> None:
    plain, model = chain(), chain()
    calibrate(plain, BATCHES)
    assert calibrate(model, [*BATCHES, BATCHES[0][:0]]).batches == 4
    assert_statistics(model[3], (plain[3].running_mean, plain[3].running_var))
    with pytest.raises(NothingToDo, match=r"\(1: got empty batches only; 3: "):
        calibrate(model, [BATCHES[0][:0]])


# --- failures ---------------------------------------------------------------------------------------------------------


def failing() -> Iterator[Tensor]:
    yield BATCHES[0]
    raise RuntimeError("the disk is full")


def spoiled(value: float) -> list[Tensor]:
    bad = BATCHES[1].clone()
    bad[1, 2, 3, 4] = value
    return [BATCHES[0], bad]


def unready(batches: Iterable[Tensor]) -> Any:
    return (batch for batch in batches)


FAILURES: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "loader": (failing, {}, RuntimeError, "^the disk is full$"),
    "nothing": (list, {}, DataError, "^batches: expected at least one batch, got none$"),
    "nothing for every layer": (list, {"layer_by_layer": True}, DataError, "expected at least one batch, got none"),
    "NaN": (
        lambda: spoiled(float("nan")),
        {},
        DataError,
        r"^batch 1 \(counted from 0\): layer '1' got NaN or infinite values \(2x8x9x9\)",
    ),
    "infinity": (lambda: spoiled(float("inf")), {"layer_by_layer": True}, DataError, "batch 1 .* layer '1' got NaN"),
    "channels": (
        lambda: [BATCHES[0], BATCHES[1][:, :2]],
        {},
        ModelError,
        r"^batch 1 \(counted from 0\): the model fails on an input of 2x2x9x9: .*channels",
    ),
    "once": (
        lambda: unready(BATCHES),
        {"layer_by_layer": True},
        DataError,
        "layer_by_layer needs an iterable for several passes, such as a list or a DataLoader; got generator",
    ),
}


@pytest.mark.parametrize("case", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("make", [MAKES["BN"], MAKES["SN, mixed"]], ids=["BN", "SN"])
def test_a_failure_leaves_everything_as_it_was(make: Callable[[], Any], case: Any) -> None:
    batches, options, error, message = case
    model = make()
    model[1].eval()
    record = guarantees.Record.of(model)
    with pytest.raises(error, match=message):
        calibrate(model, batches(), **options)
    after = guarantees.Record.of(model)
    assert (after.flags, after.hooks) == (record.flags, record.hooks)
    assert all(value.equal(record.values[name]) for name, value in after.values.items())


def test_a_failure_in_a_late_pass_puts_back_what_earlier_ones_wrote() -> None:
    class Grumpy(list[Tensor]):
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            if self.passes == 5:  # asked whether there is another one, for the order, for the first layer
                raise RuntimeError("the disk is full")
            return super().__iter__()

    model = chain()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="the disk is full"):
        calibrate(model, Grumpy(BATCHES), layer_by_layer=True)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_other_channels_than_those_of_a_layer_are_refused() -> None:
    with pytest.raises(DataError, match=r"layer '0' expects an input of 3 channels, got 2x2x9x9: pass batches"):
        calibrate(nn.Sequential(nn.BatchNorm2d(3)).double(), [BATCHES[1][:, :2]])


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_one_value_per_channel_is_refused(layer_by_layer: bool) -> None:
    batches = [torch.ones(2, 3), torch.ones(1, 3)]
    with pytest.raises(DataError, match=r"batch 1 .* layer '0' got a single value per channel \(1x3\), .*drop_last"):
        calibrate(nn.Sequential(nn.BatchNorm1d(3)), batches, layer_by_layer=layer_by_layer)


def test_statistics_that_do_not_fit_their_type_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).half()
    with pytest.raises(DataError, match=r"layer '0': its statistics reach .*e\+05, beyond the range of torch.float16"):
        calibrate(model, [500 * torch.randn(4, 3, 5, 5).half()])


@pytest.mark.parametrize("model", [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)])
def test_a_model_without_statistics_has_nothing_to_calibrate(model: nn.Module) -> None:
    with pytest.raises(NothingToDo, match="nothing to calibrate: no layer with running statistics ran"):
        calibrate(model.double(), BATCHES)


def test_a_process_without_batches_cannot_know_a_row_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other processes ran a functional site whose statistics are no whole buffer."""
    shares: list[Any] = []
    model: Any = convert(Steps().double(), BATCHES[0]).model
    exchange = "normswap.running_stats.accumulation.ResultExchange.all_gather"
    monkeypatch.setattr(exchange, lambda _, share: shares.append(share) or [share])
    calibrate(copy.deepcopy(model), BATCHES)
    monkeypatch.setattr(exchange, lambda _, share: [share, shares[0]])
    with pytest.raises(ModelError, match="layer 'batch_norm' did not run in this process, and only a call shows"):
        calibrate(model, [])


# --- several processes ------------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).parents[1] / "helpers" / "two_processes_calibrating.py"


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_pool_what_they_gathered(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for case, alone in first["alone"].items():
        for results in (first, second):
            for name, value in alone.items():
                assert guarantees.distance(value, results[case][name]) <= LIMIT, (case, name)
        assert first["layers"][case] == second["layers"][case]
    assert first["refused"] == "process 1 failed, no process changed its model: batch 0 (counted from 0): layer " + (
        "'0' got NaN or infinite values (2x3x5x5): check the images of this batch"
    )
    assert second["refused"].startswith("batch 0 (counted from 0): layer '0' got NaN")
