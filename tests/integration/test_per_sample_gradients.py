"""With running statistics nothing depends on the batch: outputs and gradients of each sample are its own."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torchvision.models import resnet18

import normswap
from normswap.errors import LayerError
from normswap.layers.gated_module import GatedModule
from tests.helpers import zoo

IMAGES, LABELS = zoo.image(3, 3, 64, 64)().double(), torch.tensor([1, 0, 3])
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": lambda: resnet18(num_classes=4),
    "EfficientNet": lambda: timm.create_model("efficientnet_lite0", num_classes=4),
    "functional": lambda: zoo.Chain(zoo.FunctionalBlock(8, 8), zoo.bn()),
}
pytestmark = pytest.mark.slow


def converted(
    make: Callable[[], nn.Module], *, weights: tuple[float, float, float] | None, **options: Any
) -> nn.Module:
    """A converted network in training, whose sites mix all branches with these importance weights."""
    torch.manual_seed(11)
    model = normswap.convert(zoo.randomise(make()), IMAGES.float(), **options).model.double().train()
    for layer in model.modules():
        if isinstance(layer, GatedModule) and weights is not None and len(layer.branches) == 3:
            layer.mean_weight.data, layer.var_weight.data = (torch.tensor(w).double() for w in (weights, weights[::-1]))
    return model


def loss_of(model: nn.Module, parameters: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
    buffers = dict(model.named_buffers())
    return F.cross_entropy(functional_call(model, {**parameters, **buffers}, (x[None],)), label[None])


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    ours, theirs = (torch.cat([tensors[name].flatten() for name in expected]) for tensors in (found, expected))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("weights", [None, (0.2, 0.3, 0.5)], ids=["at the vertex", "mixed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_per_sample_gradients_are_those_of_each_sample_alone(name: str, weights: Any) -> None:
    model = converted(NETWORKS[name], weights=weights)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    together = vmap(grad(lambda p, x, y: loss_of(model, p, x, y)), in_dims=(None, 0, 0))(parameters, IMAGES, LABELS)
    for index, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        model.zero_grad()
        F.cross_entropy(model(image[None]), label[None]).backward()
        alone = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}
        assert distance({key: value[index] for key, value in together.items()}, alone) <= 1e-9
    model.zero_grad()
    F.cross_entropy(model(IMAGES), LABELS).backward()
    of_the_batch = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}
    assert distance({key: value.mean(0) for key, value in together.items()}, of_the_batch) <= 1e-9
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_an_output_does_not_depend_on_the_other_samples(name: str) -> None:
    model = converted(NETWORKS[name], weights=(0.2, 0.3, 0.5))
    outputs = model(IMAGES)
    for index in range(len(IMAGES)):
        torch.testing.assert_close(outputs[index], model(IMAGES[index : index + 1])[0], rtol=1e-10, atol=1e-10)
    batch = converted(NETWORKS[name], weights=(0.2, 0.3, 0.5), bn_statistics="batch")
    assert not torch.allclose(batch(IMAGES)[0], batch(IMAGES[:2])[0], rtol=1e-3)


def test_with_batch_statistics_there_are_no_per_sample_gradients() -> None:
    model = converted(NETWORKS["ResNet"], weights=None, bn_statistics="batch")
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    with pytest.raises(LayerError, match="running statistics"):
        vmap(grad(lambda p, x, y: loss_of(model, p, x, y)), in_dims=(None, 0, 0))(parameters, IMAGES, LABELS)
