"""ExecuTorch on converted networks: lowered for XNNPACK, run by its runtime. See docs/how-to/use-with.md."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from tests.helpers.compact_networks import compacted
from tests.helpers.files import scrambled

exir = pytest.importorskip("executorch.exir", reason="needs executorch, best in an environment of its own")
partitioner = pytest.importorskip("executorch.backends.xnnpack.partition.xnnpack_partitioner")
runtime = pytest.importorskip("executorch.runtime")

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Module:
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    return scrambled(nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))).eval()


def mixed(weights: tuple[float, ...] = (0.2, 0.3, 0.5), **options: Any) -> nn.Module:
    model = normswap.convert(plain(), X, **options).model.eval()
    for gate in normswap.trainable_gates(model).values():
        point = torch.tensor(weights[-len(gate) :])
        gate.data.copy_(point / point.sum())
    return model


def lowered(model: nn.Module) -> tuple[Counter[str], torch.Tensor]:
    """Return the operators that XNNPACK does not run, and the output of the runtime."""
    program = torch.export.export(model, (X,))
    edge = exir.to_edge_transform_and_lower(program, partitioner=[partitioner.XnnpackPartitioner()])
    calls = [node.target for node in edge.exported_program().graph.nodes if node.op == "call_function"]
    left = Counter(each._name for each in calls if hasattr(each, "_name"))
    loaded = runtime.Runtime.get().load_program(edge.to_executorch().buffer)
    return left, loaded.load_method("forward").execute([X])[0]


pytestmark = pytest.mark.filterwarnings("ignore")  # those of ExecuTorch


@pytest.mark.slow
def test_a_reverted_network_is_delegated_as_a_whole() -> None:
    model = normswap.revert(normswap.convert(plain(), X).model)
    left, output = lowered(model)
    assert left == {"executorch_call_delegate": 1}
    torch.testing.assert_close(output, plain()(X), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"match": False}, {"start": "gn", "num_groups": 4}], ids=str)
def test_a_converted_network_runs_with_operators_that_are_not_delegated(options: dict[str, Any]) -> None:
    model = mixed(**options)
    left, output = lowered(copy.deepcopy(model))
    assert left["aten::var.correction"] == 4  # two of each site: over positions, and over channels
    torch.testing.assert_close(output, model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "averages"), [((0.5, 0.0, 0.5), 0), ((0.0, 0.0, 1.0), 0), ((0.2, 0.3, 0.5), 2), ((0.0, 1.0, 0.0), 2)]
)
def test_of_compact_layers_only_averages_over_channels_are_not_delegated(
    weights: tuple[float, ...], averages: int
) -> None:
    model = compacted(mixed(weights))
    left, output = lowered(copy.deepcopy(model))
    del left["executorch_call_delegate"]
    assert left == ({"aten::mean.dim": 2 * averages} if averages else {})
    torch.testing.assert_close(output, model(X), rtol=1e-5, atol=1e-5)
