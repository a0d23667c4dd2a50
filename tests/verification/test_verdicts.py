"""No difference passes because an output is opaque, a check is skipped, or a model amplifies rounding."""

import json
import types
import weakref
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributions, nn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap import Verification, verify
from normswap.checkpoints.record import Record
from normswap.errors import ModelError
from normswap.surgery.model_outputs import relative_l2
from normswap.verification.model_comparison import Check
from normswap.verification.precision import perturb
from normswap.verification.site_watch import SiteError

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))

# Batch statistics round otherwise than those of torch, and every fault of a site shows in training. With running
# statistics a converted model may be the original to the last bit: `test_training_reference` tests these.
convert = partial(normswap.convert, bn_statistics="batch")


class Box:
    def __init__(self, item: Any) -> None:
        self.item = item


@dataclass
class Result:
    logits: Tensor


class Net(nn.Module):
    """One site, and any way to return its output; `broken` doubles it once the site is converted."""

    def __init__(self, wrap: Callable[[Tensor], Any], *, broken: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.wrap, self.broken = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), wrap, broken

    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        if self.broken and not isinstance(self.bn, nn.BatchNorm2d):
            y = 2 * y
        return self.wrap(y)


def verified(model: nn.Module, inputs: Any = X, **options: Any) -> Verification:
    return verify(model, convert(model, inputs, **options).model, [inputs])


def check(verification: Verification, name: str) -> Check:
    return next(check for check in verification.checks if check.name == name)


