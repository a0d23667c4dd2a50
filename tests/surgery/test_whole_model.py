"""Which path tells about a whole model, and that a trace which is wrong is not believed."""

import logging
import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap import find_norm_sites
from normswap.surgery.discovery import whole_model
from normswap.surgery.discovery.whole_model import ModelFacts, tracing_path
from normswap.surgery.graphs.exported_program import export_facts
from normswap.surgery.graphs.tracing import GraphFacts, trace_model
from normswap.surgery.norms.classes import is_norm_layer
from tests.helpers import functional_networks as networks
from tests.helpers import guarantees, zoo

CONTROL_FLOW = "TraceError: symbolically traced variables cannot be used as inputs to control flow"


class SizeDependent(nn.Module):
    """Control flow on a size: symbolic tracing fails, an export does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.block, self.last = zoo.conv(), zoo.bn(), zoo.FunctionalBlock(8, 8), zoo.bn()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.last(self.block(x) + x if x.size(0) > 1 else x)


class GhostNorm(nn.Module):
    """A type check that only tensors pass: a trace shows a norm that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.real, self.ghost = zoo.conv(), zoo.bn(), zoo.bn()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.real(y) if isinstance(x, Tensor) else self.ghost(y)


class LostSkip(nn.Module):
    """A type check that only tensors pass: a trace shows the right norms, the second one fed from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.second = zoo.bn(), zoo.conv(8, 8), zoo.bn()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.first(x))
        return self.second(F.relu(y + x) if isinstance(x, Tensor) else y * 2)


class LostNorm(GhostNorm):
    """A type check that only tensors with data pass: a trace and an export miss a norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.real(self.conv(x))
        return self.ghost(y) if type(x) is Tensor else y


# (model, input, path, the reason why the one before did not serve)
PATHS = {
    "traced": (zoo.Generator, lambda: (zoo.image(3, 6)(), torch.tensor([0, 4, 2])), "symbolic trace", "^$"),
    "constants": (zoo.Constant, zoo.IMAGE, "symbolic trace", "^$"),
    "kernels": (zoo.BY_NAME["StdConv2d"].make, zoo.IMAGE, "symbolic trace", "^$"),
    "a computed kernel": (zoo.Standardised, zoo.IMAGE, "symbolic trace", "^$"),
    "aliases": (zoo.TwoNames, zoo.IMAGE, "symbolic trace", "^$"),
    "a shared block": (zoo.BY_NAME["shared block"].make, zoo.IMAGE, "symbolic trace", "^$"),
    "a coarse trace": (zoo.DataDependentTail, zoo.IMAGE, "symbolic trace", "^$"),
    "keywords": (zoo.KeywordInput, lambda: {"left": zoo.IMAGE(), "right": zoo.IMAGE()}, "symbolic trace", "^$"),
    "a size": (SizeDependent, zoo.IMAGE, "torch.export", f"^symbolic trace: {CONTROL_FLOW}$"),
    "a learner": (networks.Learner, networks.TASKS, "torch.export", "^symbolic trace: "),
    "a ghost": (
        GhostNorm,
        zoo.IMAGE,
        "torch.export",
        "^symbolic trace: .* in ghost, the forward pass at that point in real$",
    ),
    "a lost norm": (
        LostNorm,
        zoo.IMAGE,
        "forward pass",
        "^symbolic trace: its graph has 1 calls that normalize, the forward pass 2; torch.export: its graph has 1",
    ),
    "a lost skip": (LostSkip, zoo.FEATURES, "torch.export", "the outputs of its graph differ from those of the model"),
    "a value": (zoo.Untraceable, zoo.IMAGE, "forward pass", f"^symbolic trace: {CONTROL_FLOW}; torch.export: Guard"),
    "a list": (zoo.InContainers, zoo.IMAGE, "forward pass", "^symbolic trace: NameError.*; torch.export: its graph"),
}


