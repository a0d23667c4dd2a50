"""Layers under `torch.func`: per-sample gradients, and errors if training has to update running statistics."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

import normswap
from normswap.errors import LayerError

UNMAPPED = (
    "torch.func.vmap maps the input but not the running statistics that training updates in place: call "
    r'normswap.set_bn_statistics\(model, "running"\) or model.eval\(\) first'
)
NOT_GIVEN = (
    "training updates running statistics in place, and the function that torch.func differentiates does not take "
    r'them as an argument: pass the buffers as an argument, or call normswap.set_bn_statistics\(model, "running"\) '
    r"or model.eval\(\) first"
)


class Functional(nn.Module):
    """A functional site."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.var, training=self.training)


@pytest.fixture(params=["module", "functional"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    norm = nn.BatchNorm2d(4) if request.param == "module" else Functional()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()
    return normswap.convert(net, torch.randn(2, 3, 6, 6), bn_statistics="batch").model.train()


X = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def losses(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], Callable[[Any, Any, Tensor], Tensor]]:
    def loss(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return functional_call(model, (parameters, buffers), (x,)).square().sum()  # type: ignore[no-any-return]

    return dict(model.named_parameters()), dict(model.named_buffers()), loss


@pytest.mark.parametrize("mode", ["batch", "renorm"])
def test_mapping_samples_over_batch_statistics_is_refused_in_one_sentence(model: nn.Module, mode: Any) -> None:
    normswap.set_bn_statistics(model, mode)
    parameters, buffers, loss = losses(model)
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    for call in (
        lambda: vmap(lambda x: model(x[None]))(X),
        lambda: vmap(lambda x: loss(parameters, buffers, x[None]))(X),
        lambda: vmap(lambda x: grad(loss)(parameters, buffers, x[None]))(X),
        lambda: vmap(vmap(lambda x: model(x[None])))(X[None]),
    ):
        with pytest.raises(LayerError, match=f"^{UNMAPPED}$"):
            call()
    assert all(buffer.equal(before[name]) for name, buffer in buffers.items())


def test_a_derivative_without_the_buffers_as_arguments_is_refused_in_one_sentence(model: nn.Module) -> None:
    parameters, buffers, loss = losses(model)
    with pytest.raises(LayerError, match=f"^{NOT_GIVEN}$"):
        grad(lambda p: loss(p, buffers, X))(parameters)
    with pytest.raises(LayerError, match=f"^{UNMAPPED}$"):
        vmap(lambda x: grad(lambda p: loss(p, buffers, x[None]))(parameters))(X)


@pytest.mark.parametrize("mode", ["running", "evaluation"])
def test_per_sample_gradients_add_up_to_the_gradient_of_the_batch(model: nn.Module, mode: str) -> None:
    if mode == "running":
        normswap.set_bn_statistics(model, "running")
    model.train(mode == "running")
    parameters, buffers, loss = losses(model)
    each = vmap(lambda x: grad(loss)(parameters, buffers, x[None]))(X)
    expected = torch.autograd.grad(sum(loss(parameters, buffers, x[None]) for x in X), [*parameters.values()])
    for name, gradient in zip(parameters, expected, strict=True):
        assert each[name].shape == (5, *gradient.shape)
        torch.testing.assert_close(each[name].sum(0), gradient, rtol=1e-4, atol=1e-5)


def test_a_derivative_with_the_buffers_as_arguments_updates_them(model: nn.Module) -> None:
    parameters, buffers, loss = losses(model)
    copies = {name: buffer.clone() for name, buffer in buffers.items()}
    found = grad(loss)(parameters, copies, X)
    jacobian = jacrev(loss)(parameters, {name: buffer.clone() for name, buffer in buffers.items()}, X)
    expected = dict(
        zip(parameters, torch.autograd.grad(loss(parameters, buffers, X), [*parameters.values()]), strict=True)
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(jacobian[name], gradient, rtol=1e-4, atol=1e-5)
    assert all(torch.allclose(copies[name], buffer) for name, buffer in buffers.items())
    assert not torch.allclose(copies["1.running_mean" if "1.running_mean" in copies else "1.mean"], torch.zeros(4))


def test_an_ensemble_with_statistics_of_its_own_trains_on_the_batch(model: nn.Module) -> None:
    parameters, buffers = stack_module_state([model, model])  # type: ignore[arg-type]
    vmap(lambda p, b: functional_call(model, (p, b), (X,)))(parameters, buffers)
    model(X)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffers[name][1], buffer)


def test_points_off_the_simplex_are_no_obstacle_to_a_derivative_by_the_input() -> None:
    """Training projects points in place, which a derivative forbids for tensors that are not its arguments."""
    layer = normswap.SwitchNorm2d.from_batch_norm(nn.BatchNorm2d(4), bn_statistics="running")
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.5, 0.4, 0.6]))
    x = torch.randn(2, 4, 3, 3)
    found = grad(lambda given: layer(given).pow(3).sum())(x)
    each = vmap(grad(lambda given: layer(given[None]).pow(3).sum()))(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(leaf).pow(3).sum(), leaf)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(each, expected)
