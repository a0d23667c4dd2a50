"""revert_file: the tensors of the original, bit for bit, or a refusal that states the change."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import normswap
from normswap.checkpoints.io.digest import contents_equal
from normswap.errors import CheckpointError, NothingToDo
from tests.baking.test_bake import VERTICES, Block, move
from tests.helpers import files

X = torch.randn(files.SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def training_checkpoint(model: nn.Module, scheduler: Any = torch.optim.lr_scheduler.CosineAnnealingLR) -> Any:
    """A checkpoint with an average, an optimizer that has stepped, and a scheduler."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = scheduler(optimizer, 10)
    model.train()(X).square().mean().backward()
    optimizer.step()
    schedule.step()
    state = model.eval().state_dict()
    average = {name: tensor + 1 for name, tensor in state.items()}
    states = {"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict()}
    return {"state_dict": state, "state_dict_ema": average, **states, "epoch": 3}


def same(first: Any, second: Any) -> bool:
    metadata = [getattr(each, "_metadata", None) for each in (first, second)]
    return contents_equal(first, second) and [*first] == [*second] and metadata[0] == metadata[1]


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "legacy.bin"])
def test_a_state_dict_comes_back_bit_for_bit(name: str) -> None:
    state = files.small_model().state_dict()
    if name == "a.safetensors":
        safetensors.torch.save_file(state, name)
    else:
        torch.save(state, name, _use_new_zipfile_serialization=name != "legacy.bin")
    normswap.convert_file(name, "sn" + Path(name).suffix, architecture=files.ARCH, example_inputs=X)
    result = normswap.revert_file("sn" + Path(name).suffix, "out" + Path(name).suffix)
    found = safetensors.torch.load_file("out.safetensors") if "safe" in name else torch.load(result.output)
    assert same(found, safetensors.torch.load_file(name) if "safe" in name else state)
    assert (result.sites, result.changed, result.relative_error) == (files.SITES, (), 0.0)
    loaded = normswap.load(result.output)
    assert loaded.plan is None
    assert [step.action for step in loaded.history] == ["converted", "reverted"]


def test_averages_optimizers_and_schedulers_come_back_too() -> None:
    content = training_checkpoint(files.small_model())
    torch.save(content, "bn.pt")
    normswap.convert_file("bn.pt", "sn.pt", architecture=files.ARCH, entry="state_dict", example_inputs=X)
    result = normswap.revert_file("sn.pt", "out.pt")
    found = torch.load("out.pt")
    assert all(contents_equal(found[name], value) for name, value in content.items())
    assert same(found["state_dict"], content["state_dict"])
    assert result.notes == (
        "state_dict_ema: reverted too",
        "optimizer: gates removed, the state of all other parameters is kept",
        "lr_scheduler: the entry of the gates removed",
    )


def test_trained_gates_of_an_optimizer_are_dropped_with_their_state() -> None:
    model = files.small_model()
    conversion = normswap.convert(model, X)
    groups = normswap.param_groups(conversion.model, lr=1e-3)
    optimizer = torch.optim.AdamW(groups)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[1])
    conversion.model.train()(X).square().mean().backward()
    optimizer.step()
    for layer in (module for module in conversion.model.modules() if isinstance(module, normswap.SwitchNorm2d)):
        layer.reset_parameters()
    normswap.save(conversion.model, "sn.pt", plan=conversion.plan, architecture=files.ARCH)
    from normswap.checkpoints.content import gate_removal

    state = optimizer.state_dict()
    without = gate_removal.remove_gates_from_optimizer(state)
    gates = len(normswap.trainable_gates(conversion.model))
    assert len(without["state"]) == len(state["state"]) - gates
    scheduler = gate_removal.remove_gates_from_scheduler(schedule.state_dict(), state["param_groups"])
    assert gate_removal.schedules_groups(schedule.state_dict(), state["param_groups"])
    assert [len(each["base_lrs"]) for each in scheduler["_schedulers"]] == [len(groups) - 1] * 2
    assert not gate_removal.schedules_groups(scheduler, state["param_groups"])
    assert not gate_removal.schedules_groups({"epoch": 3}, state["param_groups"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "densenet121", "regnety_002", "mobilenetv3_small_050"])
