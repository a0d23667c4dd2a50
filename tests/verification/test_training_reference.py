"""Training is evaluation: which original a converted model is compared with in training, and that nothing slips by."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap import Verification, convert, set_bn_statistics, verify
from normswap.errors import LayerError
from normswap.layers.gated_module import GatedModule
from normswap.verification.equivalence import verify_in_place
from normswap.verification.training_reference import training_reference
from tests.helpers import zoo

X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
FROZEN = "training is compared with the original whose norms are in evaluation (frozen)"
RUNNING, BATCH = "running", "batch"


class Block(nn.Module):
    """Calls batch_norm twice, on the tensors of two BatchNorms that do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.conv = nn.BatchNorm2d(8), nn.BatchNorm2d(8), zoo.conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one, self.two
        x = F.batch_norm(x, a.running_mean, a.running_var, a.weight, a.bias, self.training, 0.2).relu()
        x = self.conv(x)
        return F.batch_norm(x, b.running_mean, b.running_var, b.weight, b.bias, self.training).relu()


class Net(nn.Module):
    """A stem of a module norm and a dropout, and a block of two functional norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = zoo.conv(), zoo.bn(), nn.Dropout(0.3)
        self.block, self.head = Block(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.drop(self.bn(self.conv(x)))).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return zoo.randomise(Net())  # type: ignore[return-value]


def converted(model: nn.Module, **options: Any) -> Any:
    return convert(model, X, **{"bn_statistics": RUNNING, **options}).model


def failed(verification: Verification) -> set[str]:
    return {check.name for check in verification.checks if check.passed is False}


def test_training_is_compared_with_the_frozen_original_by_default() -> None:
    model = net()
    found = verify(model, convert(model, X).model, [X])
    assert [check.passed for check in found.checks] == [True] * 4
    assert max(check.error or 0 for check in found.checks) < 1e-12
    assert (found.passed, found.judged_by, found.training_reference) == (True, "whole model", "frozen")
    assert found.notes == (FROZEN,)
    assert all(site.training is not None and site.statistics == 0 for site in found.sites)
    stored = json.loads(json.dumps(found.to_dict()))
    assert (stored["training_reference"], stored["notes"]) == ("frozen", [FROZEN])
    assert Verification.from_dict(stored) == found
    del stored["training_reference"]  # of an older version, which compared with the original as it trains
    assert Verification.from_dict(stored).training_reference == "original"


def test_the_reference_is_no_original_that_trains() -> None:
    model = net()
    running, batch = converted(model), converted(model, bn_statistics=BATCH)
    assert verify(model, running, [X], bn_statistics=RUNNING).passed
    assert verify(model, batch, [X], bn_statistics=BATCH).passed
    for layers, wanted in ((running, BATCH), (batch, RUNNING)):
        found = verify(model, layers, [X], bn_statistics=wanted)  # type: ignore[arg-type]
        assert failed(found) == {"outputs in training", "gradients", "running statistics"}
        assert found.training_reference == ("original" if wanted == BATCH else "frozen")
    assert verify(model, batch, [X]).training_reference == "original"
    with pytest.raises(LayerError, match="bn_statistics: expected one of"):
        verify(model, running, [X], bn_statistics="frozen")  # type: ignore[arg-type]
    with pytest.raises(LayerError, match="bn_statistics: expected one of"):
        verify(model, running, [X], bn_statistics={"bn": "frozen"})  # type: ignore[dict-item]


def scaled(_module: nn.Module, gradients: Any, _outputs: Any) -> Any:
    return tuple(None if g is None else g * (1 + 1e-6) for g in gradients)


def in_training(change: Callable[[Any], Any]) -> Callable[[Any, Any, Any], Any]:
    def hook(module: Any, _args: Any, y: Tensor) -> None:
        """Change the module after it ran."""
        if module.training:
            with torch.no_grad():
                change(module)

    return hook


def in_batch_mode(layer: Any) -> None:
    """The layer says that it uses running statistics, and uses those of the batch."""
    cls = type(layer)
    lie = {"bn_statistics": property(lambda self: RUNNING), "forward": lambda self, x: _batch(self, cls, x)}
    del layer.bn_statistics
    layer.__class__ = type(cls.__name__, (cls,), lie)


def _batch(layer: Any, cls: type, x: Tensor) -> Tensor:
    gates = layer.mean_weight, layer.var_weight
    statistics = layer.running_mean.clone(), layer.running_var.clone()
    return normswap.switch_norm(
        x, *gates, *statistics, layer.weight, layer.bias, layer.training, eps=1e-5, gate="simplex"
    )


OUTPUTS, GRADIENTS, STATISTICS = "outputs in training", "gradients", "running statistics"
# What is wrong in training only, and the checks that must find it.
FAULTS: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "a gradient": (lambda m: m.block.register_full_backward_hook(scaled), {GRADIENTS}),
    "a running mean": (
        lambda m: m.bn.register_forward_hook(in_training(lambda n: n.running_mean.add_(1e-6))),
        {STATISTICS},
    ),
    "a running variance": (
        lambda m: m.block.register_forward_hook(in_training(lambda n: n.two.running_var.mul_(1.001))),
        {STATISTICS},
    ),
    "a count": (
        lambda m: m.bn.register_forward_hook(in_training(lambda n: n.num_batches_tracked.add_(1))),
        {STATISTICS},
    ),
    "a constant of matched branches": (
        lambda m: m.bn.register_forward_hook(in_training(lambda n: setattr(n, "ln_mean_shift", n.ln_mean_shift + 1))),
        {STATISTICS},
    ),
    "no dropout": (lambda m: setattr(m.drop, "p", 0.0), {OUTPUTS, GRADIENTS}),
    "another dropout": (lambda m: setattr(m.drop, "p", 0.31), {OUTPUTS, GRADIENTS}),
    "a norm in batch mode": (lambda m: in_batch_mode(m.bn), {OUTPUTS, GRADIENTS}),
    "a gate": (lambda m: m.bn.var_weight.data.copy_(torch.tensor([1e-4, 0, 1 - 1e-4])), {OUTPUTS, GRADIENTS}),
    "a gradient of zero": (lambda m: m.block.conv.weight.requires_grad_(False), {GRADIENTS}),
}


@pytest.mark.parametrize(("fault", "checks"), FAULTS.values(), ids=FAULTS)
def test_a_fault_in_training_is_found_by_its_check(fault: Callable[[Any], Any], checks: set[str]) -> None:
    model = net()
    wrong = converted(model)
    fault(wrong)
    found = verify(model, wrong, [X])
    assert not found.passed
    assert failed(found) - {"outputs in evaluation"} == checks


def test_a_site_that_was_left_in_batch_mode_is_reported_and_fails_where_running_statistics_were_asked_for() -> None:
    model = net()
    for pattern, name in (("bn", "bn"), ("block.batch_norm_1", "block.batch_norm_1")):
        wrong = converted(model)
        set_bn_statistics(wrong, BATCH, include=[pattern])
        left = verify(model, wrong, [X])
        assert left.training_reference == "mixed"
        others = ", ".join(site for site in ("bn", "block.batch_norm", "block.batch_norm_1") if site != name)
        assert left.notes[0] == (
            "training is compared with the original in which the norms of 2 of 3 sites are in evaluation (frozen): "
            f"{others}"
        )
        planned = {swap.fqn: swap.bn_statistics for swap in convert(model, X, bn_statistics=RUNNING).plan.swaps}
        for wanted in (RUNNING, planned):
            assert OUTPUTS in failed(verify(model, wrong, [X], bn_statistics=wanted))  # type: ignore[arg-type]


# Of three sites, those that use running statistics, by settings.
MIXES: list[set[str]] = [{"bn"}, {"block.batch_norm"}, {"block.batch_norm_1"}, {"bn", "block.batch_norm_1"}]


@pytest.mark.parametrize("running", MIXES, ids=lambda mix: " and ".join(sorted(mix)))
def test_each_site_of_a_mixed_model_has_its_own_reference(running: set[str]) -> None:
    model = net()
    settings: Any = {name: {"bn_statistics": RUNNING} for name in running}
    mixed = converted(model, bn_statistics=BATCH, settings=settings)
    sites = {name: layer.bn_statistics for name, layer in mixed.named_modules() if isinstance(layer, GatedModule)}
    assert {name for name, statistics in sites.items() if statistics == RUNNING} == running
    found = verify(model, mixed, [X])
    assert [check.passed for check in found.checks] == [True] * 4
    assert found.training_reference == "mixed"
    for name, statistics in sites.items():
        other = {**sites, name: BATCH if statistics == RUNNING else RUNNING}
        assert {OUTPUTS, STATISTICS} <= failed(verify(model, mixed, [X], bn_statistics=other))


class Kernel(zoo.OwnNorm):
    """A norm of a kernel, a norm that is left, and a site."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.left = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        flat = (self.kernel * 2).reshape(1, 8, -1)
        kernel = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.kernel)
        left = self.left
        x = F.batch_norm(F.conv2d(x, kernel), left.running_mean, left.running_var, training=self.training)
        return super().forward(x.relu())


