"""Preparation for Opacus, its inverse, and what a prepared model refuses."""

import copy
import io
from typing import Any

import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normswap
import normswap.privacy
from tests.privacy.networks import convert, cross_entropy, small_network

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # inputs need no gradient
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),  # no secrets here
]

INPUTS = torch.randn(6, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def prepared_network(**options: Any) -> nn.Module:
    model = convert(small_network(), INPUTS, **options).float()
    normswap.privacy.prepare(model)
    return model


def make_private(model: nn.Module, *, mode: str = "hooks", noise: float = 1.0) -> tuple[Any, ...]:
    data = TensorDataset(INPUTS, torch.tensor([0, 1, 2, 3, 0, 1]))
    found: tuple[Any, ...] = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(normswap.param_groups(model, lr=0.1)),
        data_loader=DataLoader(data, batch_size=3),
        noise_multiplier=noise,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    return found


# --- the state and the function of the model --------------------------------------------------------------------------


def test_keys_values_and_function_stay() -> None:
    model = convert(small_network(), INPUTS).float()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs = [model.train()(INPUTS), model.eval()(INPUTS)]
    assert normswap.privacy.prepare(model) == ["1"]
    assert normswap.privacy.prepare(model) == []
    assert not [*model.buffers()]
    found = model.state_dict()
    assert [*found] == [*state]
    assert all(found[name].dtype == each.dtype and torch.equal(found[name], each) for name, each in state.items())
    assert torch.equal(model.train()(INPUTS), outputs[0])
    assert torch.equal(model.eval()(INPUTS), outputs[1])


def test_restore_is_the_inverse() -> None:
    model = convert(small_network(), INPUTS).float()
    names, state = [name for name, _ in model.named_buffers()], copy.deepcopy(model.state_dict())
    normswap.privacy.prepare(model)
    assert normswap.privacy.restore(model) == ["1"]
    assert normswap.privacy.restore(model) == []
    assert [name for name, _ in model.named_buffers()] == names
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())
    assert normswap.privacy.prepare(model) == ["1"]


def test_parameters_stay_the_same_objects() -> None:
    model = convert(small_network(), INPUTS)
    before = dict(model.named_parameters())
    normswap.privacy.prepare(model)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert not any(after[name].requires_grad for name in after.keys() - before.keys())


def test_a_state_dict_is_loaded() -> None:
    model, other = prepared_network(), convert(small_network(), INPUTS).float()
    other[1].num_batches_tracked.fill_(7)
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(each, other.state_dict()[name]) for name, each in model.state_dict().items())
    state = other.state_dict()
    del state["1.num_batches_tracked"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "1.num_batches_tracked"'):
        model.load_state_dict(state)
    other.load_state_dict(model.state_dict())


def test_copies_and_pickles_are_prepared_too() -> None:
    model = prepared_network()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for each in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert not [*each.buffers()]
        assert torch.equal(each(INPUTS), model(INPUTS))
        assert normswap.privacy.restore(each) == ["1"]


def test_a_prepared_model_moves_between_dtypes() -> None:
    model = prepared_network().double()
    assert model[1].running_mean.dtype == torch.float64
    assert model.state_dict()["1.num_batches_tracked"].dtype == torch.long


def test_frozen_batch_norm_keeps_its_frozen_weights() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    model = normswap.convert(small_network(norm=FrozenBatchNorm2d(6)).eval(), INPUTS).model
    layer = model[1]
    normswap.privacy.prepare(model)
    assert layer.frozen
    assert not [*model.buffers()]
    assert not layer.weight.requires_grad
    normswap.privacy.restore(model)
    assert layer.frozen
    assert "weight" in dict(layer.named_buffers())


@pytest.mark.slow
@pytest.mark.multiprocess  # the exported file runs in one of its own
@pytest.mark.parametrize("start", [None, "ln"])
def test_bake_and_export_of_a_prepared_model(start: Any, tmp_path: Any) -> None:
    model = prepared_network(start=start).eval()
    expected = model(INPUTS)
    baked = normswap.bake(model, INPUTS).model
    torch.testing.assert_close(baked(INPUTS), expected)
    torch.testing.assert_close(model(INPUTS), expected, rtol=0, atol=0)
    assert not [*model.buffers()]
    normswap.export(model, tmp_path / "model.pt2", example_inputs=INPUTS)
    assert (tmp_path / "model.pt2").is_file()


def test_revert_of_a_prepared_model() -> None:
    original = small_network().eval()
    model = normswap.convert(original, INPUTS).model
    normswap.privacy.prepare(model)
    normswap.revert(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert all(torch.equal(each, original.state_dict()[name]) for name, each in model.state_dict().items())
    assert torch.equal(model(INPUTS), original(INPUTS))


def test_a_file_of_a_prepared_model(tmp_path: Any) -> None:
    import timm

    conversion = normswap.convert(timm.create_model("test_resnet").eval(), torch.randn(1, 3, 64, 64))
    normswap.privacy.prepare(conversion.model)
    normswap.save(conversion.model, tmp_path / "model.pt", plan=conversion.plan, architecture="timm:test_resnet")
    loaded = normswap.load(tmp_path / "model.pt").model
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(x), conversion.model(x))
    assert [*loaded.buffers()]


def test_matching_constants_can_still_be_set() -> None:
    model = prepared_network()
    mean, var = torch.randn(6), torch.rand(6) + 0.5
    model[1].match_to(mean, var, instance_var=var / 2)
    assert not torch.equal(model[1].in_var_scale, torch.ones(6))
    model[1].reset_parameters()
    assert torch.equal(model[1].in_var_scale, torch.ones(6))


# --- training with Opacus ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_make_private_trains(mode: str) -> None:
    model = prepared_network()
    before = copy.deepcopy(model.state_dict())
    private, optimizer, *loss, loader = make_private(model, mode=mode)
    criterion = loss[0] if loss else F.cross_entropy
    for images, labels in loader:
        optimizer.zero_grad()
        criterion(private(images), labels).backward()
        optimizer.step()
    after = private.to_standard_module().state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name, each in model.named_parameters() if each.requires_grad}
    gates = normswap.importance_weights(model)["1"]
    assert sum(gates.mean.values()) == pytest.approx(1, abs=1e-6)


