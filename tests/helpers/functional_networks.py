"""Networks that normalize by function, as traps: each in the shape of its public code, in our own words."""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models.resnet import BasicBlock, ResNet

from tests.helpers.zoo import NOT_TRACED, OwnTensors, Trap, conv, image

# --- a MAML learner: parameters in lists, walked by a configuration ---------------------------------------------------

FEW_SHOT: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("conv2d", (8, 3, 3, 3)),
    ("relu", ()),
    ("bn", (8,)),
    ("conv2d", (8, 8, 3, 3)),
    ("relu", ()),
    ("bn", (8,)),
    ("max_pool2d", (2,)),
    ("conv2d", (8, 8, 3, 3)),
    ("relu", ()),
    ("bn", (8,)),
    ("conv2d", (8, 8, 3, 3)),
    ("relu", ()),
    ("bn", (8,)),
    ("flatten", ()),
    ("linear", (5, 8 * 2 * 2)),
)


class Learner(nn.Module):
    """Four convolutions whose weights, and running statistics, are lists of parameters: fast weights may be given."""

    def __init__(self, config: Sequence[tuple[str, tuple[int, ...]]] = FEW_SHOT) -> None:
        super().__init__()
        self.config = config
        self.vars, self.vars_bn = nn.ParameterList(), nn.ParameterList()
        for name, sizes in config:
            if name in ("conv2d", "linear"):
                self.vars.append(nn.Parameter(torch.randn(sizes) * 0.2))
                self.vars.append(nn.Parameter(torch.randn(sizes[0]) * 0.1))
            elif name == "bn":
                self.vars.append(nn.Parameter(torch.rand(sizes) + 0.5))
                self.vars.append(nn.Parameter(torch.randn(sizes) * 0.1))
                self.vars_bn.append(nn.Parameter(torch.randn(sizes) * 0.1, requires_grad=False))
                self.vars_bn.append(nn.Parameter(torch.rand(sizes) + 0.5, requires_grad=False))

    def forward(self, x: Tensor, vars: Any = None, bn_training: bool = True) -> Tensor:  # noqa: A002
        if vars is None:
            vars = self.vars  # noqa: A001
        used = used_bn = 0
        for name, sizes in self.config:
            if name in ("conv2d", "linear"):
                layer = F.conv2d if name == "conv2d" else F.linear
                x = layer(x, vars[used], vars[used + 1])
                used += 2
            elif name == "bn":
                mean, var = self.vars_bn[used_bn], self.vars_bn[used_bn + 1]
                x = F.batch_norm(x, mean, var, weight=vars[used], bias=vars[used + 1], training=bn_training)
                used, used_bn = used + 2, used_bn + 2
            elif name == "relu":
                x = F.relu(x)
            elif name == "max_pool2d":
                x = F.max_pool2d(x, sizes[0])
            else:
                x = x.flatten(1)
        assert used == len(vars)
        assert used_bn == len(self.vars_bn)
        return x

    def parameters(self, recurse: bool = True) -> Any:
        """The list itself, as its training loop expects."""
        return self.vars


TASKS = image(4, 3, 16, 16)


def fast_weights() -> list[Tensor]:
    """Weights that an inner loop could have come to: others than the learner's own."""
    torch.manual_seed(4)
    return [parameter.detach() + 0.05 * torch.randn(parameter.shape) for parameter in Learner().vars]


# --- a class-conditional generator ------------------------------------------------------------------------------------


class ClassConditionalNorm(nn.Module):
    """Normalizes without affine parameters, then takes gain and bias from what the class is embedded in."""

    def __init__(self, channels: int, shared: int, style: str = "bn") -> None:
        super().__init__()
        self.gain, self.bias = nn.Linear(shared, channels, bias=False), nn.Linear(shared, channels, bias=False)
        self.eps, self.style = 1e-4, style
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gain = (1 + self.gain(y)).view(y.size(0), -1, 1, 1)
        bias = self.bias(y).view(y.size(0), -1, 1, 1)
        normalize = F.batch_norm if self.style == "bn" else F.instance_norm
        out = normalize(x, self.stored_mean, self.stored_var, None, None, self.training, 0.1, self.eps)
        return out * gain + bias


