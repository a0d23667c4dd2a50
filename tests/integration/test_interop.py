"""The tools of docs/how-to/use-with.md on converted networks: what each row of the page states."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.utils.flop_counter import FlopCounterMode

import normswap
from normswap.layers.gated_module import GatedModule
from tests.helpers.compact_networks import compacted
from tests.helpers.files import scrambled

MIX = [0.2, 0.3, 0.5]
AT_LN = [0.0, 1.0, 0.0]
X = torch.randn(2, 3, 34, 34, generator=torch.Generator().manual_seed(0))
POSITIONS = 2 * 16 * 32 * 32  # values of the activation after the convolution


def plain() -> nn.Module:
    """Two convolutions, and a BatchNorm with values as after training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3))
    return scrambled(model).eval()


def converted(model: nn.Module, x: Tensor, values: list[float] | None = None, **options: Any) -> nn.Module:
    """Return the converted model, with the gates at `values` if they are given."""
    model = normswap.convert(model, x, **options).model.eval()
    for point in normswap.trainable_gates(model).values() if values else ():
        point.data.copy_(torch.tensor(values))
    return model


def sites(model: nn.Module) -> int:
    return sum(isinstance(module, GatedModule) for module in model.modules())


# --- counting operations ----------------------------------------------------------------------------------------------

# The operations of the formula on activations, by fvcore's rule one for each value.
FORMULA = ("add", "div", "mean", "mul", "sub", "sum", "var", "var_mean")


@pytest.fixture
def fvcore() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # fvcore calls torch.jit.trace
        yield pytest.importorskip("fvcore.nn", reason="needs fvcore")


def test_fvcore_counts_convolutions_alike_and_names_what_it_leaves_out(fvcore: Any) -> None:
    old, new = plain(), converted(plain(), X, MIX)
    counts = [fvcore.FlopCountAnalysis(model, X).unsupported_ops_warnings(False) for model in (old, new)]
    by_module = [count.by_module() for count in counts]
    assert by_module[0]["0"] == by_module[1]["0"] > 0
    assert by_module[0]["3"] == by_module[1]["3"] > 0
    assert (by_module[0]["1"], by_module[1]["1"]) == (2 * POSITIONS, 0)
    assert counts[0].unsupported_ops() == {}
    assert {"aten::mean", "aten::mul", "aten::sub"} <= {*counts[1].unsupported_ops()}


@pytest.mark.parametrize("values", [MIX, AT_LN, [0.0, 0.0, 1.0]])
def test_fvcore_counts_four_operations_a_value_with_a_handle(fvcore: Any, values: list[float]) -> None:
    from fvcore.nn.jit_handles import elementwise_flop_counter

    handles = {f"aten::{name}": elementwise_flop_counter(1, 0) for name in FORMULA}
    count = fvcore.FlopCountAnalysis(converted(plain(), X, values), X).unsupported_ops_warnings(False)
    counted = count.set_op_handle(**handles).by_module()["1"]
    assert 4 <= counted / POSITIONS < 4.1


def test_fvcore_counts_compact_layers_with_the_same_handles(fvcore: Any) -> None:
    from fvcore.nn.jit_handles import elementwise_flop_counter

    handles = {f"aten::{name}": elementwise_flop_counter(1, 0) for name in (*FORMULA, "square")}
    model = compacted(converted(plain(), X, MIX))
    count = fvcore.FlopCountAnalysis(model, X).unsupported_ops_warnings(False).set_op_handle(**handles)
    assert 6 <= count.by_module()["1"] / POSITIONS < 6.1  # mean, deviation, square, mean, scale, shift


def test_torch_counts_the_same_operations_before_and_after() -> None:
    counts = []
    for model in (plain(), converted(plain(), X, MIX), compacted(converted(plain(), X, MIX))):
        with FlopCounterMode(display=False) as counter:
            model(X)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2] > 0


def test_torchinfo_lists_sites_with_their_parameters() -> None:
    torchinfo = pytest.importorskip("torchinfo", reason="needs torchinfo")
    networks = (plain(), converted(plain(), X, MIX), compacted(converted(plain(), X, MIX)))
    old, new, compact = (torchinfo.summary(model, input_data=X, verbose=0) for model in networks)
    (layer,) = [each for each in new.summary_list if each.class_name == "SwitchNorm2d"]
    assert layer.output_size == [2, 16, 32, 32]
    assert layer.num_params == 2 * 16 + 6  # and three weights of each gate
    assert new.total_params - old.total_params == 6
    assert compact.total_params == old.total_params
    assert new.total_output_bytes == old.total_output_bytes