@pytest.fixture
def graphs_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the code of every model named a function that normalizes."""
    monkeypatch.setattr(whole_model, "mentions_norm_function", lambda _: True)


@pytest.mark.usefixtures("graphs_are_asked")
@pytest.mark.parametrize(("make", "inputs", "path", "reason"), PATHS.values(), ids=PATHS)
def test_the_first_acceptable_path_is_used(
    make: Callable[[], nn.Module], inputs: Callable[[], Any], path: str, reason: str
) -> None:
    torch.manual_seed(0)
    whole = tracing_path(zoo.randomise(make()), inputs())
    assert whole.path == path
    assert re.search(reason, whole.reason)
    assert (whole.facts is None) == (path == "forward pass")


def test_without_an_input_a_trace_is_taken_at_its_word() -> None:
    assert tracing_path(GhostNorm()).path == "symbolic trace"
    assert tracing_path(SizeDependent()) == ModelFacts("module tree", (("symbolic trace", CONTROL_FLOW),))


def test_an_export_reports_what_a_trace_would() -> None:
    whole = tracing_path(SizeDependent(), zoo.IMAGE())
    assert whole.facts == GraphFacts(
        calls=("bn", "block", "last"), producers={"bn": "conv", "last": "add"}, functional_owners=("block",)
    )
    found = {site.fqn: site for site in find_norm_sites(SizeDependent(), zoo.IMAGE())}
    assert (found["last"].producer, found["last"].seen_by) == ("add", "forward pass")


@pytest.mark.usefixtures("graphs_are_asked")
def test_what_a_wrong_trace_reports_is_not_used() -> None:
    ghost = {site.fqn: site for site in find_norm_sites(GhostNorm(), zoo.IMAGE())}["ghost"]
    assert (ghost.producer, ghost.order, ghost.calls) == (None, None, 0)
    assert {site.fqn: site.producer for site in find_norm_sites(LostSkip(), zoo.FEATURES())} == {
        "first": "x",
        "second": "relu",
    }


@pytest.mark.usefixtures("graphs_are_asked")
def test_no_second_pass_is_run_where_the_first_showed_all() -> None:
    runs: list[int] = []
    model = nn.Sequential(zoo.conv(), zoo.bn(), nn.ReLU(), zoo.conv(8, 8), zoo.bn())
    model[0].register_forward_hook(lambda *_: runs.append(1))
    assert tracing_path(model, zoo.IMAGE()).path == "symbolic trace"
    assert len(runs) == 1
    runs.clear()
    skipping = LostSkip()
    skipping.conv.register_forward_hook(lambda *_: runs.append(1))
    tracing_path(skipping, zoo.FEATURES())
    assert len(runs) == 2


def test_no_graph_is_made_where_the_pass_has_shown_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[bool] = []

    def spy(*args: Any, training: bool, **options: Any) -> Any:
        traced.append(training)
        return trace_model(*args, training=training, **options)

    monkeypatch.setattr(whole_model, "trace_model", spy)
    assert tracing_path(LostSkip(), zoo.FEATURES()) == ModelFacts("forward pass")
    assert traced == []
    assert tracing_path(LostSkip()).path == "symbolic trace"
    assert traced == [False]
    traced.clear()
    assert tracing_path(zoo.FunctionalBlock(), zoo.IMAGE()).path == "symbolic trace"
    assert traced == [False, True]


@pytest.mark.slow
@pytest.mark.usefixtures("graphs_are_asked")
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "levit_128s", "repvgg_a0", "vit_tiny_patch16_224"])
def test_whole_networks_are_traced_and_accepted(name: str) -> None:
    model = timm.create_model(name)
    size = model.pretrained_cfg["input_size"]
    assert tracing_path(model, torch.randn(1, *size)).path == "symbolic trace"


# --- torch.export -----------------------------------------------------------------------------------------------------


def facts_of(model: nn.Module, inputs: Any) -> GraphFacts | str:
    modules = dict(model.named_modules(remove_duplicate=False))
    return export_facts(model, inputs, lambda name: name in modules and is_norm_layer(modules[name]))


def test_an_export_shows_repeated_calls_aliases_and_kernels() -> None:
    facts = facts_of(zoo.Recurrent(), zoo.IMAGE())
    assert facts == GraphFacts(("bn",) * 3, {"bn": "conv"}, ())
    facts = facts_of(zoo.TwoNames(), zoo.IMAGE())
    assert facts == GraphFacts(("bn", "alias"), {"bn": "conv", "alias": "second"}, ())
    facts = facts_of(zoo.BY_NAME["StdConv2d"].model(), zoo.IMAGE())
    assert facts == GraphFacts(("1",), {"1": "conv2d"}, (), frozenset({"0"}))


def test_producers_are_layers_functions_and_inputs() -> None:
    model = nn.Sequential(zoo.BY_NAME["torchvision FrozenBatchNorm2d"].model(), nn.Linear(4, 4), nn.LayerNorm(4))
    assert facts_of(model, zoo.IMAGE()) == GraphFacts(("0.1", "2"), {"0.1": "0.0", "2": "1"}, ())
    assert facts_of(zoo.bn(3), zoo.IMAGE()) == GraphFacts(("",), {"": "input"}, ())


@pytest.mark.parametrize(
    "name", ["control flow around modules", "list filled in forward", "hooks", "number drawn in forward"]
)
def test_an_export_leaves_no_trace(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    model, inputs = zoo.BY_NAME[name].model(), zoo.BY_NAME[name].inputs()
    before, states = guarantees.Record.of(model), (torch.get_rng_state(), random.getstate())
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.name)  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            facts_of(model, inputs)
    finally:
        logging.getLogger().removeHandler(handler)
    assert (capfd.readouterr(), warned, heard, logging.root.manager.disable) == (("", ""), [], [], 0)
    guarantees.nothing_else_changed(before, model, guarantees.NO_SWAPS, same_objects=True)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()


def test_a_failed_export_is_a_reason() -> None:
    assert str(facts_of(zoo.pruned(), zoo.IMAGE())).startswith("RuntimeError: Only Tensors created explicitly")
    assert str(facts_of(zoo.Untraceable(), zoo.IMAGE())).startswith("GuardOnDataDependentSymNode: Could not guard")
