"""Networks and per-sample gradients for the tests with Opacus. The oracle runs one sample at a time."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.utils import prepare_module
from torch import Tensor, nn

import normswap

Loss = Callable[[Tensor], Tensor]


def small_network(*, norm: nn.Module | None = None) -> nn.Sequential:
    """Return a network with a BN whose statistics are not those of a new layer."""
    norm = nn.BatchNorm2d(6) if norm is None else norm
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), norm, nn.ReLU(inplace=True), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(24, 4)
    )
    return randomize(model)


def randomize(model: Any) -> Any:
    """Give each norm random statistics and affine parameters, in place."""
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if name in ("running_mean", "bias"):
                tensor.data.normal_()
            elif name == "running_var" or (name == "weight" and tensor.dim() == 1):
                tensor.data.uniform_(0.5, 1.5)
    return model


def convert(model: nn.Module, inputs: Tensor, **options: Any) -> nn.Module:
    """Return the converted model in float64 and in training, with gates inside the simplex."""
    converted = normswap.convert(model.eval(), inputs, **options).model.double().train()
    spread_gates(converted)
    return converted


def spread_gates(model: nn.Module) -> None:
    """Give each gate a random point with weight on all branches."""
    with torch.no_grad():
        for gate in normswap.trainable_gates(model).values():
            gate.copy_(torch.rand_like(gate).add(0.2))
            gate.div_(gate.sum())


def square_loss(outputs: Tensor) -> Tensor:
    """Return a mean over samples that weights every output differently."""
    factors = torch.linspace(0.5, 2, outputs[0].numel(), dtype=outputs.dtype).reshape(outputs.shape[1:])
    return (outputs * factors).square().flatten(1).sum(1).mean()


def one_by_one(model: nn.Module, inputs: Tensor, loss: Loss = square_loss) -> dict[str, Tensor]:
    """Return the gradients (N, *shape) of all trainable parameters by N passes of one sample."""
    found: dict[str, list[Tensor]] = {}
    for sample in inputs:
        model.zero_grad()
        loss(model(sample[None])).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                found.setdefault(name, []).append(parameter.grad.clone())
    model.zero_grad()
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def by_opacus(model: nn.Module, inputs: Tensor, *, mode: str = "hooks", loss: Loss = square_loss) -> dict[str, Tensor]:
    """Return the gradients (N, *shape) of all trainable parameters as Opacus finds them; the model stays unwrapped."""
    private: Any = prepare_module(model, grad_sample_mode=mode)
    assert isinstance(private, GradSampleModule)
    loss(private(inputs)).backward()
    found = {name: parameter.grad_sample for name, parameter in model.named_parameters() if parameter.requires_grad}
    private.to_standard_module()
    model.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    """Compare gradients of each parameter by their relative L2 error."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm() / gradient.norm().clamp_min(1e-12))
        assert error < tolerance, (name, error)


def cross_entropy(outputs: Tensor) -> Tensor:
    """Return the loss for the class 1 of every sample."""
    return F.cross_entropy(outputs, torch.ones(len(outputs), dtype=torch.long))
