"""Layers in the rest of torch: autograd, autocast, copies, compile, export."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.layers.gated_module import FunctionalSwitchNorm
from normswap.layers.gating import BRANCHES, GATES
from normswap.layers.switch_norm import SwitchNorm, SwitchNorm2d, SwitchNorm3d, SwitchNormAct2d
from tests.helpers.norm_layers import LAYER_CASES, LAYERS, mixed, trained


@LAYER_CASES
@pytest.mark.parametrize("training", [True, False])
def test_two_forwards_before_one_backward(make: Callable[[], SwitchNorm], training: bool) -> None:
    layer = mixed(trained(make()).double().train(training))  # type: ignore[arg-type]
    layer.requires_grad_()
    twin = copy.deepcopy(layer)
    a, b = torch.randn(2, 3, 4, 5, 5).double()
    (layer(a).pow(3).sum() + layer(b).pow(3).sum()).backward()
    for x in (a, b):
        twin(x).pow(3).sum().backward()
    for parameter, expected in zip(layer.parameters(), twin.parameters(), strict=True):
        assert expected.grad is not None
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-10, atol=1e-10)


@LAYER_CASES
def test_a_training_forward_between_an_evaluation_forward_and_its_backward(make: Callable[[], SwitchNorm]) -> None:
    """The training pass updates running statistics and projects gates that the first pass used."""
    layer = mixed(trained(make()).double())  # type: ignore[arg-type]
    layer.requires_grad_()
    twin = copy.deepcopy(layer).eval()
    x = torch.randn(3, 4, 5, 5).double().requires_grad_()
    y = layer.eval()(x)
    layer.train()(torch.randn(3, 4, 5, 5).double() * 9)
    grads = torch.autograd.grad(y.pow(3).sum(), [x, *layer.parameters()])
    expected = torch.autograd.grad(twin(x).pow(3).sum(), [x, *twin.parameters()])
    for grad, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, truth, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inside", [torch.bfloat16, torch.float32])
def test_autocast_gives_the_dtype_that_batch_norm_gives(inside: torch.dtype, training: bool) -> None:
    bn = trained(nn.BatchNorm2d(4)).train(training)
    sn = SwitchNorm2d.from_batch_norm(copy.deepcopy(bn), bn_statistics="batch")
    conv = nn.Conv2d(3, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        x = conv(torch.randn(2, 3, 9, 9)).to(inside).detach().requires_grad_()
        expected, y = bn(x), sn(x)
    assert y.dtype == expected.dtype == inside
    torch.testing.assert_close(y, expected, rtol=2e-2 if inside == torch.bfloat16 else 1e-5, atol=1e-2)
    y.float().pow(2).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == inside
    for parameter in sn.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert bool(parameter.grad.isfinite().all())


MEMORY_FORMATS: dict[str, tuple[type[SwitchNorm], tuple[int, ...], torch.memory_format]] = {
    "2d": (SwitchNorm2d, (2, 4, 5, 6), torch.channels_last),
    "2d, one sample": (SwitchNorm2d, (1, 4, 5, 6), torch.channels_last),
    "3d": (SwitchNorm3d, (2, 4, 3, 5, 6), torch.channels_last_3d),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sn_class", "shape", "memory_format"), MEMORY_FORMATS.values(), ids=MEMORY_FORMATS)
def test_the_memory_format_is_kept(
    sn_class: type[SwitchNorm],
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    training: bool,
) -> None:
    layer = sn_class(4).train(training)
    plain = torch.randn(shape).to(dtype)
    x = plain.clone(memory_format=memory_format).requires_grad_()
    y = layer(x)
    assert y.is_contiguous(memory_format=memory_format)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, layer(plain), rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert layer(plain).is_contiguous()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("name", ["SwitchNorm1d", "SwitchNorm2d", "SwitchNorm3d", "SwitchNormAct"])
def test_pickles_refer_to_the_public_class(name: str) -> None:
    layer = getattr(normswap, name)(4)
    assert f"normswap.{name}".encode() in pickle.dumps(layer, 0).replace(b"\n", b".")
    assert type(pickle.loads(pickle.dumps(layer))) is type(layer)


@pytest.mark.parametrize("name", ["switch_norm", "use_backend"])
def test_pickles_refer_to_the_public_function(name: str) -> None:
    assert pickle.dumps(getattr(normswap, name), 0).startswith(f"cnormswap\n{name}\n".encode())


@LAYER_CASES
def test_deepcopy_and_pickle_are_bit_identical(make: Callable[[], SwitchNorm]) -> None:
    layer = mixed(trained(make()))  # type: ignore[arg-type]
    x = torch.randn(3, 4, 5, 5)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    outputs = [layer(x), *(twin(x) for twin in copies)]
    for twin, y in zip(copies, outputs[1:], strict=True):
        assert type(twin) is type(layer)
        assert y.equal(outputs[0])
        assert twin.state_dict().keys() == layer.state_dict().keys()
        assert all(value.equal(layer.state_dict()[name]) for name, value in twin.state_dict().items())
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]
        assert repr(twin) == repr(layer)


@pytest.mark.parametrize("make", [lambda **k: SwitchNorm2d(4, **k), lambda **k: SwitchNormAct2d(4, act=nn.ReLU(), **k)])
@pytest.mark.parametrize("gate", GATES)
def test_meta_device_to_empty_and_reset_parameters(make: Callable[..., SwitchNorm], gate: str) -> None:
    layer = make(gate=gate, device="meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    for training in (True, False):
        assert layer.train(training)(torch.empty(2, 4, 5, 5, device="meta")).shape == (2, 4, 5, 5)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    fresh = make(gate=gate).state_dict()
    assert all(value.equal(fresh[name]) for name, value in layer.state_dict().items())


def test_from_batch_norm_on_the_meta_device() -> None:
    sn = SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(4, device="meta"))
    assert {t.device.type for t in sn.state_dict().values()} == {"meta"}
    for shape in ((2, 4, 5, 5), (2, 4, 1, 1), (0, 4, 5, 5)):
        assert sn(torch.empty(shape, device="meta")).shape == shape


@LAYER_CASES
def test_reset_parameters_gives_what_a_new_layer_has(make: Callable[[], SwitchNorm]) -> None:
    layer = trained(make())
    layer(torch.randn(3, 4, 5, 5))
    assert isinstance(layer, SwitchNorm)
    layer.reset_parameters()
    options: dict[str, Any] = {"gate": layer.gate, "branches": layer.branches}
    swapped = "replaced" in vars(layer)  # starts as the BatchNorm that it was
    new = SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(4), **options) if swapped else SwitchNorm2d(4, **options)
    fresh = new.state_dict()
    assert all(value.equal(fresh[name]) for name, value in layer.state_dict().items())


def test_reset_parameters_of_a_functional_site_is_its_start() -> None:
    for gate, start in (("simplex", [0.0, 0.0, 1.0]), ("softmax", [1.0, 1.0, 1.0])):
        site = FunctionalSwitchNorm(gate=gate, branches=BRANCHES)  # type: ignore[arg-type]
        assert site.mean_weight.tolist() == start
        nn.init.uniform_(site.mean_weight)
        site.reset_parameters()
        assert site.mean_weight.tolist() == site.var_weight.tolist() == start


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_per_sample_gradients_with_torch_func(gate: str, training: bool) -> None:
    layer = SwitchNorm2d(4, gate=gate, bn_statistics="running", dtype=torch.float64)  # type: ignore[arg-type]
    layer = mixed(trained(layer)).train(training)  # type: ignore[arg-type]
    state = {name: p.detach() for name, p in layer.named_parameters()}
    buffers = dict(layer.named_buffers())
    x = torch.randn(5, 4, 3, 3).double()

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        y = torch.func.functional_call(layer, (parameters, buffers), (sample[None],))
        return y.pow(3).sum()  # type: ignore[no-any-return]

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x)
    for index in range(len(x)):
        layer.zero_grad()
        layer(x[index : index + 1]).pow(3).sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(per_sample[name][index], parameter.grad, rtol=1e-10, atol=1e-10)


# torch loads its forward-mode decompositions through its own deprecated scripting compiler (2.14).
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:FutureWarning")
def test_jacobians_with_torch_func() -> None:
    layer = mixed(SwitchNorm2d(2, gate="simplex", dtype=torch.float64)).eval()
    x = torch.randn(1, 2, 2, 2).double()
    forward, backward = torch.func.jacfwd(layer)(x), torch.func.jacrev(layer)(x)
    torch.testing.assert_close(forward, backward, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@LAYER_CASES
def test_compiles_without_graph_breaks(make: Callable[[], SwitchNorm], training: bool) -> None:
    torch.compiler.reset()
    layer = mixed(trained(make()).train(training)).double()  # type: ignore[arg-type]
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for _ in range(2):
        x = torch.randn(3, 4, 5, 5).double()
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [module(leaf) for module, leaf in zip((compiled, eager), leaves, strict=True)]
        for y in outputs:
            y.pow(3).sum().backward()
        torch.testing.assert_close(outputs[0], outputs[1])
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    for (name, value), expected in zip(layer.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)
    for parameter, twin in zip(layer.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [None, 0.1])
def test_compiles_with_its_updates_of_gates_and_statistics(momentum: float | None) -> None:
    torch.compiler.reset()
    layer = SwitchNorm2d(4, momentum=momentum, gate="simplex")
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([-0.5, 0.2, 1.1]))
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(3, 4, 5, 5)
        outputs = [module(x) for module in (compiled, eager)]
        for y in outputs:
            y.pow(3).sum().backward()
        torch.testing.assert_close(outputs[0], outputs[1])
    for (name, value), expected in zip(layer.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)
    assert float(layer.mean_weight.detach().sum()) == pytest.approx(1)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_and_exports_at_one_spatial_position(training: bool) -> None:
    """A graph cannot read the weight of `in` from a tensor, so a compiled layer always warns."""
    torch.compiler.reset()
    layer = SwitchNorm2d.from_batch_norm(trained(nn.BatchNorm2d(4))).train(training)
    x = torch.randn(3, 4, 1, 1)
    expected = copy.deepcopy(layer)(x)
    with pytest.warns(UserWarning, match="got an input with one spatial position per channel"):
        torch.testing.assert_close(torch.compile(copy.deepcopy(layer), fullgraph=True, backend="eager")(x), expected)
    if not training:
        torch.testing.assert_close(torch.export.export(layer, (x,), strict=False).module()(x), expected)


@pytest.mark.slow
@LAYER_CASES
def test_exports_in_evaluation(make: Callable[[], SwitchNorm]) -> None:
    layer = mixed(trained(make()).eval())  # type: ignore[arg-type]
    batch = torch.export.Dim("batch", min=2, max=64)
    example = torch.randn(3, 4, 5, 5)
    program = torch.export.export(layer, (example,), strict=False, dynamic_shapes=({0: batch},))
    for x in (example, torch.randn(7, 4, 5, 5)):
        torch.testing.assert_close(program.module()(x), layer(x))


class _Net(nn.Module):
    """Has a norm, a norm in a child, and a call of `F.batch_norm`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(4))
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), SwitchNormAct2d.from_batch_norm(BatchNormAct2d(4)))
        self.site = FunctionalSwitchNorm(gate="simplex", branches=BRANCHES)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.site(x, self.mean, self.var)
        return self.body(self.norm(x)) + x  # type: ignore[no-any-return]


