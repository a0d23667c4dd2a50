"""Compact layers in ONNX compute what the layers compute, in few standard operators."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.layers.matching import Matching

pytest.importorskip("onnxscript")
onnx: Any = pytest.importorskip("onnx")
onnxruntime: Any = pytest.importorskip("onnxruntime")

POINTS = {
    "three branches": ((0.2, 0.3, 0.5), (0.6, 0.3, 0.1)),
    "in and ln": ((0.4, 0.6, 0.0), (0.7, 0.3, 0.0)),
    "in and bn": ((0.4, 0.0, 0.6), (0.7, 0.0, 0.3)),
    "ln and bn": ((0.0, 0.4, 0.6), (0.0, 0.7, 0.3)),
    "in": ((1.0, 0.0, 0.0), (1.0, 0.0, 0.0)),
    "ln": ((0.0, 1.0, 0.0), (0.0, 1.0, 0.0)),
    "bn": ((0.0, 0.0, 1.0), (0.0, 0.0, 1.0)),
    "one branch for means, another for variances": ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0)),
    "mean of in, variance of bn": ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0)),
}


class Layers(nn.Module):
    """Layers beside each other, each with an output."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def layer(point: tuple[tuple[float, ...], tuple[float, ...]], dims: int = 2, **options: Any) -> nn.Module:
    cls = {1: normswap.SwitchNorm1d, 2: normswap.SwitchNorm2d, 3: normswap.SwitchNorm3d}[dims]
    is_matched = options.pop("matched", True)
    made = cls(8, gate="simplex", **options).eval()
    with torch.no_grad():
        made.mean_weight.copy_(torch.tensor(point[0]))
        made.var_weight.copy_(torch.tensor(point[1]))
        for name, low, high in (("running_mean", -1, 1), ("running_var", 0.5, 2), ("weight", 0.5, 2), ("bias", -1, 1)):
            if getattr(made, name) is not None:
                getattr(made, name).uniform_(low, high)
    if is_matched and made.running_mean is not None:
        made.ln_mean_shift, made.ln_var_scale, made.in_var_scale = (
            torch.randn(8),
            torch.rand(8) + 0.5,
            torch.rand(8) + 1,
        )
        assert isinstance(made.matching, Matching)
    return made


def export(model: nn.Module, x: Tensor, folder: Path, **options: Any) -> Any:
    path = folder / "model.onnx"
    normswap.export(model, path, example_inputs=x, verify=False, overwrite=True, **options)
    return onnx.load(path)


def run(proto: Any, x: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def assert_equal(model: nn.Module, proto: Any, x: Tensor, limit: float) -> None:
    with torch.no_grad():
        for expected, found in zip(model(x.float()), run(proto, x), strict=True):
            assert float((found.float() - expected).norm() / expected.norm()) < limit


def cases(dims: int) -> Layers:
    torch.manual_seed(0)
    made = [layer(point, dims) for point in POINTS.values()]
    made += [
        layer(POINTS["three branches"], dims, **options)
        for options in ({"num_groups": 4}, {"affine": False}, {"bias": False}, {"matched": False}, {"eps": 0.1})
    ]
    return Layers(made).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("dims", "shape"), [(1, (2, 8, 7)), (2, (2, 8, 6, 7)), (3, (2, 8, 3, 4, 5))])
def test_every_kind_of_layer_computes_its_function_at_other_sizes(
    dims: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    model = cases(dims)
    proto = export(model, torch.randn(shape) + 3, tmp_path)
    for n in (1, 3):
        assert_equal(model, proto, torch.randn(n, 8, *(size + 1 for size in shape[2:])) + 3, 1e-5)
    assert {node.domain for node in proto.graph.node} == {""}
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert not kinds.keys() & {"Where", "IsNaN", "IsInf", "GroupNormalization"}


def test_layers_over_samples_and_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Layers([layer(((0.4, 0.6), (0.7, 0.3)), 1, branches=("ln", "bn"), matched=False)]).eval()
    proto = export(model, torch.randn(2, 8), tmp_path)
    assert_equal(model, proto, torch.randn(5, 8), 1e-5)


@pytest.mark.slow
def test_moments_are_taken_in_float32_in_half_precision(tmp_path: Path) -> None:
    model = Layers([layer(POINTS["three branches"]), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)]).eval()
    x = (torch.randn(2, 8, 16, 16) * 20 + 300).half()  # squares are beyond float16
    proto = export(model, x, tmp_path, dtype="float16")
    assert_equal(model, proto, x, 2e-2)
    types = {init.data_type for init in proto.graph.initializer}
    assert onnx.TensorProto.FLOAT in types
    producers = {output: node for node in proto.graph.node for output in node.output}
    norms = [node for node in proto.graph.node if node.op_type == "InstanceNormalization"]
    assert len(norms) == 2
    assert {producers[node.input[0]].op_type for node in norms} <= {"Cast", "Reshape"}


def test_a_site_takes_at_most_20_nodes_for_two_branches_and_30_for_three(tmp_path: Path) -> None:
    for name, limit in (("ln and bn", 20), ("in and bn", 20), ("three branches", 30)):
        proto = export(Layers([layer(POINTS[name])]).eval(), torch.randn(2, 8, 6, 6), tmp_path)
        assert len(proto.graph.node) <= limit, name
