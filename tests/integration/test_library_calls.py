"""After the swap a model is still a citizen of its library: each call gives what it gives on the original."""

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import timm.utils
import torch
import torchvision
from timm.layers import convert_sync_batchnorm as timm_convert_sync_batchnorm
from timm.layers import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from timm.models import FeatureGraphNet, load_checkpoint
from timm.models import create_feature_extractor as timm_create_feature_extractor
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils._pytree import tree_leaves
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import normswap
from normswap import freeze_statistics, unfreeze_statistics, update_statistics
from normswap.layers.switch_norm import SwitchNorm
from tests.helpers import guarantees, zoo
from tests.helpers.guarantees.walking import CONSTANTS

X = zoo.image(3, 3, 48, 48)().double()
TIMM = ["test_resnet", "mobilenetv3_small_050", "regnetx_002"]
SMALL = TIMM[:2]
NETWORKS = [*SMALL, "torchvision mobilenet_v3_small"]
pytestmark = pytest.mark.slow

# The calls meet the statistics that a training step updates; the default is the same in both modes.
convert = partial(normswap.convert, bn_statistics="batch")
ADDED = (*guarantees.GATES, *CONSTANTS)


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    library, _, rest = name.rpartition(" ")
    make = torchvision.models.get_model if library else timm.create_model
    return zoo.randomise(make(rest, **options)).double().train()


@cache
def _pair(name: str) -> tuple[Any, Any]:
    original = build(name, num_classes=10)
    return original, convert(original, X).model


def pair(name: str) -> tuple[Any, Any]:
    """The original and its conversion, both the caller's own."""
    original, converted = map(copy.deepcopy, _pair(name))
    return original, converted


every_network = pytest.mark.parametrize("name", NETWORKS)
every_timm_model = pytest.mark.parametrize("name", TIMM)


def close(first: Any, second: Any, limit: float = guarantees.LIMIT) -> None:
    """Two outputs of any structure."""
    pairs = list(zip(tree_leaves(first), tree_leaves(second), strict=True))
    assert pairs
    for a, b in pairs:
        assert guarantees.distance(a, b) <= limit if isinstance(a, Tensor) else a == b


def output(model: nn.Module, x: Tensor = X) -> Any:
    torch.manual_seed(1)
    return model(x)


