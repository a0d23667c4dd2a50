"""Whole-model graphs: what they tell, what they omit, and that neither the model nor its owner notices."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models import create_model
from torch import Tensor, fx, nn

from normswap.surgery.graphs.tracing import GraphFacts, copy_for_tracing, read_graph, trace_copy, trace_model
from normswap.surgery.norms.classes import is_norm_layer
from normswap.surgery.norms.functions import batch_norm_nodes, is_batch_norm_call, norm_arguments
from normswap.text import first_line
from tests.helpers import guarantees, zoo


def read(model: nn.Module, *, training: bool = False) -> GraphFacts:
    trace = trace_model(model, training=training)
    assert trace.graph is not None, trace.reason
    return read_graph(trace.graph, lambda name: is_norm_layer(model.get_submodule(name)))


def test_order_producers_and_owners_are_read() -> None:
    facts = read(zoo.Generator())
    assert facts.order == ("norms.0", "norms.1", "last_norm")
    assert facts.functional_owners == ("norms.0", "norms.1")
    assert facts.producers == {"last_norm": "convs.1"}


def test_a_producer_may_be_a_function_or_an_input() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = zoo.bn(), zoo.bn(), zoo.bn()

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(F.relu(self.first(x))).mul(2))

    assert read(Mixed()).producers == {"first": "x", "second": "relu", "third": "mul"}


def test_a_norm_that_runs_twice_keeps_its_first_place() -> None:
    assert read(zoo.TwoNames()).order == ("bn",)
    assert read(zoo.Recurrent()).producers == {"bn": "conv"}


def test_norm_layers_are_leaves_and_own_norms_are_not() -> None:
    trace = trace_model(zoo.BY_NAME["BatchNormAct2d"].model(), training=False)
    assert trace.graph is not None
    assert [node.target for node in trace.graph.nodes if node.op == "call_module"][1] == "1"
    assert batch_norm_nodes(trace.graph) == []
    assert read(nn.Sequential(zoo.OwnNorm())).functional_owners == ("0",)


@pytest.mark.parametrize("training", [True, False])
def test_a_graph_is_of_the_mode_asked_for_whatever_the_flags(training: bool) -> None:
    model = zoo.TrainingOnlyBlock()
    assert read(model, training=training).functional_owners == (("",) if training else ())
    assert model.training


def test_kernels_are_no_activations() -> None:
    for name in ("StdConv2d", "ScaledStdConv2d", "kernel standardized by hand"):
        trace = trace_model(zoo.BY_NAME[name].model(), training=False)
        assert trace.graph is not None
        assert any(map(is_batch_norm_call, trace.graph.nodes)), name
        assert batch_norm_nodes(trace.graph) == [], name


class LearnedInput(nn.Module):
    """What a generator starts from is a parameter, but what its convolution makes of it is an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.conv = nn.Parameter(torch.randn(1, 3, 4, 4)), zoo.conv()

    def forward(self, style: Tensor) -> Tensor:
        return F.batch_norm(self.conv(self.start), None, None, training=True) * style


def test_what_a_module_makes_of_a_parameter_is_an_activation() -> None:
    assert read(LearnedInput()).functional_owners == ("",)


def test_arguments_are_named_as_those_of_f_batch_norm_in_either_order() -> None:
    for block in (zoo.FunctionalBlock(), zoo.TorchFunctionalBlock(), zoo.KeywordBlock()):
        trace = trace_model(block, training=True)
        assert trace.graph is not None
        arguments = norm_arguments(batch_norm_nodes(trace.graph)[0])
        tensors = {name: node.target for name, node in arguments.items() if isinstance(node, fx.Node)}
        assert {"input", "running_mean", "running_var", "bias"} <= tensors.keys()
        assert tensors == {name: name for name in tensors if name != "input"} | {"input": "conv"}
        assert arguments["training"] is True
        assert (arguments["momentum"], arguments["eps"]) in ((0.2, 1e-3), (0.4, 1e-2))
        assert len(arguments) == 8


def test_a_coarser_trace_hides_code_without_norms_only() -> None:
    trace = trace_model(zoo.DataDependentTail(), training=False)
    assert trace.graph is not None
    assert trace.entered == {""}
    assert [node.target for node in trace.graph.nodes if node.op == "call_module"] == ["conv", "bn", "hidden", "tail"]


def test_entered_modules_are_reported() -> None:
    assert trace_model(zoo.SharedBlock(zoo.FunctionalBlock(8, 8)), training=False).entered == {"", "left", "right"}
    assert trace_model(zoo.Idle(), training=False).entered == {""}
    assert trace_model(zoo.Idle(), training=True).entered == {"", "auxiliary"}


def test_a_failed_trace_is_a_value_with_the_first_reason() -> None:
    trace = trace_model(zoo.Untraceable(), training=False)
    assert trace.graph is None
    assert trace.reason == "TraceError: symbolically traced variables cannot be used as inputs to control flow"


