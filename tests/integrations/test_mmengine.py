"""SN in mmengine's registry; with mmcv, in its networks."""

from typing import Any

import pytest
import torch
from torch import nn

import normswap

registry = pytest.importorskip("mmengine.registry", reason="needs mmengine")
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of mmengine
LAYERS = {"SN": (normswap.SwitchNorm2d, 2), "SN1d": (normswap.SwitchNorm1d, 1), "SN2d": (normswap.SwitchNorm2d, 2),
          "SN3d": (normswap.SwitchNorm3d, 3)}  # fmt: skip


@pytest.fixture(autouse=True)
def _registered() -> None:
    from mmengine.utils import import_modules_from_strings

    import_modules_from_strings(["normswap.integrations.mmengine"])  # as `custom_imports` of a config does


@pytest.mark.parametrize("name", LAYERS)
def test_a_config_builds_layers(name: str) -> None:
    kind, dimensions = LAYERS[name]
    layer = registry.MODELS.build({"type": name, "num_features": 4, "gate": "simplex", "branches": ("in", "bn")})
    assert type(layer) is kind
    assert (layer.gate, layer.branches) == ("simplex", ("in", "bn"))
    assert layer(torch.randn(2, 4, *[5] * dimensions)).shape == (2, 4, *[5] * dimensions)


def test_the_registry_has_nothing_else_of_these_names() -> None:
    assert {name: registry.MODELS.get(name) for name in LAYERS} == {name: kind for name, (kind, _) in LAYERS.items()}


def test_gates_get_options_of_their_own_by_name() -> None:
    from mmengine.optim import build_optim_wrapper

    model = nn.Sequential(nn.Conv2d(3, 4, 3), registry.MODELS.build({"type": "SN", "num_features": 4}))
    gates = {"lr_mult": 0.1, "decay_mult": 0.0}
    config = {
        "type": "OptimWrapper",
        "optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 1e-4},
        "paramwise_cfg": {"custom_keys": {"mean_weight": gates, "var_weight": gates}},
    }
    optimizer = build_optim_wrapper(model, config).optimizer
    found = {id(group["params"][0]): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    for name, parameter in model.named_parameters():
        is_gate = name in normswap.trainable_gates(model)
        assert found[id(parameter)] == ((pytest.approx(0.01), 0.0) if is_gate else (0.1, 1e-4))


class TestWithMmcv:
    @pytest.fixture
    def cnn(self) -> Any:
        return pytest.importorskip("mmcv.cnn", reason="needs mmcv or mmcv-lite")

    def test_layers_have_the_names_of_bn(self, cnn: Any) -> None:
        name, layer = cnn.build_norm_layer({"type": "SN"}, 8, postfix=1)
        assert (name, type(layer)) == ("bn1", normswap.SwitchNorm2d)

    def test_a_block_with_sn_loads_the_weights_of_one_with_bn(self, cnn: Any) -> None:
        blocks = [cnn.ConvModule(3, 8, 3, norm_cfg={"type": kind}) for kind in ("BN", "SN")]
        result = blocks[1].load_state_dict(blocks[0].state_dict(), strict=False)
        assert result.unexpected_keys == []
        assert result.missing_keys == ["bn.mean_weight", "bn.var_weight"]
        blocks[1](torch.randn(2, 3, 8, 8)).sum().backward()
        assert all(parameter.grad is not None for parameter in blocks[1].parameters())
