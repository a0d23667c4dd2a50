"""What `make bench` stands on: the arms, the statistics of ratios, the schedule, the records and the page.

All times and ratios here are invented.
"""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.records import write_document
from benchmarks.speed import quick
from benchmarks.speed.arms import ARMS, BASE, BATCH, COPY, EAGER, EAGER_ARM, FROZEN, OURS, EagerSwitchNorm, move_gates
from benchmarks.speed.layers import Setting, layer_works, saved_by_layers
from benchmarks.speed.memory import saved_bytes
from benchmarks.speed.networks import CONVERTED, MOVED_GATES, ORIGINAL, network_works
from benchmarks.speed.quick import find_worse
from benchmarks.speed.records import (
    Comparison,
    Conditions,
    Measurements,
    Peak,
    VariantRun,
    add_record,
    read_records,
)
from benchmarks.speed.report.page import document
from benchmarks.speed.report.targets import Verdict, layer_verdicts
from benchmarks.speed.timing import rounds, schedule
from benchmarks.speed.timing.estimates import Block, Ratio, estimate_ratios, median_seconds
from benchmarks.speed.timing.rounds import Work, run_block
from benchmarks.speed.timing.schedule import measure
from normswap import SwitchNorm2d, switch_norm
from normswap.layers.gated_module import GatedModule

# --- the arms


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 3, 2, 3, 4)])
def test_the_eager_layer_is_switchable_normalization(shape: tuple[int, ...], training: bool) -> None:
    layer = EagerSwitchNorm(shape[1]).double().train(training)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    statistics = layer.running_mean.clone(), layer.running_var.clone()
    gates = layer.mean_weight, layer.var_weight
    results = layer(x), switch_norm(x, *gates, *statistics, layer.weight, layer.bias, training)
    torch.testing.assert_close(*results)
    torch.testing.assert_close(layer.running_mean, statistics[0])
    dy = torch.randn_like(x)
    found, expected = (torch.autograd.grad(y, [x, *layer.parameters()], dy) for y in results)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rank", [4, 5])
def test_our_arms_have_the_statistics_and_gates_of_their_names(rank: int) -> None:
    layers = {arm.name: arm.build(32, rank, torch.float32) for arm in ARMS if arm.name in OURS}
    assert [*layers] == [*OURS]
    vertex, moved, mix = [0.0, 0.0, 1.0], [0.05, 0.05, 0.9], [0.25, 0.25, 0.5]
    expected = [("running", vertex, True), ("running", vertex, False), ("running", moved, True)]
    expected += [("batch", vertex, True), ("batch", mix, True)]
    for layer, (statistics, weights, trains) in zip(layers.values(), expected, strict=True):
        assert isinstance(layer, GatedModule)
        assert layer.bn_statistics == statistics
        assert layer.matched
        for gate, found in zip((layer.mean_weight, layer.var_weight), layer.importance_weights(), strict=True):
            torch.testing.assert_close(found, torch.tensor(weights))
            assert gate.requires_grad == trains


def test_moved_gates_of_a_site_without_a_branch_sum_to_one() -> None:
    layer = move_gates(SwitchNorm2d(3, gate="simplex", branches=("in", "bn")))
    assert isinstance(layer, SwitchNorm2d)
    torch.testing.assert_close(layer.importance_weights()[0], torch.tensor([0.05, 0.95]))


def test_a_step_computes_all_gradients_and_drops_them() -> None:
    seen: dict[str, list[str]] = {}
    for mode in ("train", "eval"):
        works = layer_works(Setting((2, 32, 3, 3), "channels_last", "bf16", 1, mode), (*ARMS, EAGER_ARM))
        for work in works.values():
            work.run()
        seen[mode] = [*works]
    assert seen["train"] == [arm.name for arm in (*ARMS, EAGER_ARM)]
    assert FROZEN not in seen["eval"]
    assert BATCH not in seen["eval"]


def test_the_works_of_a_network_run_each_form_in_its_mode_and_layout() -> None:
    forms: dict[str, nn.Module] = {ORIGINAL: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))}
    works = network_works(forms, torch.randn(2, 3, 4, 4), "channels_last", "train")
    works[ORIGINAL].run()
    model = forms[ORIGINAL]
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert int(model[1].num_batches_tracked) == 1  # type: ignore[index]
    network_works(forms, torch.randn(2, 3, 4, 4), "contiguous", "eval")[ORIGINAL].run()
    assert not model.training
    assert int(model[1].num_batches_tracked) == 1  # type: ignore[index]


# --- memory