# --- fusing -----------------------------------------------------------------------------------------------------------


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def test_fuse_folds_the_norms_of_a_reverted_network() -> None:
    model = normswap.revert(converted(plain(), X))
    fused = fuse(model)
    assert batch_norms(fused) == 0
    torch.testing.assert_close(fused(X), plain()(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("values", [None, MIX, AT_LN])
@pytest.mark.parametrize("options", [{}, {"gate": "softmax"}, {"as_graph": True}], ids=str)
def test_fuse_leaves_a_converted_network_as_it_is(values: list[float] | None, options: dict[str, Any]) -> None:
    model = converted(plain(), X, values, **options)
    fused = fuse(model)
    assert sites(fused) == 1
    assert torch.equal(fused(X), model(X))


@pytest.mark.parametrize("values", [MIX, AT_LN, [0.0, 0.0, 1.0]])
def test_fuse_leaves_compact_layers_as_they_are(values: list[float]) -> None:
    model = compacted(converted(plain(), X, values))
    assert torch.equal(fuse(model)(X), model(X))


# --- PT2E quantization ------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A network that reads digits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )
    images, labels = digits()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for start in [*range(0, 1200, 60)] * 6:
        optimizer.zero_grad()
        part = slice(start, start + 60)
        nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
    return model.eval()


def quantized(model: nn.Module, images: Tensor) -> nn.Module:
    """Return the model in int8: prepared, calibrated on 256 images, converted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao 0.18 uses deprecated parts of torch
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        batch = {0: torch.export.Dim.DYNAMIC}
        program = torch.export.export(model, (images[:8],), dynamic_shapes=(batch,)).module()
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(program, quantizer)
        prepared(images[:256])
        return convert_pt2e(prepared)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", ["reverted", "at bn", "mixed", "compact"])
def test_an_int8_network_is_nearly_as_accurate(trained: nn.Module, network: str) -> None:
    pytest.importorskip("torchao", reason="needs torchao, which changes what transformers imports: not in `dev`")
    images, labels = digits()
    model = converted(copy.deepcopy(trained), images[:8], MIX if network in ("mixed", "compact") else None)
    if network == "reverted":
        model = normswap.revert(model)
    if network == "compact":
        model = compacted(model)
    small = quantized(model, images)
    with torch.no_grad():
        right = [float((m(images[1200:]).argmax(1) == labels[1200:]).float().mean()) for m in (model, small)]
        expected, found = model(images[1200:]), small(images[1200:])
    assert right[0] > 0.9
    assert abs(right[0] - right[1]) < 0.01
    assert (found - expected).norm() / expected.norm() < 0.05
    convolutions = [n for n in small.graph.nodes if "conv2d" in str(n.target)]
    assert len(convolutions) == 2
    assert all("dequantize" in str(n.args[0].target) and "dequantize" in str(n.args[1].target) for n in convolutions)


# --- ExecuTorch -------------------------------------------------------------------------------------------------------

NORMS = {
    1: (nn.Conv1d, nn.BatchNorm1d, (2, 3, 9)),
    2: (nn.Conv2d, nn.BatchNorm2d, (2, 3, 9, 9)),
    3: (nn.Conv3d, nn.BatchNorm3d, (2, 3, 5, 5, 5)),
}


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", NORMS)
@pytest.mark.parametrize(
    "options", [{}, {"match": False}, {"gate": "softmax"}, {"start": "gn", "num_groups": 4}], ids=str
)
def test_an_exported_program_has_operators_of_core_aten_only(dimensions: int, options: dict[str, Any]) -> None:
    """Others are refused by ExecuTorch, which is not installed here."""
    conv, norm, shape = NORMS[dimensions]
    x = torch.randn(shape)
    network = converted(nn.Sequential(conv(3, 8, 3), norm(8)).eval(), x, **options)
    for model in (network, compacted(network)):
        program = torch.export.export(model, (x,)).run_decompositions()
        operators = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
        others = {str(each) for each in operators if torch.Tag.core not in each.tags}
        assert others <= {"aten._assert_tensor_metadata.default"}  # a check of the trace, which ExecuTorch removes
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)