def test_the_step_is_that_of_clipped_gradients() -> None:
    model = prepared_network()
    before = copy.deepcopy(model).double()
    private, optimizer, _ = make_private(model.double(), noise=0.0)
    optimizer.zero_grad()
    cross_entropy(private(INPUTS.double())).backward()
    optimizer.step()
    total = {name: torch.zeros_like(each) for name, each in before.named_parameters() if each.requires_grad}
    for sample in INPUTS.double():
        before.zero_grad()
        cross_entropy(before(sample[None])).backward()
        gradients = {name: each.grad for name, each in before.named_parameters() if each.grad is not None}
        norm = torch.cat([each.flatten() for each in gradients.values()]).norm()
        for name, gradient in gradients.items():
            total[name] += gradient * min(1.0, 1 / float(norm + 1e-6))
    after = dict(model.named_parameters())
    for name, gradient in total.items():
        rate = 0.1 if "_weight" not in name else None
        if rate is not None:  # gates have a rate of their own
            torch.testing.assert_close(after[name], dict(before.named_parameters())[name] - rate * gradient / 3)


def test_opacus_fix_prepares_a_copy_and_replaces_other_norms() -> None:
    model = convert(small_network(norm=nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm2d(6))), INPUTS, include="1.0")
    fixed = ModuleValidator.fix(model)
    assert ModuleValidator.validate(fixed) == []
    assert isinstance(fixed[1][1], nn.GroupNorm)
    assert not [*fixed.buffers()]
    assert [*model[1][0].buffers()]


def test_code_may_change_outputs_in_place() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            y += x
            return F.relu(y, inplace=True).mean((2, 3))

    model = normswap.convert(Residual().eval(), INPUTS).model.train()
    normswap.privacy.prepare(model)
    private, *_ = make_private(model)
    cross_entropy(private(INPUTS)).backward()
    assert model.norm.weight.grad_sample.shape == (6, 3)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["batch", "renorm"])
def test_batch_statistics_are_refused_with_the_call_that_mends_it(statistics: Any) -> None:
    model = convert(small_network(), INPUTS, bn_statistics=statistics).float()
    with pytest.raises(
        normswap.ModelError, match=r'^1 normalizes by the batch.*set_bn_statistics\(model, "running"\)$'
    ):
        normswap.privacy.prepare(model)
    with pytest.raises(UnsupportedModuleError, match=r'set_bn_statistics\(model, "running"\)'):
        make_private(model)
    normswap.set_bn_statistics(model, "running")
    assert normswap.privacy.prepare(model) == ["1"]
    make_private(model)


def test_a_network_that_is_not_prepared_is_told_to() -> None:
    model = convert(small_network(), INPUTS).float()
    with pytest.raises(UnsupportedModuleError, match=r"1 has buffers.*call normswap\.privacy\.prepare\(model\)"):
        make_private(model)