RETURNS: dict[str, Callable[[Tensor], Any]] = {
    "a class without __eq__": Box,
    "a dataclass": Result,
    "a namespace": lambda y: types.SimpleNamespace(y=y),
    "numpy": lambda y: y.detach().numpy(),
    "sparse": lambda y: y.relu().to_sparse(),
    "a distribution": lambda y: distributions.Normal(y, 1.0, validate_args=False),
    "a number": lambda y: y.square().mean().item(),
    "a list of numbers": lambda y: y[0, 0].flatten().tolist(),
    "a generator": lambda y: (row for row in y),
    "a closure": lambda y: lambda: y,
    "beside a mask": lambda y: y.flatten().index_fill(0, torch.arange(20), -1e9),
    "beside the lowest float": lambda y: y.flatten().index_fill(0, torch.arange(9), torch.finfo(y.dtype).min),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrap", RETURNS.values(), ids=RETURNS)
@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_any_output_is_compared_and_no_difference_passes(wrap: Callable[[Tensor], Any], statistics: Any) -> None:
    right, wrong = (verified(Net(wrap, broken=broken), bn_statistics=statistics) for broken in (False, True))
    assert right.passed
    assert not wrong.passed
    assert check(wrong, "outputs in evaluation").passed is False
    assert check(wrong, "outputs in training").passed is False
    assert check(wrong, "outputs in evaluation").error == pytest.approx(1 / 1 if wrap is not RETURNS["a number"] else 3)


class Functional(Net):
    """The same by a function, whose module is traced and run beside its own code."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__(wrap)
        self.holder, self.bn = self.bn, None

    def forward(self, x: Tensor) -> Any:
        bn = self.holder
        statistics = bn.running_mean, bn.running_var, bn.weight, bn.bias
        return self.wrap(nn.functional.batch_norm(self.conv(x), *statistics, self.training))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a dataclass", "numpy", "sparse", "a number"])
def test_a_functional_site_may_return_anything(name: str) -> None:
    model = Functional(RETURNS[name])
    conversion = convert(model, X)
    assert len(conversion.plan.swaps) == 1
    assert verify(model, conversion.model, [X]).passed
    assert not verify(model, convert(Functional(lambda y: RETURNS[name](2 * y)), X).model, [X]).passed


def test_a_leaf_that_cannot_be_compared_is_named_and_does_not_pass() -> None:
    found = verified(Net(lambda y: {"y": y, "view": memoryview(b"a")}))
    assert not found.passed
    note = "output['view'] cannot be compared: is a builtins.memoryview, whose attributes cannot be read"
    assert check(found, "outputs in evaluation").note == note


def test_a_model_that_returns_nothing_is_an_error() -> None:
    with pytest.raises(
        ModelError, match="returns no tensor and no number on an input of 4x3x9x9, so nothing can be comp"
    ):
        verified(Net(lambda y: None))


class Wild(Net):
    """Amplifies rounding beyond anything that a comparison of outputs could tell."""

    def __init__(self, **options: Any) -> None:
        super().__init__(lambda y: torch.sin(1e16 * y), **options)


def test_a_model_that_amplifies_rounding_is_judged_by_its_sites() -> None:
    found = verified(Wild())
    assert found.passed
    assert found.judged_by == "sites"
    assert check(found, "outputs in training").passed is None
    assert (
        "not judged, because a change of the input by one unit in the last place"
        in check(found, "outputs in training").note
    )
    assert found.notes == (
        "the whole model is not judged; each site was compared alone on the inputs that it received: 1 site agreed "
        "within 1e-09",
    )
    assert "judged by each site alone in float64" in found.summary
    site = found.sites[0]
    assert max(site.evaluation or 0, site.training or 0, site.gradients or 0) < 1e-12
    assert site.gradients is not None


SITE_FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "eps": (lambda m: setattr(m.bn, "eps", 1e-2), "bn, compared alone, differs by"),
    "gates": (lambda m: m.bn.mean_weight.copy_(torch.tensor([0.1, 0.0, 0.9])), "bn, compared alone, differs by"),
    "a weight elsewhere": (lambda m: m.conv.weight.mul_(1.5), "conv.weight has different values"),
    "a module elsewhere": (lambda m: setattr(m, "conv", nn.Sequential(m.conv)), "conv is a torch.nn.modules.conv"),
    "momentum": (lambda m: setattr(m.bn, "momentum", 0.5), "in running statistics"),
    "a number elsewhere": (lambda m: setattr(m.conv, "stride", (2, 2)), "conv.stride has different values"),
    "a text elsewhere": (
        lambda m: setattr(m.conv, "padding_mode", "reflect"),
        "conv.padding_mode has different values",
    ),
    "a function elsewhere": (lambda m: setattr(m, "wrap", torch.cos), "wrap has different values"),
    "a hook on a site": (lambda m: m.bn.register_forward_hook(lambda *args: None), "bn has different hooks"),
    "a hook elsewhere": (lambda m: m.conv.register_full_backward_hook(lambda *args: None), "conv has different hooks"),
    "a frozen weight": (lambda m: m.conv.weight.requires_grad_(False), "conv.weight has different values"),
    "another module": (lambda m: m.add_module("extra", nn.ReLU()), "extra exists only in the converted model"),
}


@pytest.mark.parametrize(("fault", "note"), SITE_FAULTS.values(), ids=SITE_FAULTS)
def test_a_fault_in_a_model_that_amplifies_rounding_is_found(fault: Callable[[Any], Any], note: str) -> None:
    model = Wild()
    converted = convert(model, X).model
    with torch.no_grad():
        fault(converted)
    found = verify(model, converted, [X])
    assert not found.passed
    assert note in " ".join(found.notes)


class Hidden(Net):
    """A second norm, whose output does not decide what the model returns."""

    def __init__(self, use: str) -> None:
        super().__init__(lambda y: y)
        self.aux, self.use = nn.BatchNorm2d(8), use

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.use == "an attribute":
            self.loss = self.aux(y).square().mean()
        return self.bn(y) + (0 * self.aux(y) if self.use == "multiplied by zero" else 0)


@pytest.mark.parametrize("use", ["an attribute", "multiplied by zero", "never called"])
def test_a_site_that_does_not_reach_the_outputs_is_compared_alone(use: str) -> None:
    model = Hidden(use)
    converted = convert(model, X).model
    assert verify(model, converted, [X]).passed
    converted.aux.eps = 1e-2
    found = verify(model, converted, [X])
    assert not found.passed
    assert "aux, compared alone, differs by" in " ".join(found.notes)


def test_the_report_names_sites_that_never_ran() -> None:
    model = Hidden("never called")
    found = verify(model, convert(model).model, [X])
    assert found.notes == ("1 site did not run, but agreed alone on random input: aux",)


def test_a_frozen_model_that_returns_whole_numbers_is_judged_by_its_sites() -> None:
    model = Net(lambda y: y.flatten(1).argmax(1)).requires_grad_(False)
    converted = convert(model, X).model
    found = verify(model, converted, [X])
    assert (found.passed, found.judged_by) == (True, "sites")
    assert "integers only" in check(found, "outputs in evaluation").note
    with torch.no_grad():
        converted.conv.weight.mul_(1.001)
    assert not verify(model, converted, [X]).passed


class NoInputGradient(torch.autograd.Function):
    """Passes its input on and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_the_input_are_compared_at_the_first_site(frozen: bool) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)).requires_grad_(not frozen)
    converted = convert(model, X).model
    assert verify(model, converted, [X]).passed
    kind = type(converted[0])
    blind = {"forward": lambda self, x: kind.forward(self, NoInputGradient.apply(x))}
    converted[0].__class__ = type("Blind", (kind,), blind)
    found = verify(model, converted, [X])
    assert not found.passed
    assert "in gradients" in " ".join(found.notes)


