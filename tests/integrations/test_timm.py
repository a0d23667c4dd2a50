"""timm's models built with SN: the same as the models with BN whose norms are replaced afterwards."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import normswap
from normswap.integrations.timm import norm_act_layer, timm_norm_layer
from normswap.surgery.importance import gated_modules

# A model of each way in which timm passes norms to its layers, with the number of norms that it makes with them.
MODELS = {
    "resnet10t": 14,
    "resnext26ts": 31,
    "resnetv2_18": 17,
    "efficientnet_b0": 49,
    "mobilenetv2_100": 52,
    "mnasnet_small": 46,
    "regnetx_002": 44,
    "regnety_002": 44,
    "densenet121": 121,
    "cspresnet50": 55,
    "ese_vovnet19b_dw": 23,
    "mobilevit_xxs": 32,
    "repvgg_a0": 61,
}
# That make some of their norms of a fixed class.
PARTLY = {"skresnet18": ("BatchNorm2d", 8), "dpn48b": ("BatchNormAct2d", 52)}
# That accept no norm_layer, or only some of whose arguments go with it.
REFUSING = ["mobilenetv3_small_100", "ghostnet_100", "tf_efficientnetv2_b0"]
AFTERWARDS: dict[str, Any] = {"gate": "softmax", "bn_statistics": "batch", "match": False}


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def new_model(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options).train()


def outputs_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the outputs of a step in training mode, and the gradients of all parameters by name."""
    torch.manual_seed(1)  # of dropout
    y = model(images())
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*one spatial position")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_one_whose_norms_are_replaced_afterwards(name: str) -> None:
    built = new_model(name, norm_layer=timm_norm_layer())
    replaced = normswap.convert(new_model(name), **AFTERWARDS).model
    assert len(gated_modules(built)) == MODELS[name]
    assert [*built.state_dict()] == [*replaced.state_dict()]
    replaced.load_state_dict(built.state_dict())
    (y, gradients), (expected, expected_gradients) = (outputs_and_gradients(each) for each in (built, replaced))
    torch.testing.assert_close(y, expected)
    assert gradients.keys() == expected_gradients.keys() == dict(built.named_parameters()).keys()
    scale = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient / scale, expected_gradients[key] / scale, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(built.eval()(images()), replaced.eval()(images()))


def test_initial_weights_are_those_of_the_model_with_bn() -> None:
    built, plain = new_model("resnet10t", norm_layer=timm_norm_layer()), new_model("resnet10t")
    assert {*plain.state_dict()} < {*built.state_dict()}
    assert all(torch.equal(built.state_dict()[key], value) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("name", PARTLY)
def test_norms_of_a_fixed_class_stay_and_can_be_converted(name: str) -> None:
    model = new_model(name, norm_layer=timm_norm_layer())
    kind, count = PARTLY[name]
    assert sum(type(module).__name__ == kind for module in model.modules()) == count
    assert len(normswap.convert(model, **AFTERWARDS).replaced) == count


@pytest.mark.parametrize("name", REFUSING)
def test_a_model_without_norm_layer_is_converted_after_it_is_built(name: str) -> None:
    with pytest.raises(TypeError):
        new_model(name, norm_layer=timm_norm_layer())
    model = normswap.convert(new_model(name), **AFTERWARDS).model
    assert {layer.gate for layer in gated_modules(model).values()} == {"softmax"}


@pytest.mark.filterwarnings("ignore:.*one spatial position")
def test_convnext_needs_convolutions_in_its_blocks() -> None:
    model = new_model("convnext_atto", norm_layer=timm_norm_layer(), conv_mlp=True)
    y, _ = outputs_and_gradients(model)
    assert y.shape == (2, 5)
    assert len(gated_modules(model)) == 17
    with pytest.raises(AssertionError, match="conv MLP must be used"):  # timm's own
        new_model("convnext_atto", norm_layer=timm_norm_layer(), conv_mlp=False)


def test_gates_are_a_group_of_their_own() -> None:
    model = new_model("efficientnet_b0", norm_layer=timm_norm_layer())
    groups = normswap.param_groups(model, lr=0.1, weight_decay=1e-4, importance_lr=0.01)
    assert (len(groups[-1]["params"]), groups[-1]["weight_decay"], groups[-1]["lr"]) == (98, 0.0, 0.01)
    optimizer = torch.optim.SGD(groups)
    outputs_and_gradients(model)
    optimizer.step()
    weights = [site.mean["bn"] for site in normswap.importance_weights(model).values()]
    assert all(abs(value - 1 / 3) < 0.1 for value in weights)
    assert len({round(value, 9) for value in weights}) > 40


def test_options_reach_every_layer() -> None:
    layer = timm_norm_layer(gate="simplex", branches=("ln", "bn"), eps=1e-3)
    for name in ("resnet10t", "regnetx_002"):
        layers = gated_modules(new_model(name, norm_layer=layer)).values()
        assert {(each.gate, each.branches, each.normalising_eps) for each in layers} == {
            ("simplex", ("ln", "bn"), 1e-3)
        }


def test_timm_knows_the_name_afterwards() -> None:
    timm_norm_layer()
    assert len(gated_modules(new_model("resnet10t", norm_layer="switchnorm2d"))) == 14
    assert len(gated_modules(new_model("efficientnet_b0", norm_layer="switchnorm2d"))) == 49


def test_arguments_of_norms_with_activations_have_the_meaning_of_timm() -> None:
    x = torch.randn(2, 4, 5, 5)
    norm = normswap.SwitchNorm2d(4)(x)
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({}, norm.relu()),
        ({"apply_act": False}, norm),
        ({"act_layer": None}, norm),
        ({"act_layer": "silu"}, nn.functional.silu(norm)),
        ({"act_layer": nn.LeakyReLU, "act_kwargs": {"negative_slope": 0.5}}, nn.functional.leaky_relu(norm, 0.5)),
        ({"apply_act": False, "drop_layer": lambda: nn.Threshold(0.0, -7.0)}, nn.functional.threshold(norm, 0.0, -7.0)),
    ]
    for options, expected in cases:
        torch.testing.assert_close(norm_act_layer(4, **options)(x), expected)
    assert norm_act_layer(4).act.inplace
    assert not norm_act_layer(4, inplace=False).act.inplace
    assert norm_act_layer(4, 1e-3, device="meta", dtype=torch.float64).weight.is_meta


def test_wrong_options_are_refused_before_timm_builds() -> None:
    with pytest.raises(
        normswap.ArgumentError, match=r"options: expected arguments of normswap.SwitchNorm2d, got {'g': 1}"
    ):
        timm_norm_layer(g=1)
    with pytest.raises(normswap.LayerError, match="gate"):
        timm_norm_layer(gate="sigmoid")


def test_a_timm_with_other_tables_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.layers import create_norm_act

    monkeypatch.delattr(create_norm_act, "_NORM_ACT_REQUIRES_ARG")
    with pytest.raises(normswap.ArgumentError, match="norm_layer: this version of timm has no table of norms"):
        timm_norm_layer()