def test_calls_on_kernels_and_calls_that_were_left_are_not_frozen() -> None:
    torch.manual_seed(0)
    model = zoo.randomise(Kernel())
    part = converted(model, exclude=["batch_norm"])
    found = verify(model, part, [X])
    assert [check.passed for check in found.checks] == [True] * 4
    assert found.training_reference == "frozen"
    rest = convert(part, X, bn_statistics=RUNNING)
    assert [swap.fqn for swap in rest.plan.swaps] == ["batch_norm"]
    assert [check.passed for check in verify(model, rest.model, [X]).checks] == [True] * 4
    assert [check.passed for check in verify(part, rest.model, [X]).checks] == [True] * 4
    part.left.momentum = 0.3  # unused
    assert verify(model, part, [X]).passed


class InCheckpoint(nn.Module):
    """A module norm, a dropout and a functional norm in a checkpoint, after a convolution."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.conv, self.reentrant = zoo.conv(), reentrant
        self.part = nn.Sequential(zoo.bn(), nn.Dropout(0.2), zoo.OwnNorm(), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, self.conv(x), use_reentrant=self.reentrant)


class CheckpointInside(zoo.OwnNorm):
    """A functional norm and a dropout in a checkpoint inside the forward of their module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = zoo.conv()

    def inner(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.05)
        return F.dropout(x, 0.2, self.training).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, self.conv(x), use_reentrant=False)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize(
    "make",
    [lambda: InCheckpoint(reentrant=True), lambda: InCheckpoint(reentrant=False), CheckpointInside],
    ids=["reentrant", "not reentrant", "inside"],
)
def test_what_a_checkpoint_runs_again_is_frozen_too(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = zoo.randomise(make())
    conversion = convert(model, X, bn_statistics=RUNNING)
    assert conversion.plan.skips == ()
    assert [check.passed for check in verify(model, conversion.model, [X]).checks] == [True] * 4
    mixed = convert(model, X, bn_statistics=RUNNING, settings={"*": {"bn_statistics": BATCH}})
    assert [check.passed for check in verify(model, mixed.model, [X]).checks] == [True] * 4
    assert GRADIENTS in failed(verify(model, mixed.model, [X], bn_statistics=RUNNING))


def test_one_value_per_channel_is_compared_in_training() -> None:
    model = zoo.BY_NAME["one position"].model()
    one = zoo.image(1, 3, 9, 9)()
    found = verify(model, converted(model), [one])  # where BN raises in training
    assert [check.passed for check in found.checks] == [True] * 4


def as_exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model.eval(), (X,), strict=False).module()