class NotFinite(Net):
    """Returns NaN in training."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y * float("nan") if self.training else y


def test_outputs_that_are_nowhere_finite_hide_no_fault() -> None:
    model = NotFinite(lambda y: y)
    converted = convert(model, X).model
    assert verify(model, converted, [X]).passed
    converted.bn.momentum = 0.5
    assert not verify(model, converted, [X]).passed


def buffered(y: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("y", y.detach())
    return module


KEPT: list[Tensor] = []


def kept(y: Tensor) -> Any:
    KEPT.append(y)
    return weakref.ref(y)


def promised(y: Tensor) -> Any:
    future: Any = torch.futures.Future()
    future.set_result(y)
    return future


CARRIERS: dict[str, Callable[[Tensor], Any]] = {
    "a module": buffered,
    "parameters": lambda y: nn.ParameterList([nn.Parameter(y.detach())]),
    "a weak reference": kept,
    "a future": promised,
    "an exception": lambda y: ValueError(y),
    "values of a dict": lambda y: {"y": y}.values(),
    "an array": lambda y: array("d", y.flatten().tolist()),
}


@pytest.mark.parametrize("carry", CARRIERS.values(), ids=CARRIERS)
def test_another_value_in_an_output_hides_no_difference(carry: Callable[[Tensor], Any]) -> None:
    def model(broken: bool) -> nn.Module:
        net = Net(lambda y: y, broken=broken)
        net.wrap = lambda y: (net.conv.weight.sum(), carry(y), net)
        return net

    assert verified(model(broken=False)).passed
    assert not verified(model(broken=True)).passed


class Beside(Net):
    """Two outputs, one of which amplifies rounding by about 1e9."""

    def __init__(self) -> None:
        super().__init__(lambda y: y)
        self.quiet = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.quiet(y), torch.sin(1e9 * self.bn(y))


def test_an_output_that_amplifies_rounding_hides_no_other_one() -> None:
    model = Beside()
    converted = convert(model, X).model
    assert verify(model, converted, [X]).passed
    with torch.no_grad():
        converted.quiet.weight.mul_(1 + 1e-7)
    found = verify(model, converted, [X])
    assert check(found, "outputs in evaluation").passed is False


def test_the_nudge_at_random_changes_float64() -> None:
    x = torch.ones(8, dtype=torch.float64)
    assert set(((perturb(x, "random", 2**-52) - x) / 2**-53).tolist()) <= {-2.0, 2.0}
    assert perturb(x.half(), "random", 2**-10).dtype == torch.float16


def test_wrong_gradients_of_a_site_are_found_if_the_model_cannot_be_judged() -> None:
    model = Wild()
    converted = convert(model, X).model
    forward = type(converted.bn).forward
    converted.bn.forward = lambda x: forward(converted.bn, x.detach())
    found = verify(model, converted, [X])
    assert not found.passed
    assert " in gradients" in found.notes[-1]
    assert converted.bn.num_batches_tracked == 0  # which the closure reaches from the copy that is verified


def test_a_site_that_never_ran_does_not_pass_if_the_model_cannot_be_judged() -> None:
    model = Wild()
    model.unused = nn.BatchNorm2d(4)
    found = verify(model, convert(model).model, [X])
    assert not found.passed
    assert "unused did not run" in found.notes[-1]
    ordinary = Net(lambda y: y)
    ordinary.unused = nn.BatchNorm2d(4)
    assert verify(ordinary, convert(ordinary).model, [X]).passed


def test_outputs_without_a_gradient_leave_gradients_to_the_sites() -> None:
    found = verified(Net(lambda y: y.detach()))
    assert found.passed
    assert found.judged_by == "sites"
    assert check(found, "gradients").note.startswith("no output of the original model requires a gradient")


def test_empty_outputs_are_judged_by_the_sites() -> None:
    found = verified(Net(lambda y: y[:0]))
    assert found.passed
    assert found.judged_by == "sites"
    assert (
        "the original model returns no numbers: there is nothing to compare"
        in check(found, "outputs in evaluation").note
    )


# --- what is stored ---------------------------------------------------------------------------------------------------


def not_finite() -> Verification:
    model = Net(lambda y: y)
    converted = convert(model, X).model
    converted.bn.branches = ("in", "bn")  # which raises
    return verify(model, converted, [X])


def refuse(constant: str) -> None:
    raise AssertionError(f"a bare {constant} is no JSON")


def test_stored_results_are_json_and_come_back() -> None:
    found = not_finite()
    assert found.max_abs_error == float("inf")
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert Verification.from_dict(json.loads(text, parse_constant=refuse)) == found
    record = Record("state dict", verification=found)
    assert json.loads(record.to_json(), parse_constant=refuse)["verification"]["max_abs_error"] == "Infinity"
    assert Record.from_json(record.to_json()).verification == found


def test_records_of_older_versions_are_read() -> None:
    found = verified(Net(lambda y: y))
    data = json.loads(Record("state dict", verification=found).to_json())
    for name in ("precision", "judged_by", "notes"):
        del data["verification"][name]
    for site in data["verification"]["sites"]:
        del site["gradients"], site["statistics"]
    data["verification"]["max_abs_error"] = float("inf")  # which older versions wrote bare
    read = Record.from_json(json.dumps(data)).verification
    assert read is not None
    assert (read.precision, read.judged_by, read.max_abs_error) == ("float64", "whole model", float("inf"))
    assert read.sites == tuple(SiteError(s.fqn, s.evaluation, s.training) for s in found.sites)


# --- how far values are apart -----------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
NUMBERS: dict[str, tuple[Any, Any, float]] = {
    "equal": (2.0, 2.0, 0.0),
    "relative": (2.0, 2.5, 0.25),
    "complex": (3 + 4j, 3 + 3.5j, 0.1),
    "NaN in both": (NAN, NAN, 0.0),
    "NaN in one": (1.0, NAN, INF),
    "inf of another sign": (INF, -INF, INF),
    "integers": (2, 3, INF),
    "another type": (1, 1.0, INF),
}


@pytest.mark.parametrize(("a", "b", "expected"), NUMBERS.values(), ids=NUMBERS)
def test_distance_of_numbers(a: Any, b: Any, expected: float) -> None:
    assert relative_l2(a, b) == pytest.approx(expected)


@pytest.mark.parametrize("mask", [1e9, 1e200, 1.7e308])
def test_a_mask_hides_no_difference(mask: float) -> None:
    a, b = (torch.tensor([-mask, value, -mask], dtype=torch.float64) for value in (2.0, 3.0))
    assert relative_l2(a, b) == pytest.approx(0.5)
    assert relative_l2(a, a) == 0.0


# --- gradients through any checkpoint ---------------------------------------------------------------------------------


class Recomputed(nn.Module):
    """A block in reentrant checkpoints, used once inside, once more inside, or once outside."""

    def __init__(self, uses: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.uses, self.stem = uses, nn.Conv2d(3, 8, 3)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for use in self.uses:
            y = checkpoint(self.block, y, use_reentrant=True) if use == "c" else self.block(y)
        return y


@pytest.mark.parametrize("uses", ["c", "cc", "cp"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_hide_no_fault(uses: str) -> None:
    model = Recomputed(uses)
    found = verified(model)
    assert found.passed
    assert [c.passed for c in found.checks] == [True] * 4
    wrong = convert(model, X).model
    wrong.block[1].momentum = 0.9
    assert check(verify(model, wrong, [X]), "running statistics").passed is False
    wrong = convert(model, X).model
    wrong.block[1].register_forward_hook(lambda _m, _a, y: y + (y - y.detach()))
    assert check(verify(model, wrong, [X]), "gradients").passed is False


class Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise ValueError("there is no way back")


def test_what_the_original_raises_in_its_backward_pass_is_quoted() -> None:
    found = verified(Net(Refusing.apply))
    assert [c.passed for c in found.checks] == [True, True, None, True]
    assert check(found, "gradients").note == "skipped: the original model raises in training: there is no way back"
    wrong = convert(Net(Refusing.apply), X).model
    wrong.bn.momentum = 0.9
    assert not verify(Net(Refusing.apply), wrong, [X]).passed


def test_tensors_outside_of_the_model_get_no_gradient() -> None:
    outside = torch.ones(1, requires_grad=True)
    outside.grad = torch.full((1,), 7.0)
    assert verified(Net(lambda y: y * outside)).passed
    assert outside.grad.item() == 7.0


# --- gradients that torch's own kernel gets wrong ---------------------------------------------------------------------


class Tokens(nn.Module):
    """Reads the map as a sequence of tokens, whose gradient comes back as a permuted view."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.head = nn.Sequential(nn.Conv2d(3, 8, 1), norm(8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).permute(0, 2, 1)
        return self.head(torch.cat([tokens, tokens.new_zeros(tokens.shape[0], 1, 8)], 1))