def test_timms_leaves_are_kept_only_if_they_contain_no_norm() -> None:
    model = create_model("efficientnet_b0")
    assert len(read(model).order) == 49


OMISSIONS = {
    "a number drawn": (zoo.Drawing, "it draws random numbers in Python"),
    "an attribute": (zoo.Remembering, "it writes to features"),
    "a list": (zoo.Collecting, "it writes to seen"),
    "gradients": (zoo.PartlyWithoutGradient, "it switches gradients or autocast in a part of its code"),
    "autocast off": (zoo.WithoutAutocast, "it switches gradients or autocast in a part of its code"),
}


@pytest.mark.parametrize(("make", "omission"), OMISSIONS.values(), ids=OMISSIONS)
def test_what_a_graph_omits_is_reported(make: type[nn.Module], omission: str) -> None:
    trace = trace_model(make(), training=True)
    assert trace.graph is not None
    assert trace.omission == omission


def test_a_child_that_keeps_something_is_named() -> None:
    assert trace_model(nn.Sequential(zoo.Remembering()), training=False).omission == "it writes to 0.features"


def test_nothing_is_omitted_where_all_is_tensors() -> None:
    for model in (zoo.Generator(), zoo.DropoutBlock(), zoo.MamlConv4(), zoo.Constant()):
        assert trace_model(model, training=True).omission is None


@pytest.mark.parametrize("context", [torch.no_grad, lambda: torch.autocast("cpu"), torch.inference_mode])
def test_the_context_of_the_caller_is_no_omission(context: Any) -> None:
    with context():
        assert trace_model(zoo.FunctionalBlock(), training=True).omission is None
        assert trace_model(zoo.PartlyWithoutGradient(), training=True).omission is not None
        assert trace_model(zoo.WithoutAutocast(), training=True).omission is not None


def test_tracing_leaves_model_and_random_numbers_alone() -> None:
    for name in ("number drawn in forward", "list filled in forward", "hooks", "called several times", "lazy BN"):
        model = zoo.BY_NAME[name].model()
        before, states = guarantees.Record.of(model), (torch.get_rng_state(), random.getstate())
        trace_model(model, training=True)
        guarantees.nothing_else_changed(before, model, guarantees.NO_SWAPS, same_objects=True)
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == random.getstate()


def test_hooks_of_the_user_see_no_proxies() -> None:
    model, seen = nn.Sequential(nn.Sequential(zoo.conv(), zoo.bn())), []
    model[0].register_forward_hook(lambda *args: seen.append(args))
    model[0].register_forward_pre_hook(lambda *args: seen.append(args))
    assert trace_model(model, training=False).graph is not None
    assert seen == []


def test_a_twin_shares_parameters_and_nothing_else() -> None:
    model = zoo.BY_NAME["in a list besides"].model()
    twin = copy_for_tracing(model)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    assert {id(b) for b in twin.buffers()}.isdisjoint({id(b) for b in model.buffers()})
    assert all(map(torch.equal, twin.buffers(), model.buffers()))
    assert twin.order[0] is twin.bn1
    assert twin.bn1 is not model.bn1
    assert type(twin) is type(model)


def test_a_twin_of_odd_modules_is_a_copy_as_well() -> None:
    for name in (
        "shared block",
        "two names",
        "TorchScript inside",
        "a GraphModule with module norms",
        "parametrized BN",
    ):
        trap = zoo.BY_NAME[name]
        model = trap.model()
        twin = copy_for_tracing(model)
        set_eval = [module.eval() for module in (model, twin)]
        torch.testing.assert_close(
            guarantees.call(set_eval[1], trap.inputs()), guarantees.call(set_eval[0], trap.inputs())
        )
        assert len(list(twin.named_modules(remove_duplicate=False))) == len(
            list(model.named_modules(remove_duplicate=False))
        )


def test_a_twin_that_cannot_be_made_is_a_reason() -> None:
    model = zoo.pruned()
    trace = trace_model(model, training=False)
    assert trace.graph is None
    assert trace.reason is not None
    assert trace.reason.startswith("RuntimeError: Only Tensors created explicitly by the user")


def test_concrete_arguments_are_no_placeholders_in_what_runs() -> None:
    trace = trace_copy(zoo.UnusedOption, lambda _: True, training=True, concrete={"scale": 3.0})
    assert trace.graph is not None
    products = [node for node in trace.graph.nodes if getattr(node.target, "__name__", "") == "mul"]
    assert [node.args[1] for node in products] == [3.0]


def test_torch_can_make_our_tracer_without_arguments() -> None:
    trace = trace_model(zoo.Generator(), training=False)
    assert trace.graph is not None
    tracer = trace.graph._tracer_cls
    assert isinstance(tracer(), fx.Tracer)  # type: ignore[misc]


def test_the_first_line_of_an_error_or_its_class() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(RuntimeError("\n\n  three")) == "three"