def test_networks_of_the_zoo_come_back_bit_for_bit(name: str) -> None:
    state = files.scrambled(timm.create_model(name)).state_dict()
    torch.save(state, "bn.pt")
    normswap.convert_file("bn.pt", "sn.pt", architecture=f"timm:{name}", example_inputs=X, verify=False)
    normswap.revert_file("sn.pt", "out.pt")
    assert same(torch.load("out.pt"), state)


def test_new_running_statistics_of_other_norms_are_removed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4), nn.BatchNorm2d(4))
    state = model.state_dict()
    torch.save(state, "in.pt")
    options: Any = {"kinds": ("bn", "in", "gn"), "bn_statistics": "batch"}
    normswap.convert_file("in.pt", "sn.pt", architecture=model, example_inputs=X, **options)
    normswap.revert_file("sn.pt", "out.pt")
    assert same(torch.load("out.pt"), state)


def test_a_functional_site_and_a_pickled_module_come_back() -> None:
    model = files.FunctionalNet().eval()
    torch.save(model.state_dict(), "f.pt")
    normswap.convert_file("f.pt", "sn.pt", architecture=model, example_inputs=X)
    normswap.revert_file("sn.pt", "out.pt")
    assert same(torch.load("out.pt"), model.state_dict())
    torch.save(files.small_model(), "module.pt")
    normswap.convert_file("module.pt", "sn_module.pt", example_inputs=X, trust=True)
    normswap.revert_file("sn_module.pt", "out_module.pt", trust=True)
    found = torch.load("out_module.pt", weights_only=False)
    assert same(found.state_dict(), torch.load("module.pt", weights_only=False).state_dict())


def test_moved_gates_need_a_word_and_state_the_change() -> None:
    conversion = normswap.convert(files.small_model(), X)
    model = move(conversion.model, VERTICES["bn"], VERTICES["mix"])
    normswap.save(model, "sn.pt", plan=conversion.plan, architecture=files.ARCH)
    with pytest.raises(
        NothingToDo, match=r"of 7 sites differ.*\(the outputs by [0-9.e+-]+, relative L2\): pass discard"
    ):
        normswap.revert_file("sn.pt", example_inputs=X)
    assert not Path("sn.reverted.pt").exists()
    result = normswap.revert_file("sn.pt", example_inputs=X, discard=True)
    assert len(result.changed) == 7
    assert result.relative_error is not None
    assert result.relative_error > 1e-3


def test_the_change_of_an_unknown_network_is_not_measured() -> None:
    conversion = normswap.convert(files.scrambled(Block()).eval(), X)
    model = move(conversion.model, VERTICES["mix"])
    normswap.save(model, "sn.pt", plan=conversion.plan)
    with pytest.raises(NothingToDo, match=r"reverting changes the function: pass discard=True"):
        normswap.revert_file("sn.pt")
    result = normswap.revert_file("sn.pt", discard=True)
    assert result.relative_error is None
    assert "the network or the size of its input is unknown" in " ".join(str(result).split())


def test_what_cannot_be_reverted() -> None:
    torch.save(files.small_model().state_dict(), "bn.pt")
    with pytest.raises(NothingToDo, match="nothing to revert, it is not converted"):
        normswap.revert_file("bn.pt")
    started = normswap.convert(files.small_model(), X, start="ln")
    normswap.save(started.model, "started.pt", plan=started.plan, architecture=files.ARCH)
    with pytest.raises(CheckpointError, match="started without `bn` and kept no running statistics"):
        normswap.revert_file("started.pt")