def shared(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A state dict without gates and the constants of matched branches."""
    state = model.state_dict() if state is None else state
    return {name: value.clone() for name, value in state.items() if not name.endswith(ADDED)}


def same_state(original: nn.Module, converted: nn.Module, limit: float = guarantees.LIMIT) -> None:
    """All tensors but gates, those of a module as one vector: a running mean may be zero in truth."""
    first, second = shared(original), shared(converted)
    assert list(first) == list(second)
    for owner in {name.rpartition(".")[0] for name in first}:
        names = [name for name in first if name.rpartition(".")[0] == owner]
        vectors = [torch.cat([state[name].double().flatten() for name in names]) for state in (first, second)]
        assert guarantees.distance(*vectors) <= limit, owner


def gradients(model: nn.Module) -> Tensor:
    """Those of all parameters but gates, as one vector."""
    own = {name: p for name, p in model.named_parameters() if not name.endswith(guarantees.GATES)}
    return torch.cat([torch.zeros(p.numel()).double() if p.grad is None else p.grad.flatten() for p in own.values()])


def train_alike(original: nn.Module, converted: nn.Module) -> None:
    """One training step of each: outputs, gradients, running statistics."""
    results = [output(model) for model in (original, converted)]
    close(*results)
    for y in results:
        y.square().sum().backward()
    close(gradients(original), gradients(converted))
    same_state(original, converted)


def alike(original: nn.Module, converted: nn.Module) -> None:
    """In training with all that follows, and in evaluation."""
    train_alike(original, converted)
    close(output(original.eval()), output(converted.eval()))


@every_network
def test_by_default_a_training_step_is_that_of_the_frozen_original(name: str) -> None:
    original, converted = build(name, num_classes=10), normswap.convert(build(name, num_classes=10), X).model
    before = shared(converted)
    for module in original.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    alike(original, converted)
    close(before, shared(converted), 0)


def gates(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith(guarantees.GATES)}


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


# --- features ---------------------------------------------------------------------------------------------------------


@every_timm_model
def test_parts_of_the_forward_pass(name: str) -> None:
    original, converted = pair(name)
    for call in (
        lambda model: model.forward_features(X),
        lambda model: model.forward_head(model.forward_features(X), pre_logits=True),
        lambda model: model.forward_intermediates(X, norm=False),
        lambda model: model.forward_intermediates(X, indices=[1, 2], intermediates_only=True),
    ):
        for training in (True, False):
            close(call(original.train(training)), call(converted.train(training)))
    same_state(original, converted)


@pytest.mark.parametrize("feature_cls", ["list", "dict", "fx", "hook", "getter"])
def test_features_only_models(feature_cls: str) -> None:
    original = build("test_resnet", features_only=True, feature_cls=feature_cls)
    converted = convert(original, X).model
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    assert converted.feature_info.channels() == original.feature_info.channels()
    original = copy.deepcopy(original)  # as torch copies it, hooks and all
    for training in (True, False):
        close(original.train(training)(X), converted.train(training)(X))
    same_state(original, converted)


def test_a_model_becomes_a_graph_of_features_after_its_swap() -> None:
    original, converted = (FeatureGraphNet(model, out_indices=(1, 3)) for model in pair("test_resnet"))
    for training in (True, False):
        close(original.train(training)(X), converted.train(training)(X))
    same_state(original, converted)


@pytest.mark.parametrize("extract", [create_feature_extractor, timm_create_feature_extractor])
@pytest.mark.parametrize("name", ["test_resnet", "torchvision resnet18"])
def test_feature_extractors_find_sites_by_name(name: str, extract: Callable[..., Any]) -> None:
    nodes = {"bn1": "stem", "layer1.0.bn2": "inside", "layer3": "deep"}
    original, converted = (extract(model, nodes) for model in pair(name))
    for training in (True, False):
        close(original.train(training)(X), converted.train(training)(X))
    same_state(original, converted)


def test_graph_nodes_keep_their_names() -> None:
    for original, converted in zip(*map(get_graph_node_names, pair("torchvision resnet18")), strict=True):
        # A layer of torch is one node; a site is a module with one node inside.
        assert [name.removesuffix(".apply_layer") for name in converted] == original


# --- changing the model -----------------------------------------------------------------------------------------------


@every_timm_model
def test_another_classifier(name: str) -> None:
    original, converted = pair(name)
    for model in (original, converted):
        torch.manual_seed(4)
        model.reset_classifier(7)
        model.double()
    alike(original, converted)
    assert output(converted).shape == (3, 7)


@every_timm_model
def test_gradient_checkpointing(name: str) -> None:
    original, converted = pair(name)
    recomputing = copy.deepcopy(original)
    for model in (recomputing, converted):
        model.set_grad_checkpointing()
    alike(original, converted)
    # Of the original, recomputed segments record their batch twice, up to the last thing that backward needs of them.
    output(recomputing).square().sum().backward()
    counts = [dict(model.named_buffers()) for model in (converted, recomputing)]
    assert any(counts[1][name] == counts[0][name] + 1 for name in counts[0] if name.endswith("num_batches_tracked"))


def test_functions_applied_to_every_module() -> None:
    def reset(module: nn.Module) -> None:
        if hasattr(module, "reset_parameters"):
            torch.manual_seed(6)
            module.reset_parameters()

    original, converted = pair("mobilenetv3_small_050")
    for model in (original, converted):
        model.apply(reset)
    same_state(original, converted, 0)
    alike(original, converted)


def test_initialisation_that_asks_for_the_class_passes_sn_by() -> None:
    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)

    original, converted = pair("test_resnet")
    before = shared(converted)
    converted.apply(initialise)
    close(before, shared(converted), 0)
    alike(original.apply(initialise), convert(original.apply(initialise), X).model)


@every_network
def test_synchronising_does_not_swallow_sites(name: str) -> None:
    original, converted = pair(name)
    for change in (nn.SyncBatchNorm.convert_sync_batchnorm, timm_convert_sync_batchnorm):
        result = change(converted)
        assert result is converted
        assert not any(isinstance(module, nn.SyncBatchNorm) for module in result.modules())
        assert any(isinstance(module, nn.SyncBatchNorm) for module in change(copy.deepcopy(original)).modules())
    alike(original, converted)


@every_timm_model
def test_freezing_as_timm_does(name: str) -> None:
    original, converted = pair(name)
    kept = shared(converted)
    assert freeze_batch_norm_2d(converted) is converted
    assert len(freeze_statistics(converted)) == sum(isinstance(m, nn.BatchNorm2d) for m in original.modules())
    original = freeze_batch_norm_2d(original)
    close(output(original), output(converted.train()))
    close(kept, shared(converted), 0)
    original, converted = unfreeze_batch_norm_2d(original).train(), unfreeze_batch_norm_2d(converted)
    unfreeze_statistics(converted)
    close(output(original), output(converted))
    counted = [name for name in kept if name.endswith("num_batches_tracked")]  # timm forgets them
    assert counted
    first, second = shared(original), shared(converted)
    close({n: t for n, t in first.items() if n not in counted}, {n: t for n, t in second.items() if n not in counted})


def test_freezing_a_part() -> None:
    original, converted = pair("test_resnet")
    for model in (original, converted):
        timm.utils.freeze(model, ["conv1", "bn1", "layer1"])
    for part in (converted.conv1, converted.bn1, converted.layer1):
        freeze_statistics(part)
    frozen = [name for name, gate in gates(converted).items() if not gate.requires_grad]
    assert frozen
    assert all(name.startswith(("conv1.", "bn1.", "layer1.")) for name in frozen)
    results = [output(model) for model in (original, converted)]
    close(*results)
    for y in results:
        y.square().sum().backward()
    trained = [
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not n.endswith(guarantees.GATES)}
        for model in (original, converted)
    ]
    assert trained[0].keys() == trained[1].keys()
    close(*(torch.cat([g.flatten() for g in found.values()]) for found in trained))
    timm.utils.unfreeze(converted, ["conv1", "bn1", "layer1"])
    assert all(gate.requires_grad for gate in gates(converted).values())


# --- training ---------------------------------------------------------------------------------------------------------


@every_network
def test_gates_get_no_weight_decay(name: str) -> None:
    original, converted = pair(name)
    for model, extra in ((original, 0), (converted, len(gates(converted)))):
        free, decayed = timm.optim.param_groups_weight_decay(model, 0.1)
        assert free["weight_decay"] == 0
        assert len(decayed["params"]) == sum(p.ndim > 1 for p in original.parameters())
        assert len(free["params"]) == sum(p.ndim <= 1 for p in original.parameters()) + extra


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.7}], ids=["plain", "layer decay"])
def test_optimizers_train_the_rest_as_before(name: str, options: dict[str, Any]) -> None:
    original, converted = pair(name)
    optimizers = [
        timm.optim.create_optimizer_v2(model, opt="momentum", lr=0.01, weight_decay=0.1, **options)
        for model in (original, converted)
    ]
    scale = {id(p): group.get("lr_scale") for group in optimizers[1].param_groups for p in group["params"]}
    for gate, parameter in gates(converted).items():
        site = converted.get_submodule(gate.rpartition(".")[0])
        assert scale[id(parameter)] == scale[id(site.weight)]
    before = {n: p.clone() for n, p in gates(converted).items()}
    train_alike(original, converted)
    for parameter in gates(converted).values():
        parameter.grad = None  # the rest moves as without them
    for optimizer in optimizers:
        optimizer.step()
    alike(original, converted)
    close(before, dict(gates(converted)), 0)


def test_an_average_of_the_weights_follows_the_gates() -> None:
    original, converted = pair("mobilenetv3_small_050")
    averages = [timm.utils.ModelEmaV3(model, decay=0.75) for model in (original, converted)]
    for model, average in zip((original, converted), averages, strict=True):
        optimizer = torch.optim.SGD(
            [p for n, p in model.named_parameters() if not n.endswith(guarantees.GATES)], lr=0.01
        )
        output(model).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for gate in gates(model).values():
                gate.copy_(torch.full_like(gate, 1 / len(gate)))
        average.update(model)
    same_state(averages[0].module, averages[1].module)
    for name, gate in gates(averages[1].module).items():
        expected = torch.full_like(gate, 0.25 / len(gate))
        expected[-1] += 0.75
        torch.testing.assert_close(gate.data, expected, msg=name)


def test_averaged_models_get_their_statistics_back() -> None:
    original, converted = pair("test_resnet")
    averages = [AveragedModel(model) for model in (original, converted)]
    for model, average in zip((original, converted), averages, strict=True):
        output(model).square().mean().backward()
        torch.optim.SGD([p for n, p in model.named_parameters() if not n.endswith(guarantees.GATES)], lr=0.01).step()
        average.update_parameters(model)
        average.update_parameters(model)
    loader = [X, X[:2] * 2]
    update_bn(loader, averages[0])
    stale = shared(averages[1])
    update_bn(loader, averages[1])
    close(stale, shared(averages[1]), 0)  # by class, and so not at all
    update_statistics(averages[1], loader)
    same_state(*averages)
    close(output(averages[0].eval()), output(averages[1].eval()))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("reduce", [True, False])
def test_statistics_are_distributed(reduce: bool) -> None:
    original, converted = pair("mobilenetv3_small_050")
    before = shared(original)
    for model in (original, converted):
        timm.utils.distribute_bn(DistributedDataParallel(model), 2, reduce=reduce)
    same_state(original, converted, 0)
    changed = {name for name, value in shared(original).items() if not value.equal(before[name])}
    # One process pretends to be two, so that the sum over one is halved.
    assert changed == ({name for name in before if "running" in name} if reduce else set())


@pytest.mark.usefixtures("one_process")
@every_network
def test_training_in_ddp(name: str) -> None:
    original, converted = pair(name)
    results = [output(DistributedDataParallel(model)) for model in (original, converted)]
    close(*results)
    for y in results:
        y.square().sum().backward()
    close(gradients(original), gradients(converted))
    assert all(gate.grad is not None for gate in gates(converted).values())


# --- states -----------------------------------------------------------------------------------------------------------


@every_network
def test_states_are_loaded(name: str) -> None:
    original, converted = pair(name)
    other = convert(build(name, num_classes=10), X).model
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    missing, unexpected = other.load_state_dict(original.state_dict(), strict=False)
    assert (sorted(missing), unexpected) == (sorted(gates(converted)), [])
    other.load_state_dict(converted.state_dict(), strict=True)
    assert list(other.state_dict()) == list(converted.state_dict())
    alike(original, other)


def test_timm_loads_a_checkpoint_of_the_original(tmp_path: Path) -> None:
    original, converted = pair("test_resnet")
    torch.save({"state_dict": build("test_resnet", num_classes=10).state_dict()}, tmp_path / "bn.pth")
    for model in (original, converted):
        with torch.no_grad():
            for tensor in shared(model).values():
                tensor.zero_()
    result = load_checkpoint(converted, str(tmp_path / "bn.pth"), strict=False, weights_only=True)
    load_checkpoint(original, str(tmp_path / "bn.pth"), weights_only=True)
    assert sorted(result.missing_keys) == sorted(gates(converted))
    alike(original, converted)


@every_network
def test_copies_and_vectors(name: str) -> None:
    original, converted = pair(name)
    twin = copy.deepcopy(converted)
    vector = parameters_to_vector(twin.parameters())
    assert len(vector) - len(parameters_to_vector(original.parameters())) == sum(
        g.numel() for g in gates(twin).values()
    )
    vector_to_parameters(vector.detach() * 2, twin.parameters())
    same_state(original, converted, 0)
    vector_to_parameters(vector.detach(), twin.parameters())
    alike(original, twin)


@every_network
def test_meta_device_and_back(name: str) -> None:
    original, converted = pair(name)
    state = converted.state_dict()
    meta = copy.deepcopy(converted).to("meta")
    assert meta.eval()(X.to("meta")).shape == output(original.eval()).shape
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(state, strict=True)
    alike(original.train(), empty.train())


# --- layouts and precision --------------------------------------------------------------------------------------------


@every_network
def test_channels_last_stays(name: str) -> None:
    original, converted = (model.to(memory_format=torch.channels_last) for model in pair(name))
    x = X.to(memory_format=torch.channels_last)
    layouts: list[list[bool]] = []
    for model in (original, converted):
        seen: list[bool] = []
        layouts.append(seen)
        for module in model.modules():
            if isinstance(module, SwitchNorm | nn.BatchNorm2d):
                module.register_forward_hook(
                    lambda _m, _a, y, seen=seen: seen.append(y.is_contiguous(memory_format=torch.channels_last))
                )
    for training in (True, False):
        close(output(original.train(training), x), output(converted.train(training), x))
    assert layouts[0] == layouts[1]
    assert all(layouts[1])


def errors_of(models: tuple[nn.Module, nn.Module], exact: Tensor, call: Callable[[nn.Module], Tensor]) -> None:
    """In low precision each is as far from the exact output as the other, to a factor, and of the same dtype."""
    first, second = map(call, models)
    assert first.dtype == second.dtype
    errors = [guarantees.distance(exact, y.double()) for y in (first, second)]
    assert errors[0] > 1e-6
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_half_precision(name: str, dtype: torch.dtype, training: bool) -> None:
    exact = output(pair(name)[0].train(training)).detach()
    original, converted = (model.train(training).to(dtype) for model in pair(name))
    errors_of((original, converted), exact, lambda model: output(model, X.to(dtype)).detach())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("training", [True, False])
def test_autocast(name: str, training: bool) -> None:
    exact = output(pair(name)[0].train(training)).detach()
    models = tuple(model.train(training).float() for model in pair(name))

    def call(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return output(model, X.float()).detach()

    errors_of(models, exact, call)  # type: ignore[arg-type]