def test_layers_without_running_statistics_are_refused() -> None:
    layer = normswap.SwitchNorm2d(6, track_running_stats=False, bn_statistics="running")
    with pytest.raises(normswap.ModelError, match="`bn` branch without running statistics, which uses those of the ba"):
        normswap.privacy.prepare(nn.Sequential(layer))
    without = normswap.SwitchNorm2d(6, branches=("in", "ln"))
    assert ModuleValidator.validate(without) == []
    assert normswap.privacy.prepare(without) == []


def test_statistics_that_would_be_trained_are_refused() -> None:
    model = prepared_network()
    model.requires_grad_(True)
    with pytest.raises(
        UnsupportedModuleError, match=r"running_mean, .* of 1 would be trained: call normswap\.privacy\.p"
    ):
        make_private(model)
    normswap.privacy.prepare(model)
    make_private(model)


def test_batch_norm_that_was_not_converted_is_refused() -> None:
    with pytest.raises(normswap.ModelError, match=r"^1 is a BatchNorm.*normswap\.convert\(model, example_inputs\)$"):
        normswap.privacy.prepare(small_network())
    frozen = small_network()
    normswap.freeze_statistics(frozen)
    assert normswap.privacy.prepare(frozen) == []


def test_functional_sites_are_refused() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_var", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)

    model = normswap.convert(nn.Sequential(Functional()).eval(), INPUTS).model.train()
    with pytest.raises(normswap.ModelError, match=r"replaced a call of .*batch_norm, .*write the norm as a module"):
        normswap.privacy.prepare(model)
    with pytest.raises(UnsupportedModuleError, match="write the norm as a module"):
        make_private(model)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            normswap.SwitchNormAct(6, act=nn.PReLU()),
            r"trainable parameters in `act`.*layer\.act\.requires_grad_\(False\)",
        ),
        (normswap.SwitchNormAct(6, drop=nn.Dropout(0.1)), "random module `drop`.*set its probability to 0"),
        (normswap.SwitchNormAct(6, act=nn.RReLU()), "random module `act`"),
    ],
    ids=["PReLU", "Dropout", "RReLU"],
)
def test_modules_after_the_norm_that_opacus_cannot_run_again(layer: nn.Module, message: str) -> None:
    layer.bn_statistics = "running"
    with pytest.raises(normswap.ModelError, match=message):
        normswap.privacy.prepare(layer)


LEAKS = {
    "calibrate": lambda model: normswap.calibrate(model, [INPUTS]),
    "update_statistics": lambda model: normswap.update_statistics(model, [INPUTS]),
    "matching": lambda model: normswap.convert(model, INPUTS, data=[INPUTS]),
    "bn_statistics='batch'": lambda model: normswap.set_bn_statistics(model, "batch"),
    "bn_statistics='renorm'": lambda model: normswap.set_bn_statistics(model, "renorm"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_what_would_leak_is_refused(name: str) -> None:
    model = prepared_network()
    with pytest.raises(
        normswap.ModelError, match=rf"^{name} would .*, which epsilon does not cover: .*privacy\.restore"
    ):
        LEAKS[name](model)
    private, *_ = make_private(model)
    with pytest.raises(normswap.ModelError, match=rf"^{name} would"):
        LEAKS[name](private)


def test_matching_alone_and_unfreezing_are_refused() -> None:
    from normswap.running_stats.matching import match_instance_variance

    model = convert(small_network(), INPUTS, bn_statistics="batch").float()
    normswap.freeze_statistics(model)
    normswap.privacy.prepare(model)
    with pytest.raises(normswap.ModelError, match="matching would store statistics of the data"):
        match_instance_variance(model, [INPUTS])
    with pytest.raises(normswap.ModelError, match="statistics of the batch would mix its samples"):
        normswap.unfreeze_statistics(model)


def test_a_network_without_statistics_is_private_inside_opacus() -> None:
    model = convert(small_network(), INPUTS, start="ln", match=False).float()
    private, *_ = make_private(model)
    with pytest.raises(normswap.ModelError, match="calibrate would store"):
        normswap.calibrate(private, [INPUTS])
    with pytest.raises(normswap.ModelError, match=r"Opacus records per-sample gradients.*to_standard_module\(\) first"):
        normswap.privacy.restore(model)
    private.to_standard_module()
    assert normswap.privacy.restore(model) == []


def test_public_data_can_be_used_after_restoring() -> None:
    model = prepared_network()
    normswap.privacy.restore(model)
    assert len(normswap.calibrate(model, [INPUTS]).layers) == 1
