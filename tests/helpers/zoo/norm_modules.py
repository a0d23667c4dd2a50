"""Norms as modules, in places that a converter may miss."""

from collections import namedtuple
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.zoo.trap import Chain, bn, conv


class TwoNames(nn.Module):
    """One BN under two names, each called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        self.alias, self.second = self.bn, conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.second(F.relu(self.bn(self.conv(x)))))


class SharedBlock(nn.Module):
    """A whole block in two places."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = conv()
        self.left = block
        self.right = nn.Sequential(block, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(self.stem(x)))


class InContainers(nn.Module):
    """Norms held in a plain list and a plain dict only: in no state dict, but they run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.norms = [bn()]
        self.table = {"last": {"norm": bn()}}

    def forward(self, x: Tensor) -> Tensor:
        return self.table["last"]["norm"](F.relu(self.norms[0](self.conv(x))))


class ListBeside(nn.Module):
    """Registered norms that are also called through a plain list and a closure-like dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = conv(), bn(), bn()
        self.order = [self.bn1, self.bn2]
        self.by_name = {"first": self.bn1}

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for norm in (*self.order, self.by_name["first"]):
            x = norm(F.relu(x))
        return x


class AfterPooling(nn.Module):
    """One position per sample, with `channels` channels, beside an ordinary site."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = conv(3, channels), bn(channels)
        self.pool, self.pooled = nn.AdaptiveAvgPool2d(1), bn(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.pool(F.relu(self.bn(self.conv(x)))))


class Recurrent(nn.Module):
    """One norm called several times in a forward pass, at different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.bn = conv(), conv(8, 8), bn()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2, ceil_mode=True)
        return x


class NeverCalled(nn.Module):
    """A norm that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.unused = conv(), bn(), bn()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Hooked(nn.Module):
    """Hooks of every kind on a norm, each changing what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = conv(), bn(), conv(8, 8)
        self.bn.register_forward_pre_hook(_shift_input)
        self.bn.register_forward_hook(double_output)
        self.bn.register_full_backward_hook(_halve_gradient)
        self.bn.register_state_dict_post_hook(_sign_state_dict)
        self.bn.register_load_state_dict_post_hook(_allow_anything)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.bn(self.conv(x))))


def _shift_input(_module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    return args[0] + 0.5


def double_output(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output * 2


def _halve_gradient(_module: nn.Module, grad_input: tuple[Tensor | None, ...], _grad: Any) -> Any:
    return tuple(None if gradient is None else gradient / 2 for gradient in grad_input)


def _sign_state_dict(_module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    state_dict[prefix + "signature"] = torch.tensor(42)


def _allow_anything(_module: nn.Module, incompatible: Any) -> None:
    incompatible.unexpected_keys.clear()


class HalfFrozen(nn.Module):
    """A frozen stem in evaluation inside a model in training, as in every detector."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(), bn(), nn.ReLU())
        self.body = nn.Sequential(conv(8, 8), bn())
        self.stem.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))


def untracked_later() -> nn.Module:
    """The trick of test-time adaptation: a trained BN that stops tracking."""
    model = Chain(bn())
    model[1].track_running_stats = False
    return model


def statistics_dropped() -> nn.Module:
    """The stronger form of it: the statistics are gone as well."""
    model = untracked_later()
    model[1].running_mean = None
    model[1].running_var = None
    return model


def evaluated_norm() -> nn.Module:
    model = Chain(bn())
    model[1].eval()
    return model


def frozen_norm() -> nn.Module:
    model = Chain(bn())
    model[1].requires_grad_(False)
    return model


class Heads(nn.Module):
    """(N, C) and (N, C, L) at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence, self.norm_sequence = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)
        self.head, self.norm_head, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm_sequence(self.sequence(x))).mean(-1)
        return self.last(F.relu(self.norm_head(self.head(x))))


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class TheirNorm(nn.BatchNorm2d):
    """An unknown subclass that does no more than its base class."""


class DoublingNorm(nn.BatchNorm2d):
    """An unknown subclass that does more than its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class ActivatedNorm(nn.BatchNorm2d):
    """An unknown subclass with an activation inside, which a caller wrongly says to be a plain BN."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.activation = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


class TheirInstanceNorm(nn.InstanceNorm2d):
    """A subclass that may do anything."""


class TheirGroupNorm(nn.GroupNorm):
    """The same of GroupNorm."""


class WithoutBatch(nn.Module):
    """An InstanceNorm that is fed one image at a time, as (C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.InstanceNorm2d(8, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.norm(single) for single in self.conv(x)])


class Sequences(nn.Module):
    """Norms over (N, C, L) and (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.instance, self.group, self.flat = nn.InstanceNorm1d(3, affine=True), nn.GroupNorm(1, 3), nn.GroupNorm(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.group(self.instance(x)).mean(2))


class Stylised(nn.Module):
    """BN and InstanceNorm side by side, as IBN blocks have them, and a GroupNorm called twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.instance = conv(), bn(4), nn.InstanceNorm2d(4, affine=True)
        self.group = self.again = nn.GroupNorm(1, 8, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv(x).chunk(2, 1)
        return self.again(F.relu(self.group(torch.cat([self.bn(left), self.instance(right)], 1))))


class ConvNormAct(nn.Module):
    """A container that is named like a norm and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.scale = conv(8, 8), bn(), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x))) * self.scale


class OtherNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()
        self.group, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.layer, self.rms = nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.instance(self.group(self.bn(self.conv(x))))
        return self.rms(self.layer(F.relu(x).mean((2, 3))))


class DictInput(nn.Module):
    """One positional argument that is a dict, and a dict of nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        x = self.bn(self.conv(batch["image"]))
        return {"logits": x.mean((2, 3)), "rest": (x, [batch["label"]]), "count": len(batch)}


Pair = namedtuple("Pair", "a b")


class KeywordInput(nn.Module):
    """Keyword arguments, and a named tuple as output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, *, left: Tensor, right: Tensor) -> Pair:
        return Pair(self.bn(self.conv(left)), self.bn(self.conv(right)).mean())
