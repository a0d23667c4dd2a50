"""Norms under names that nobody registered: found by what they keep and how they are called, with a true reason."""

import re
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from rich.console import Console
from torch import Tensor, nn

from normswap import convert, plan_swaps
from normswap.reports.tables import plan_summary, site_table
from normswap.surgery.discovery.sites import find_norm_sites
from normswap.surgery.norms.classes import looks_like_norm, read_norm, running_statistics_names


def norm_class(name: str, base: type[nn.Module] = nn.Module, *, affine: bool = True, **buffers: Tensor) -> nn.Module:
    """A module of a class of this name that keeps `buffers`, of the module `their.lib`."""

    def build(self: nn.Module) -> None:
        base.__init__(self, *((8,) if base is not nn.Module else ()))
        if affine and base is nn.Module:
            self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        for key, value in buffers.items():
            self.register_buffer(key, value)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return x

    cls = type(name, (base,), {"__init__": build, "forward": forward, "__module__": "their.lib"})
    return cls()


ONES = torch.ones(8)
OWN_STATISTICS: dict[str, Callable[[], nn.Module]] = {
    "ra_mean, ra_var": lambda: norm_class("BatchRenorm1d", ra_mean=ONES, ra_var=ONES),
    "moving_mean, moving_variance": lambda: norm_class("Renormalization", moving_mean=ONES, moving_variance=ONES),
    "moving_mean, moving_var": lambda: norm_class("BatchNorm2d", nn.BatchNorm2d, moving_mean=ONES, moving_var=ONES),
    "running_covar": lambda: norm_class("ComplexBatchNorm2d", nn.BatchNorm2d, running_covar=torch.ones(8, 3)),
    "running_wm": lambda: norm_class("IterNorm", running_mean=ONES, running_wm=torch.eye(8)),
    "ema_mean, ema_std": lambda: norm_class("Whitener", ema_mean=ONES, ema_std=ONES),
    "running_abs_mean": lambda: norm_class("PowerScale", affine=False, running_abs_mean=ONES),
    "mean, var": lambda: norm_class("MyBN", mean=ONES, var=ONES),
    "running_var": lambda: norm_class("EvoNormB0", running_var=ONES),
}
CALLED_BATCH_NORM = ("BatchNorm2d", "BatchRenorm1d", "BN", "MyBN2d", "InPlaceABN", "batch_norm_relu")


@pytest.mark.parametrize("names", OWN_STATISTICS)
def test_statistics_under_own_names_are_found_and_not_denied(names: str) -> None:
    norm = OWN_STATISTICS[names]()
    plan = convert(nn.Sequential(nn.Linear(4, 8), norm), torch.randn(5, 4)).plan
    assert [(skip.fqn, skip.class_name) for skip in plan.skips] == [("1", f"their.lib.{type(norm).__name__}")]
    reason = plan.skips[0].reason
    assert re.search(
        rf"^their.lib.{type(norm).__name__} has running statistics under other names .*\b{names}\)", reason
    ), reason
    assert "rename them to running_mean and running_var and pass norms=KNOWN_NORMS |" in reason
    assert "no batch statistics to lose" not in reason


@pytest.mark.parametrize("name", CALLED_BATCH_NORM)
def test_a_class_that_is_called_batch_norm_is_not_reported_to_have_no_batch_statistics(name: str) -> None:
    spec = read_norm(norm_class(name))
    assert spec is not None
    assert spec.problem is not None
    assert spec.problem.startswith(f"their.lib.{name} is not in the table of known norms, and its forward may do more")
    assert f'norms=KNOWN_NORMS | {{"their.lib.{name}": read_batch_norm}}' in spec.problem


@pytest.mark.parametrize("name", ["Renorm2d", "layernorm", "my_norm", "ActNorm", "FilterResponseNorm"])
def test_a_class_that_is_called_a_norm_is_listed(name: str) -> None:
    assert looks_like_norm(norm_class(name))


@pytest.mark.parametrize("name", ["Attention", "NormFreeBlock", "BNNLinear", "NormalDistribution", "Embedding"])
def test_other_classes_are_not_listed(name: str) -> None:
    assert not looks_like_norm(norm_class(name))
    assert read_norm(norm_class(name)) is None


def test_constants_of_a_preprocessing_are_no_statistics() -> None:
    module = norm_class("Preprocess", affine=False, mean=ONES, std=ONES)
    assert running_statistics_names(module) == ()
    assert read_norm(module) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mobilevit_xxs", "maxvit_pico_rw_256", "coat_tiny"]
    + ["dm_nfnet_f0", "resnet10t", "xcit_nano_12_p16_224", "levit_128s", "mixer_s32_224", "sequencer2d_s"],
)
def test_nothing_else_in_the_zoo_is_taken_for_a_norm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    unknown = {skip.class_name for skip in plan_swaps(model).skips if skip.kind == "other"}
    assert all(re.search(r"Norm(?!Free)", name) for name in unknown), unknown


def test_detection_models_have_no_unknown_norms() -> None:
    with torch.device("meta"):
        model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
    assert not [skip for skip in plan_swaps(model).skips if skip.kind == "other"]


def test_tables_name_the_class_of_a_skip_with_its_module() -> None:
    model = nn.Sequential(nn.Linear(4, 8), norm_class("BatchNorm2d"), nn.LayerNorm(8))
    plan = plan_swaps(model)
    sites = find_norm_sites(model)
    for table in (plan_summary(plan), site_table(sites, plan)):
        console = Console(width=200, record=True)
        console.print(table)
        text = console.export_text()
        assert "their.lib.BatchNorm2d" in text
        assert "LayerNorm" in text