def as_traced(model: nn.Module) -> nn.Module:
    return fx.symbolic_trace(model.eval())


def hooked(model: Any) -> nn.Module:
    model.block.register_forward_hook(lambda module, args, y: 2 * y + args[0])
    model.bn.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    return model


def shared(model: Any) -> nn.Module:
    model.again = model.bn
    model.norms = [model.block, model.bn]
    return model


def synchronized(model: Any) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


FORMS: dict[str, Callable[[Any], nn.Module]] = {
    "exported": as_exported,
    "traced": as_traced,
    "hooks": hooked,
    "shared": shared,
    "SyncBatchNorm": synchronized,
    "DataParallel": nn.DataParallel,
    "frozen parameters": lambda model: model.requires_grad_(False),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_any_form_of_a_model_has_its_frozen_reference(form: Callable[[Any], nn.Module]) -> None:
    model = form(net())
    found = verify(model, converted(model), [X])
    assert found.passed
    assert {check.name: check.passed for check in found.checks if check.passed is not True} in ({}, {GRADIENTS: None})


def test_a_converted_graph_is_compared_with_the_frozen_original() -> None:
    model = net()
    graph = convert(model, X, bn_statistics=RUNNING, as_graph=True).model
    assert isinstance(graph, fx.GraphModule)
    assert [check.passed for check in verify(model, graph, [X]).checks] == [True] * 4
    set_bn_statistics(graph, BATCH, include=["block.batch_norm"])
    found = verify(model, graph, [X])
    assert [check.passed for check in found.checks] == [True] * 4
    assert found.training_reference == "mixed"


def test_a_converted_model_may_be_the_original() -> None:
    first = converted(net(), bn_statistics=BATCH)
    second = converted(net())
    for model in (first, second):
        for layer in model.modules():
            if isinstance(layer, GatedModule):
                layer.mean_weight.data = torch.tensor([0.25, 0.25, 0.5])
    assert [check.passed for check in verify(first, second, [X]).checks] == [True] * 4
    assert verify(first, second, [X]).training_reference == "frozen"
    assert verify(second, second, [X]).training_reference == "original"
    assert OUTPUTS in failed(verify(second, first, [X]))


def test_renorm_has_no_reference() -> None:
    model = net()
    found = verify(model, converted(model, settings={"bn": {"bn_statistics": "renorm"}}), [X])
    assert found.passed
    assert {check.note for check in found.checks[1:]} == {
        "skipped: 1 site with bn_statistics='renorm', whose function in training the original model does not have"
    }
    assert found.notes == ()


def test_sites_whose_call_cannot_be_found_skip_the_checks_with_a_note() -> None:
    model, other = net(), net()
    layers = converted(model)
    other.block = nn.Sequential(other.block)  # type: ignore[assignment]
    found = verify(other, layers, [X])
    note = "skipped: 2 sites with running statistics in training are at no norm of the original model"
    assert {check.note for check in found.checks[1:]} == {note}


def test_nothing_is_left_on_the_reference() -> None:
    model = net()
    reference = training_reference(model, converted(model))
    calls = list(reference._calls)
    assert calls == [model.block]
    with reference.applied():
        assert "forward" in vars(model.block)
    assert "forward" not in vars(model.block)
    flags = {name: module.training for name, module in model.named_modules()}
    verify_in_place(model, converted(model), [X])
    assert "forward" not in vars(model.block)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert training_reference(net(), converted(net(), bn_statistics=BATCH)).sites == ()


# --- sites whose statistics were never updated ------------------------------------------------------------------------


def test_untrained_sites_are_named() -> None:
    torch.manual_seed(0)
    model = Net()
    note = re.compile(
        r"the running statistics of 3 sites were never updated \(mean 0, variance 1\), so as constants they do not "
        r"normalize: bn, block.batch_norm, block.batch_norm_1"
    )
    found = verify(model, converted(model), [X])
    assert found.passed
    assert note.fullmatch(found.notes[1])
    assert len(verify(model, converted(model, bn_statistics=BATCH), [X]).notes) == 0
    model(X)
    assert verify(model, converted(model), [X]).notes == (FROZEN,)


def test_statistics_from_files_without_a_count_are_trained() -> None:
    model = net()
    assert model.bn.num_batches_tracked == 0
    assert verify(model, converted(model), [X]).notes == (FROZEN,)


# --- models that amplify rounding -------------------------------------------------------------------------------------


class Wild(Net):
    """Amplifies rounding beyond anything that a comparison of outputs could tell."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(1e16 * super().forward(x))


def detached(layer: Any) -> None:
    cls = type(layer)
    layer.__class__ = type(cls.__name__, (cls,), {"forward": lambda self, x: cls.forward(self, x.detach())})


SITE_FAULTS: dict[str, Callable[[Any], Any]] = {
    "gradients": lambda m: detached(m.bn),
    "running statistics": lambda m: m.bn.register_forward_hook(in_training(lambda n: n.running_mean.add_(1e-6))),
    "outputs in training": lambda m: in_batch_mode(m.bn),
}


@pytest.mark.parametrize("name", [None, *SITE_FAULTS])
def test_sites_compared_alone_are_compared_with_the_frozen_original(name: str | None) -> None:
    torch.manual_seed(0)
    model = zoo.randomise(Wild())
    layers = converted(model)
    if name is not None:
        SITE_FAULTS[name](layers)
    found = verify(model, layers, [X])
    assert found.judged_by == "sites"
    assert found.passed == (name is None)
    assert found.notes[0] == FROZEN
    if name is None:
        assert found.notes[-1].endswith("2 sites agreed within 1e-09")
        assert not verify(model, layers, [X], bn_statistics=BATCH).passed
        mixed = converted(model, settings={"block.batch_norm": {"bn_statistics": BATCH}})
        assert verify(model, mixed, [X]).passed


def test_a_converted_model_is_compared_with_its_norms_put_back() -> None:
    model = net()
    layers = converted(model)
    back = normswap.revert(converted(model))
    for second in (model, back):
        found = verify(layers, second, [X])
        assert [check.passed for check in found.checks] == [True] * 4
        assert found.notes == (
            "training is compared with the norms of the second model in evaluation (frozen) at 3 sites",
        )
    back.drop.p = 0.0  # type: ignore[union-attr]
    assert OUTPUTS in failed(verify(layers, back, [X]))
    assert verify(converted(model, bn_statistics=BATCH), back, [X], bn_statistics=BATCH).notes == ()