def test_a_wrong_kernel_of_torch_is_distinguished_from_a_wrong_conversion() -> None:
    model, one = Tokens(), X[:1, :, :4, :4]
    found = verified(model, one)
    assert found.passed
    assert "torch's batch norm returns wrong gradients for this input" in check(found, "gradients").note
    assert check(verified(model, X[:2, :, :4, :4]), "gradients").note == ""
    wrong = convert(model, one).model
    wrong.proj[1].register_forward_hook(lambda _m, _a, y: y + (y - y.detach()))
    assert check(verify(model, wrong, [one]), "gradients").passed is False


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_report_says_precision_and_rule(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from normswap.reports.tables import verification_table, worst_sites

    found = verified(Wild())
    Console(width=200, highlight=False).print(verification_table(found))
    Console(width=200, highlight=False).print(worst_sites(found))
    text = capsys.readouterr().out
    assert "relative L2 in float64 on 4x3x9x9" in text
    assert "judged by each site alone" in text
    assert "not judged" in text
    assert "gradients" in text.split("Sites that differ most")[1]


def test_sites_in_inference_mode_are_judged_alone() -> None:
    class Inference(Wild):
        def forward(self, x: Tensor) -> Any:
            with torch.inference_mode():
                y = self.bn(self.conv(x))
            return self.wrap(y.clone())

    assert verified(Inference()).passed