class UpBlock(nn.Module):
    """A residual block of the generator, which upsamples."""

    def __init__(self, inputs: int, outputs: int, shared: int, style: str) -> None:
        super().__init__()
        self.bn1, self.bn2 = ClassConditionalNorm(inputs, shared, style), ClassConditionalNorm(outputs, shared, style)
        self.conv1, self.conv2 = conv(inputs, outputs), conv(outputs, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.bn1(x, y)), scale_factor=2)
        h = self.conv2(F.relu(self.bn2(self.conv1(h), y)))
        return h + self.shortcut(F.interpolate(x, scale_factor=2))


class ConditionalGenerator(nn.Module):
    """Noise in chunks, one for each block beside the shared embedding of the class."""

    def __init__(self, style: str = "bn") -> None:
        super().__init__()
        self.shared = nn.Embedding(5, 6)
        self.linear = nn.Linear(4, 8 * 4 * 4)
        self.blocks = nn.ModuleList([UpBlock(8, 8, 10, style), UpBlock(8, 6, 10, style)])
        self.output_layer = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), conv(6, 3))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        chunks = torch.split(z, 4, 1)
        embedded = self.shared(y)
        h = self.linear(chunks[0]).view(-1, 8, 4, 4)
        for block, chunk in zip(self.blocks, chunks[1:], strict=True):
            h = block(h, torch.cat([embedded, chunk], 1))
        return torch.tanh(self.output_layer(h))


def noise_and_labels() -> tuple[Tensor, Tensor]:
    return image(3, 12)(), torch.tensor([0, 4, 2])


# --- adaptive instance norm -------------------------------------------------------------------------------------------


class AdaptiveInstanceNorm2d(nn.Module):
    """Each sample's own norm, by batch_norm on all samples' channels at once; weight and bias are put on it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.eps, self.momentum = channels, 1e-5, 0.1
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None, "assign weight and bias before calling AdaIN"
        samples, channels = x.size(0), x.size(1)
        mean, var = self.running_mean.repeat(samples), self.running_var.repeat(samples)
        folded = x.contiguous().view(1, samples * channels, *x.size()[2:])
        out = F.batch_norm(folded, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
        return out.view(samples, channels, *x.size()[2:])


class ContentEncoder(OwnTensors):
    """What the style is put on, itself normalized by function over the batch."""

    def __init__(self) -> None:
        super().__init__(8)
        self.conv = conv(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.conv(x), self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return F.relu(x)


class StyleNetwork(nn.Module):
    """Content and a style code; an MLP of the style gives each AdaIN its weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.adain, self.decoder = ContentEncoder(), AdaptiveInstanceNorm2d(8), conv(8, 3)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16))

    def forward(self, image: Tensor, style: Tensor) -> Tensor:
        bias, deviation = self.mlp(style).split(8, 1)
        self.adain.bias, self.adain.weight = bias.contiguous().view(-1), deviation.contiguous().view(-1)
        return torch.tanh(self.decoder(F.relu(self.adain(self.encoder(image)))))


class StyledBlock(nn.Module):
    """The plain form: an instance norm by function, then scale and shift from the style."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.affine = ContentEncoder(), conv(8, 3), nn.Linear(4, 16)

    def forward(self, image: Tensor, style: Tensor) -> Tensor:
        scale, shift = self.affine(style)[:, :, None, None].chunk(2, 1)
        x = F.instance_norm(self.encoder(image), eps=1e-4)
        return self.decoder(F.relu(x * (1 + scale) + shift))


class FoldedByReshape(ContentEncoder):
    """Instance norm as batch_norm on a batch of one, in code that a trace gets through."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        folded = F.batch_norm(x.reshape(1, -1, x.size(2), x.size(3)), None, None, training=True)
        return folded.reshape(x.shape)


