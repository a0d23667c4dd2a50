"""Small converted networks for the tests of exports."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import normswap
from normswap.surgery.importance import gated_modules
from tests.helpers.files import scrambled

SHAPE = (2, 3, 12, 12)


class Net(nn.Module):
    """Two sites, one of them after a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.last = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.last(self.conv(x))).mean((2, 3)))


def example() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def converted(**options: object) -> nn.Module:
    """The network with all gates at BN."""
    torch.manual_seed(0)
    model: nn.Module = normswap.convert(scrambled(Net()).eval(), example(), **options).model  # type: ignore[arg-type]
    return model.eval()


def moved(point: Sequence[float] = (0.2, 0.3, 0.5), **options: object) -> nn.Module:
    """The network with all gates at one point of the simplex."""
    return move(converted(**options), point)


def move(model: nn.Module, point: Sequence[float]) -> nn.Module:
    with torch.no_grad():
        for layer in gated_modules(model).values():
            layer.mean_weight.copy_(torch.tensor(point))
            layer.var_weight.copy_(torch.tensor(point[::-1] if sum(p > 0 for p in point) == 3 else point))
    return model
