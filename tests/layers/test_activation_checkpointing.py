"""Activation checkpointing: a recomputation updates no running statistics and reads the values of the first pass."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap import SwitchNorm2d, switch_norm
from normswap.layers.gating import BN_STATISTICS
from tests.helpers import zoo

Run = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
CHECKPOINTS: dict[str, Run] = {
    "reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=True),
    "by hooks": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
}
every_checkpoint = pytest.mark.parametrize("run", CHECKPOINTS.values(), ids=CHECKPOINTS)
every_mode = pytest.mark.parametrize("mode", BN_STATISTICS)


def layer_in(mode: str, momentum: float | None = 0.1) -> SwitchNorm2d:
    torch.manual_seed(2)
    layer = SwitchNorm2d(4, gate="simplex", momentum=momentum, bn_statistics=mode, dtype=torch.float64)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.mean_weight.copy_(torch.tensor([0.2, 0.5, 0.3]))
        layer.var_weight.copy_(torch.tensor([0.6, 0.1, 0.3]))
    return layer


def batch(samples: int = 3) -> Tensor:
    return (torch.randn(samples, 4, 5, 5).double() + 1).requires_grad_()


def assert_alike(first: nn.Module, second: nn.Module, x: Tensor, twin: Tensor, *, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=tolerance, atol=tolerance)
    pairs = [(x, twin), *zip(first.parameters(), second.parameters(), strict=True)]
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)


@every_checkpoint
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("momentum", [0.1, None])
@every_mode
def test_a_layer_computes_the_same_as_without(mode: str, momentum: float | None, backend: str, run: Run) -> None:
    layer, x = layer_in(mode, momentum), batch()
    without, twin = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    with normswap.use_backend(backend):
        for _ in range(2):
            for y in (run(layer, x), without(twin)):
                y.pow(3).sum().backward()
    assert layer.num_batches_tracked == (0 if mode == "running" else 2)
    assert_alike(layer, without, x, twin)


@every_checkpoint
@every_mode
def test_a_functional_site_computes_the_same_as_without(mode: str, run: Run) -> None:
    torch.manual_seed(5)
    block = normswap.convert(zoo.randomise(zoo.FunctionalBlock()), bn_statistics=mode).model.double().train()  # type: ignore[arg-type]
    without, x = copy.deepcopy(block), torch.randn(2, 3, 6, 6).double().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    for y in (run(block, x), without(twin)):
        y.pow(3).sum().backward()
    assert_alike(block, without, x, twin)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["checkpoint in the graph", "graph in the checkpoint"])
def test_a_compiled_layer_updates_its_statistics_once(where: str) -> None:
    layer, x = layer_in("renorm"), batch()
    without, twin = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    torch.compiler.reset()
    run, options = CHECKPOINTS["by hooks"], {"backend": "aot_eager", "fullgraph": True}
    if where == "checkpoint in the graph":
        y = torch.compile(lambda x: run(layer, x), **options)(x)  # type: ignore[call-overload]
    else:
        y = run(torch.compile(layer, **options), x)  # type: ignore[call-overload]
    for value in (y, without(twin)):
        value.pow(3).sum().backward()
    assert_alike(layer, without, x, twin, tolerance=1e-9)


@every_checkpoint
def test_an_empty_batch_is_counted_once(run: Run) -> None:
    layer = layer_in("batch")
    run(layer, batch(0)).sum().backward()
    assert layer.num_batches_tracked == 1


def test_a_recomputation_reads_statistics_updated_in_between() -> None:
    """A known limit: after two forward passes, the recomputation of the first uses the statistics of the second."""
    layer, x = layer_in("renorm"), batch()
    y = checkpoint(layer, x, use_reentrant=False)
    layer(batch())
    running = {"running_mean": layer.running_mean.clone(), "running_var": layer.running_var.clone()}  # type: ignore[union-attr]
    y.pow(3).sum().backward()
    fixed = x.detach().clone().requires_grad_()
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    again = switch_norm(
        fixed, **weights, **running, training=True, momentum=0.0, gate="simplex", bn_statistics="renorm"
    )
    again.backward(3 * y.detach() ** 2)
    torch.testing.assert_close(x.grad, fixed.grad, rtol=1e-12, atol=1e-12)


def test_verification_of_a_model_with_checkpointing_equals_that_without() -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]

    torch.manual_seed(5)
    original = zoo.randomise(Checkpointed(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    x = torch.randn(2, 3, 8, 8)
    conversion = normswap.convert(original, x)
    assert len(conversion.plan.swaps) == 1
    proof = normswap.verify(original, conversion.model, [x])
    assert proof.passed
    assert all(check.passed for check in proof.checks)