class InstanceNormOfUntraceable(nn.Module):
    """Control flow on a value around an instance norm by function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False) if x.mean() > -100 else x


def content_and_style() -> tuple[Tensor, Tensor]:
    return image(3, 3, 9, 9)(), image(3, 4)()


# --- exported programs ------------------------------------------------------------------------------------------------


def exported_resnet(*, training: bool, decompose: bool = False) -> nn.Module:
    """torchvision's ResNet with one block in each stage, as the module of an exported program."""
    program = copy.deepcopy(_exported_resnet(training, decompose))
    torch.manual_seed(7)  # whether it was made just now or before, what is drawn next is the same
    return program


@cache
def _exported_resnet(training: bool, decompose: bool) -> fx.GraphModule:
    torch.manual_seed(11)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).train(training)
    program = torch.export.export(model, (PHOTOS(),), strict=False)
    return (program.run_decompositions() if decompose else program).module()  # type: ignore[return-value]


PHOTOS = image(2, 3, 48, 48)
RESNET_SITES = tuple(f"batch_norm_{number}" if number else "batch_norm" for number in range(12))

FOLDED = "the samples are folded into the channels, so each is normalized by itself"
UNTRACKED = r"^has no batch statistics, .*: left as it is; to swap it, use the module nn.InstanceNorm2d in place of the call"
TRACKED = r"those of each sample in training and the running ones in evaluation, which no mix of branches computes"
LEARNER_SITES = ("batch_norm", "batch_norm_1", "batch_norm_2", "batch_norm_3")


def _trap(name: str, make: Callable[[], nn.Module], inputs: Callable[[], Any], *swaps: str, **more: Any) -> Trap:
    return Trap(name, make, inputs, swaps, **more)


NETWORKS: tuple[Trap, ...] = (
    _trap("a learner on its own weights", Learner, TASKS, *LEARNER_SITES),
    _trap("a learner on fast weights", Learner, lambda: (TASKS(), fast_weights()), *LEARNER_SITES),
    _trap(
        "a learner in evaluation",
        Learner,
        lambda: {"x": TASKS(), "vars": None, "bn_training": False},
        *LEARNER_SITES,
    ),
    _trap(
        "a conditional generator",
        ConditionalGenerator,
        noise_and_labels,
        *(f"blocks.{block}.bn{norm}.batch_norm" for block in (0, 1) for norm in (1, 2)),
        "output_layer.0",
    ),
    _trap(
        "a conditional generator of instance norms",
        lambda: ConditionalGenerator("in"),
        noise_and_labels,
        "output_layer.0",
        skips={f"blocks.{block}.bn{norm}.instance_norm": TRACKED for block in (0, 1) for norm in (1, 2)},
    ),
    _trap(
        "AdaIN by batch_norm",
        StyleNetwork,
        content_and_style,
        "encoder.batch_norm",
        skips={"adain.batch_norm": FOLDED},
        blind=(("encoder.batch_norm",), {"adain.batch_norm": NOT_TRACED}),
    ),
    _trap(
        "AdaIN by instance_norm",
        StyledBlock,
        content_and_style,
        "encoder.batch_norm",
        skips={"instance_norm": UNTRACKED},
    ),
    _trap("folded by a reshape", FoldedByReshape, image(3, 3, 9, 9), "batch_norm", skips={"batch_norm_1": FOLDED}),
    _trap(
        "instance_norm in control flow",
        InstanceNormOfUntraceable,
        image(3, 3, 9, 9),
        "bn",
        skips={"instance_norm": UNTRACKED},
    ),
    *(
        _trap(
            f"a ResNet exported in {mode}{', decomposed' * decompose}",
            lambda mode=mode, decompose=decompose: exported_resnet(training=mode == "training", decompose=decompose),
            PHOTOS,
            *RESNET_SITES,
            # Its running statistics are copied over while the backward pass still needs them, in torch's own operators.
            raises_in=("evaluation", "training", "as it is") if decompose and mode == "training" else (),
        )
        for mode in ("evaluation", "training")
        for decompose in (False, True)
    ),
)