class _Saving(nn.Module):
    """exp keeps its result, sin its input; both meet a parameter, which does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        return x.exp() * x.view(2, 5).sin().view(10) * self.weight


def test_saved_bytes_are_those_of_distinct_storages_without_parameters() -> None:
    x = torch.randn(10, requires_grad=True)
    # x, exp(x), sin(x) and their product, each of 40 bytes
    assert saved_bytes(_Saving(), x) == 4 * 40
    assert saved_bytes(nn.Linear(10, 3), x) == 40
    assert saved_bytes(nn.Identity(), x) == 0


def test_the_eager_layer_keeps_three_activations_and_ours_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.speed.layers.SAVED", (2, 32, 32, 32))
    found = saved_by_layers((*ARMS, EAGER_ARM), "cpu")
    assert 3 <= found[EAGER] < 3.1
    assert all(1 <= found[name] < 1.1 for name in (BASE, *OURS))


# --- ratios


def _blocks(ratio: float, loads: list[float]) -> list[Block]:
    """Return blocks in which the base takes the load, and `ours` the load times a ratio."""
    return [[{BASE: load, "ours": load * ratio}] * 5 for load in loads]


def test_a_ratio_does_not_depend_on_the_load_of_a_block() -> None:
    found = estimate_ratios(_blocks(0.75, [1, 2, 1, 9, 3, 1]), BASE)
    assert found["ours"].value == pytest.approx(0.75)
    assert found["ours"].uncertainty == pytest.approx(0, abs=1e-9)
    assert found[BASE] == Ratio(1, 0)


def test_a_few_wild_rounds_and_blocks_do_not_move_a_ratio() -> None:
    blocks = [[*block] for block in _blocks(0.75, [1] * 20)]
    blocks[3] = [{BASE: 1, "ours": 30}] * 5
    blocks[5] = [{BASE: 9, "ours": 1}] * 5
    for block in blocks:
        block[1] = {BASE: 1, "ours": 7}
    assert estimate_ratios(blocks, BASE)["ours"].value == pytest.approx(0.75)


def test_the_interval_contains_the_ratio_about_as_often_as_it_says() -> None:
    draw = random.Random(1)
    hits = 0
    for _ in range(400):
        logs = [draw.gauss(0, 0.05) for _ in range(16)]
        ratio = estimate_ratios([[{BASE: 1, "ours": math.exp(log)}] for log in logs], BASE)["ours"]
        hits += abs(math.log(ratio.value)) <= ratio.uncertainty
        assert 0.005 < ratio.uncertainty < 0.12
    assert 370 <= hits <= 398


def test_too_few_blocks_have_no_certain_ratio_and_a_slow_work_may_miss_rounds() -> None:
    assert estimate_ratios(_blocks(2, [1, 1, 1]), BASE)["ours"] == Ratio(pytest.approx(2), math.inf)
    blocks: list[Block] = [[{BASE: 1, "slow": 8}, {BASE: 2}, {BASE: 4}]] * 4
    assert estimate_ratios(blocks, BASE)["slow"].value == pytest.approx(8)
    assert median_seconds(blocks, BASE) == 2


def test_a_ratio_is_worse_beyond_both_uncertainties_and_a_tolerance() -> None:
    earlier = Ratio(1.0, 0.01)
    assert not Ratio(1.07, 0.02).is_worse_than(earlier)
    assert Ratio(1.09, 0.02).is_worse_than(earlier)
    assert not Ratio(0.5, 0.02).is_worse_than(earlier)
    assert Ratio(1, 0.02).is_trusted
    assert not Ratio(1, 0.021).is_trusted


# --- rounds and schedule


def test_a_round_calls_short_works_equally_often_and_slow_ones_now_and_then() -> None:
    calls = {"base": 0, "slow": 0}

    def count(name: str) -> None:
        calls[name] += 1

    def clock(run: object, number: int) -> float:
        for _ in range(number):
            run()  # type: ignore[operator]
        return 1e-4

    works = {name: Work(lambda name=name: count(name), every) for name, every in (("base", 1), ("slow", 4))}  # type: ignore[misc]
    found = run_block(works, clock, 0.02)
    sat_in = [index for index, times in enumerate(found) if "slow" in times]
    assert sat_in == [*range(0, len(found), 4)]
    assert [*found[0]] == ["base", "slow"]
    # a first call of each, one of the base to count the calls of a slice, and per slice one call and 15 timed ones
    assert calls == {"base": 2 + 16 * len(found), "slow": 1 + 16 * len(sat_in)}


class _Machine:
    """A clock that stands still but for the blocks, each of which takes a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, noises: dict[str, float]) -> None:
        self.now = 0.0
        self.noises = noises
        self.draw = random.Random(0)
        self.order: list[str] = []
        monkeypatch.setattr(schedule.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(schedule, "run_block", self.run_block)

    def run_block(self, works: dict[str, str], clock: object, seconds: float) -> list[dict[str, float]]:
        name = works["name"]
        self.now += 1
        self.order.append(name)
        return [{BASE: 1, "ours": math.exp(self.draw.gauss(0, self.noises[name]))}]

    def measure(self, seconds: float) -> dict[str, list[Block]]:
        works = {name: lambda name=name: {"name": name} for name in self.noises}  # type: ignore[misc]
        options = {"seconds": seconds, "block": 1.0, "least_blocks": 5, "precision": 0.02}
        return measure(works, lambda run, calls: 1.0, BASE, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("seconds", "calls"), [(1e-6, 30), (1e-4, 15), (4e-3, 6), (1.0, 2)])
def test_long_works_are_called_less_often(seconds: float, calls: int) -> None:
    assert rounds._count_calls(seconds) == calls


def test_the_shortest_of_some_calls_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = iter([5.0, 2.0, 9.0])
    now = 0.0

    def run() -> None:
        nonlocal now
        now += next(durations)

    monkeypatch.setattr(rounds, "_overhead", lambda clock: 0.5)
    monkeypatch.setattr(rounds.time, "thread_time", lambda: now)
    assert rounds.cpu_time(run, 3) == 1.5


def test_certain_comparisons_leave_their_time_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = _Machine(monkeypatch, {"calm": 0.0, "noisy": 0.2})
    blocks = machine.measure(40)
    assert machine.order[:4] == ["calm", "noisy", "calm", "noisy"]
    assert len(blocks["calm"]) == 5
    assert 35 <= len(blocks["noisy"]) <= 37


def test_the_less_certain_half_gets_the_next_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = _Machine(monkeypatch, {"a": 0.05, "b": 1.0, "c": 0.05, "d": 1.0})
    blocks = machine.measure(60)
    assert {*machine.order[20:24]} == {"b", "d"}
    assert len(blocks["a"]) < len(blocks["b"])


def test_the_first_pass_is_whole_and_certain_comparisons_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(blocks) for blocks in _Machine(monkeypatch, {"a": 0.0, "b": 0.0}).measure(0.5).values()] == [1, 1]
    machine = _Machine(monkeypatch, {"a": 0.0, "b": 0.0})
    machine.measure(1000)
    assert machine.now == 10


