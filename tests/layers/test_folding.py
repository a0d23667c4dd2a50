"""Folding a norm into its convolution after a conversion: correct while the layer computes BN, an error afterwards.

Some models fold their BN on request. With an unknown layer that has the attributes of BN the result is silently wrong.
"""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import normswap
from normswap.errors import LayerError

REFUSED = "can be folded as a BatchNorm only while its importance weights are those of BN: keep the layer"

# Models whose blocks fold a norm without checking its class.
SILENT_FOLDERS = ["repvit_m0_9", "levit_128s", "efficientvit_m0"]


def trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def move(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("mean_weight"):
            parameter.data[:] = (
                torch.linspace(0.2, 0.8, len(parameter)) / torch.linspace(0.2, 0.8, len(parameter)).sum()
            )


def fold(model: nn.Module) -> nn.Module:
    """Do what timm.utils.reparameterize_model does, from the leaves up."""
    for name, child in model.named_children():
        if hasattr(child, "fuse"):
            setattr(model, name, child.fuse())
        elif hasattr(child, "reparameterize"):
            child.reparameterize()
        else:
            fold(child)
    return model


def test_torch_folds_a_converted_layer_rightly_or_not_at_all() -> None:
    net = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    x = torch.randn(2, 3, 9, 9)
    converted = normswap.convert(net, x).model
    torch.testing.assert_close(fuse_conv_bn_eval(converted[0], converted[1])(x), net(x), rtol=1e-4, atol=1e-5)
    move(converted)
    with pytest.raises(LayerError, match=REFUSED):
        fuse_conv_bn_eval(converted[0], converted[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", SILENT_FOLDERS)
def test_blocks_that_fold_their_own_norm(name: str) -> None:
    model = trained(timm.create_model(name))
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    converted = normswap.convert(model, x).model
    with torch.no_grad():
        expected = model(x)
        folded = fold(copy.deepcopy(converted))(x)
    assert not torch.equal(folded, expected), "nothing was folded"
    assert (folded - expected).norm() / expected.norm() < 1e-4
    move(converted)
    with pytest.raises(LayerError, match=REFUSED):
        fold(converted)


def test_eps_can_be_set_and_shown_whatever_the_gates() -> None:
    layer = normswap.SwitchNorm2d(4, eps=1e-3)
    assert "eps=0.001" in repr(layer)
    layer.eps = 1e-2
    assert "eps=0.01" in repr(layer)
    with pytest.raises(LayerError, match=REFUSED):
        _ = layer.eps
