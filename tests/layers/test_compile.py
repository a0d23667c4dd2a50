"""`torch.compile` of converted networks: one graph, few nodes, compiled once, and the numbers of eager mode.

Graphs run node by node here, without a C++ compiler; `benchmarks/speed/compile_cost.py` uses the default backend.
"""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import lookup_backend

import normswap
from normswap.layers.switch_norm import SwitchNorm, SwitchNorm2d

X = torch.Size((2, 3, 32, 32))
pytestmark = pytest.mark.slow


class Graphs:
    """A compiler backend that runs graphs node by node and counts them."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.backend = backend
        self.compiled = 0
        self.targets: Counter[str] = Counter()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.compiled += 1
        self.targets.update(str(node.target) for node in graph.graph.nodes)
        return lookup_backend(self.backend)(graph, inputs)

    def __getitem__(self, operator: str) -> int:
        return self.targets[f"normswap.{operator}.default"]


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> None:
    torch.compiler.reset()


def compiled(model: nn.Module, *, backend: str = "aot_eager") -> tuple[Any, Graphs]:
    graphs = Graphs(backend)
    return torch.compile(model, fullgraph=True, backend=graphs), graphs


class CallsBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.zeros(4))
        # Smaller than that of the images: the loss below, a sum of squares, moves the gates away from `bn`.
        self.register_buffer("var", torch.full((4,), 0.05))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, training=self.training).relu()  # type: ignore[arg-type]


def convnext(**options: Any) -> nn.Module:
    small = {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8), "num_classes": 3}
    return timm.create_model("convnext_atto", **small, **options)  # type: ignore[no-any-return]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: timm.create_model("resnet18", num_classes=3),
    "efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=3),
    "convnext of BatchNorms": lambda: convnext(norm_layer="batchnorm2d", conv_mlp=True),
    "calls of F.batch_norm": CallsBatchNorm,
}


def converted(make: Callable[[], nn.Module]) -> nn.Module:
    return normswap.convert(make().double().eval(), torch.randn(X).double()).model


def assert_same(ours: nn.Module, eager: nn.Module) -> None:
    torch.testing.assert_close(dict(ours.state_dict()), dict(eager.state_dict()), rtol=1e-9, atol=1e-12)


def assert_same_gradients(ours: nn.Module, eager: nn.Module) -> None:
    for (name, parameter), twin in zip(ours.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_training_compiles_once_and_equals_eager(make: Callable[[], nn.Module]) -> None:
    """Run five steps, in which the gates move, with evaluation in between."""
    ours = converted(make)
    eager = copy.deepcopy(ours)
    compiled_model, graphs = compiled(ours)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (ours, eager)]
    for step in range(5):
        x = torch.randn(X).double()
        for model, optimizer in zip((compiled_model, eager), optimizers, strict=True):
            optimizer.zero_grad()
            model.train()
            model(x).square().sum().backward()
        assert_same_gradients(ours, eager)
        for optimizer in optimizers:
            optimizer.step()
        if step % 2 == 0:
            with torch.no_grad():
                torch.testing.assert_close(compiled_model.eval()(x), eager.eval()(x), rtol=1e-9, atol=1e-12)
    assert_same(ours, eager)
    assert graphs.compiled == 2  # one for training, one for evaluation
    sites = len(normswap.importance_weights(ours))
    assert graphs["switch_norm"] == graphs["switch_norm_constant"] == graphs["project_points"] == sites > 0
    moved = [w for weights in normswap.importance_weights(ours).values() for w in (weights.mean, weights.var)]
    assert any(shares["bn"] != 1 for shares in moved)


def test_a_layer_adds_few_nodes() -> None:
    """The time to compile grows with the number of nodes; the plain formula has 150 per layer."""
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    nodes = []
    for model in (original, normswap.convert(original, torch.randn(X)).model):
        compiled_model, graphs = compiled(model.train(), backend="eager")
        compiled_model(torch.randn(X))
        nodes.append(sum(graphs.targets.values()))
    # Two of them update the running statistics by BN's own formula, which keeps an infinite one infinite.
    assert 0 < nodes[1] - nodes[0] <= 2 * 21


def test_a_network_without_sites_compiles_as_before() -> None:
    original = convnext().eval()
    conversion = normswap.convert(original, torch.randn(X))
    assert conversion.plan.swaps == ()
    x, targets = torch.randn(X), []
    for model in (original, conversion.model):
        compiled_model, graphs = compiled(model, backend="eager")
        torch.testing.assert_close(compiled_model(x), original(x))
        targets.append(graphs.targets)
    assert targets[0] == targets[1]


def layer(**options: Any) -> SwitchNorm:
    made = SwitchNorm2d(4, gate="simplex", dtype=torch.float64, **options)
    with torch.no_grad():
        made.mean_weight.copy_(torch.tensor([0.5, 0.4, 0.3]))  # not on the simplex: put there in training
        made.var_weight.copy_(torch.tensor([0.6, 0.1, 0.3]))
        made.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return made


def plane(*, of: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    return of(torch.randn(3, 4, 5, 6).double()).detach().requires_grad_()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "with gaps": lambda x: x[:, :, ::2],
}


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("of", LAYOUTS.values(), ids=LAYOUTS)
def test_fake_operators_return_the_layout_of_the_result(of: Callable[[Tensor], Tensor], constant: bool) -> None:
    """A compiler plans memory by the results of fake operators."""
    operators = torch.ops.normswap
    x = of(torch.randn(3, 4, 5, 6).double())
    points = [torch.tensor([0.2, 0.5, 0.3]).double() for _ in range(2)]
    affine, moments = [torch.rand(4).double() for _ in range(2)], [torch.rand(1, 4).double() for _ in range(2)]
    options = ("simplex", "in ln bn", 1e-5)
    inputs = (x, *points, *affine, *(moments if constant else (None, None)), *options)
    torch.library.opcheck(operators.switch_norm.default, inputs, test_utils="test_faketensor")
    y, _, _, mean, var = operators.switch_norm(*inputs)
    assert y.stride() == operators.switch_norm_constant(*inputs).stride() if constant else True
    for dy in (torch.randn_like(y), torch.randn(y.shape).double()):
        backward = (dy, x, *points, affine[0], *inputs[5:7], mean, var, *options)
        torch.library.opcheck(operators.switch_norm_backward.default, backward, test_utils="test_faketensor")


@pytest.mark.parametrize("vertex", [True, False])
def test_evaluation_on_running_statistics_is_an_operator_of_its_own(vertex: bool) -> None:
    ours = (SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(4)).double() if vertex else layer()).eval()
    compiled_layer, graphs = compiled(ours)
    for of in LAYOUTS.values():
        x = plane(of=of)
        with torch.no_grad():
            y = compiled_layer(x)
            assert y.equal(ours(x))
            assert y.stride() == ours(x).stride()
    assert graphs["switch_norm_constant"] > 0
    assert graphs["switch_norm"] == 0
    tensors = (plane(), ours.mean_weight, ours.var_weight, ours.weight, ours.bias)
    constants = (torch.zeros(1, 4).double(), torch.ones(1, 4).double())
    torch.library.opcheck(
        torch.ops.normswap.switch_norm_constant.default,
        (*(t.detach() for t in tensors), *constants, "simplex", "in ln bn", 1e-5),  # type: ignore[union-attr]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_points_are_projected_onto_the_simplex_by_an_operator(dtype: torch.dtype) -> None:
    away, there = torch.tensor([0.5, 0.4, 0.3]).to(dtype), torch.tensor([0.0, 0.0, 1.0]).to(dtype)
    torch.library.opcheck(torch.ops.normswap.project_points.default, ([away.clone(), there],))
    torch.ops.normswap.project_points([away, there])
    assert there.tolist() == [0, 0, 1]
    expected = torch.tensor([0.5, 0.4, 0.3]).to(dtype).double()
    torch.testing.assert_close(away.double(), expected - (expected.sum() - 1) / 3, rtol=0, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_other_sizes_and_a_plain_average_compile_once_more_at_most(
    dynamic: bool | None, momentum: float | None
) -> None:
    ours = layer(momentum=momentum)
    eager = copy.deepcopy(ours)
    graphs = Graphs()
    compiled_layer = torch.compile(ours, fullgraph=True, backend=graphs, dynamic=dynamic)
    counts = []
    for shape in ((3, 4, 5, 6), (2, 4, 7, 8), (5, 4, 6, 3), (6, 4, 9, 8)):
        x = torch.randn(shape).double()
        for module in (compiled_layer, eager):
            module(x).pow(3).sum().backward()
        assert_same(ours, eager)
        assert_same_gradients(ours, eager)
        counts.append(graphs.compiled)
    assert counts[3] == counts[0 if dynamic else 1]


def test_two_forward_passes_before_a_backward_pass() -> None:
    """Siamese networks and discriminators do this: projecting again must not count as a change of a saved tensor."""
    ours = layer()
    eager = copy.deepcopy(ours)
    for module in (compiled(ours)[0], eager):
        first, second = (module(torch.linspace(-1, stop, 360).double().view(3, 4, 5, 6)) for stop in (2, 3))
        second.pow(3).sum().backward()
        first.pow(3).sum().backward()
    assert_same(ours, eager)
    assert_same_gradients(ours, eager)


def test_transforms_inside_a_graph_get_the_plain_formula() -> None:
    ours = layer().eval()
    state, buffers = {n: p.detach() for n, p in ours.named_parameters()}, dict(ours.named_buffers())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        y = torch.func.functional_call(ours, (parameters, buffers), (sample[None],))
        return y.pow(3).sum()  # type: ignore[no-any-return]

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    x, graphs = torch.randn(3, 4, 5, 5).double(), Graphs()
    found = torch.compile(per_sample, fullgraph=True, backend=graphs)(state, x)
    torch.testing.assert_close(found, per_sample(state, x))
    assert not any("normswap" in target for target in graphs.targets)


def test_a_second_derivative_through_a_graph_that_runs_node_by_node() -> None:
    ours = layer()
    seconds = []
    for module in (torch.compile(ours, fullgraph=True, backend="eager"), ours):
        x = torch.linspace(-1, 2, 360).double().view(3, 4, 5, 6).requires_grad_()
        (first,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.pow(2).sum(), (x, *ours.parameters())))
    torch.testing.assert_close(*seconds)


@pytest.mark.parametrize("training", [True, False])
def test_the_reference_can_be_forced_into_a_graph(training: bool) -> None:
    ours = layer().train(training)
    eager = copy.deepcopy(ours)
    compiled_layer, graphs = compiled(ours)
    with normswap.use_backend("reference"):
        for module in (compiled_layer, eager):
            module(torch.linspace(-1, 2, 360).double().view(3, 4, 5, 6)).pow(3).sum().backward()
    assert not any("normswap" in target for target in graphs.targets)
    assert_same(ours, eager)
    assert_same_gradients(ours, eager)