# --- quick


def _comparison(name: str, value: float, uncertainty: float = 0.01, mode: str = "train") -> Comparison:
    ratios = {BASE: Ratio(1, 0), name: Ratio(value, uncertainty)}
    return Comparison("2x512x7x7", "contiguous", "fp32", 1, mode, 9, 0.004, ratios)


def test_only_ratios_of_both_runs_are_compared() -> None:
    earlier = [_comparison("a", 1.0), _comparison("b", 1.0, mode="eval")]
    assert find_worse([_comparison("a", 1.06), _comparison("b", 9.0)], earlier) == []
    assert find_worse([_comparison("a", 1.25)], earlier) == [
        "2x512x7x7 contiguous fp32 train, a: 1.00 ±1.0% -> 1.25 ±1.0%"
    ]


@pytest.mark.parametrize(("before", "status"), [(0.5, 0), (0.1, 1)])
def test_quick_exits_with_status_1_if_a_ratio_is_worse(
    before: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [_comparison("ours", 0.5), _comparison("ours", 0.5, 0.03, mode="eval")]
    monkeypatch.setattr(quick, "_measured", lambda seconds: found)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(quick, "keep_freed_memory", lambda: None)
    earlier = tmp_path / "earlier.json"
    write_document(earlier, {"kind": "another", "comparisons": [_comparison("ours", before).to_json()]})
    output = tmp_path / "now.json"
    monkeypatch.setattr("sys.argv", ["quick", "--against", str(earlier), "--output", str(output)])
    with pytest.raises(SystemExit) as raised:
        quick.main()
    assert raised.value.code == status
    printed = capsys.readouterr().out
    assert "0.50 ±1.0%" in printed
    assert "0.50 ±3.0%?" in printed
    assert f"{status} ratios are worse" in printed
    assert "another processor" in printed
    assert quick._read(output)[1] == found


# --- records and page


def _measurements() -> Measurements:
    values = {BASE: 1.0, FROZEN: 0.4, **dict.fromkeys(OURS, 0.85), EAGER: 6.0}
    ratios = {name: Ratio(value, 0.01) for name, value in values.items()}
    settings = [(layout, mode) for layout in ("contiguous", "channels_last") for mode in ("train", "eval")]
    layers = [
        Comparison(shape, layout, dtype, 1, mode, 9, 0.004, ratios)
        for dtype in ("fp32", "fp16")
        for layout, mode in settings
        for shape in ("8x64x112x112", "2x512x7x7")
    ]
    # One small map is slow, and its ratio uncertain.
    layers[1] = replace(layers[1], ratios={**ratios, BATCH: Ratio(1.5, 0.03)})
    forms = {ORIGINAL: Ratio(1, 0), CONVERTED: Ratio(0.94, 0.01), MOVED_GATES: Ratio(1.04, 0.01)}
    networks = [Comparison("resnet50", "contiguous", "fp32", 2, mode, 5, 1.0, forms) for mode in ("train", "eval")]
    conditions = Conditions("Measured on a day.", "cpu", "AVX2", "avx2", 2, (0.1, 1.2), {"layers": 3.5})
    variants = {"baseline": VariantRun("baseline", "DEFAULT", layers[:2])}
    saved = {BASE: 1.0, EAGER: 3.0}
    return Measurements(conditions, layers, networks, variants, saved, [Peak("resnet50", 2_000_000, 2_100_000)])


def test_the_page_says_what_is_met_and_what_is_not() -> None:
    page = document({"A processor": _measurements()})
    # 6 targets of layers in fp32 and 8 in fp16, 4 of a network and 1 of its memory; 5 are not met
    assert "Met: 14 of 19." in " ".join(page.split())
    assert "| training, contiguous, each shape: at most 1.2 | **1.50 not met** (2x512x7x7; batch) | 0.85 met" in page
    assert "gates that do not train, mean: at most 0.5 | **0.85 not met** (contiguous)" in page
    assert "| training in fp16, mean: at most 1.2 |  | 0.85 met" in page
    assert "| resnet50 | contiguous | fp32 | 0.94 met | **1.04 not met** | 0.94 met | 1.04 met |" in page
    assert "**1.050 not met**" in page
    assert "vector extensions: AVX2, kernels of normswap: avx2" in " ".join(page.split())
    assert "busy" not in page


def test_the_page_marks_uncertain_ratios_and_a_busy_machine() -> None:
    found = _measurements()
    busy = replace(found, conditions=replace(found.conditions, load=(5.0, 5.0), variant=None))
    page = document({"A processor": busy})
    assert "busy with other work" in " ".join(page.split())
    assert "kernels of normswap: not reported" in " ".join(page.split())
    assert "| 1.50? |" in page


def test_the_page_has_the_targets_of_all_processors_and_the_details_of_the_latest() -> None:
    page = document({"First": _measurements(), "Second": _measurements()})
    assert page.index("### Second") < page.index("### First") < page.index("## Layers on Second")
    assert "## Layers on First" not in page
    assert "### baseline" in page


def test_the_page_of_a_gpu_contains_bandwidths() -> None:
    found = _measurements()
    layers = [
        replace(each, subject="32x64x112x112", ratios={**each.ratios, COPY: Ratio(0.2, 0.01)}) for each in found.layers
    ]
    on_gpu = replace(found.conditions, device="cuda")
    page = document({"A GPU": replace(found, conditions=on_gpu, layers=layers, variants={})})
    # 8 activations over 0.85 units of time, against 2 over 0.2
    assert "| 32x64x112x112 | fp32 | contiguous | train | 257 | 80% | 0.94 met |" in page
    assert "Kernel variants" not in page


def test_a_target_is_judged_by_what_the_page_prints() -> None:
    assert Verdict(0.9049, 0.9).is_met
    assert not Verdict(0.906, 0.9).is_met
    assert Verdict(0.81, 0.8, at_least=True).is_met
    verdicts = {target.text: found for target, found in layer_verdicts(_measurements())}
    assert [*verdicts["training in fp16, mean"]] == [("fp16", 1)]


def test_records_survive_json_and_a_run_replaces_the_one_of_its_processor(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    assert read_records(path) == {}
    first, second = _measurements(), replace(_measurements(), peaks=[])
    add_record(path, "A", first)
    add_record(path, "B", second)
    assert read_records(path) == {"A": first, "B": second}
    assert [*add_record(path, "A", second)] == ["B", "A"]
    assert read_records(path) == {"B": second, "A": second}