def test_a_plain_fx_trace_keeps_layers_as_leaves_that_obey_train_and_eval() -> None:
    net = _Net()
    traced = torch.fx.symbolic_trace(copy.deepcopy(net))
    functions = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]  # type: ignore[union-attr]
    assert functions.count("apply_layer") == 2
    assert functions.count("apply_site") == 1
    for graph in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        reference = copy.deepcopy(net)
        for training in (False, True, False):
            x = torch.randn(3, 4, 5, 5)
            assert graph.train(training)(x).equal(reference.train(training)(x))
            assert int(graph.get_buffer("norm.num_batches_tracked")) == int(reference.norm.num_batches_tracked)  # type: ignore[arg-type]
        for name, value in reference.state_dict().items():
            assert graph.state_dict()[name].equal(value), name


@pytest.mark.parametrize("track", [True, False])
def test_renorm_trains_on_what_evaluation_reads(track: bool) -> None:
    """Values are those of the updated statistics; without running statistics those of the batch, as in evaluation."""
    layer = mixed(SwitchNorm2d(4, gate="simplex", bn_statistics="renorm", track_running_stats=track))
    for n in (2, 1, 3):
        x = torch.randn(n, 4, 5, 5) * n + 1
        y = layer.train()(x)
        torch.testing.assert_close(y, layer.eval()(x), rtol=1e-5, atol=1e-6)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))
    assert layer.num_batches_tracked == (3 if track else None)


def test_sync_batch_norm_conversion_leaves_the_layer_alone() -> None:
    layers = [make() for make in LAYERS.values()]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(*layers, nn.BatchNorm2d(4)))
    assert all(after is before for after, before in zip(converted, layers, strict=False))
    assert type(converted[-1]) is nn.SyncBatchNorm
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers)


def test_an_average_of_the_model_keeps_kind_and_values() -> None:
    layer = mixed(SwitchNorm2d(4, gate="simplex"))
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    average.update_parameters(layer)
    x = torch.randn(3, 4, 5, 5)
    assert average.eval()(x).equal(layer.eval()(x))


def test_repr_shows_the_options() -> None:
    shown = repr(SwitchNorm2d(4, eps=0.5, momentum=None, affine=False, gate="simplex", branches=("ln", "bn")))
    assert shown == (
        "SwitchNorm2d(4, eps=0.5, momentum=None, affine=False, track_running_stats=True, gate='simplex', "
        "branches=('ln', 'bn'), bn_statistics='batch')"
    )
    assert "gate='softmax', branches=('in', 'bn')" in repr(FunctionalSwitchNorm(gate="softmax", branches=("bn", "in")))
    for make in LAYERS.values():
        assert f"{make().branches}" in repr(make())
