"""nnU-Net's trainer with SN: networks of plans, training steps, checkpoints."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normswap
from normswap.surgery.importance import gated_modules

pytest.importorskip("nnunetv2", reason="needs nnunetv2")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of nnU-Net

NETWORK = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


def architecture(norm: str, dimensions: int) -> dict[str, Any]:
    kernel = [3] * dimensions
    return {
        "network_class_name": NETWORK,
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 8],
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [kernel] * 3,
            "strides": [[1] * dimensions, [2] * dimensions, [2] * dimensions],
            "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": f"torch.nn.{norm}{dimensions}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def plans(norm: str = "InstanceNorm", dimensions: int = 3) -> dict[str, Any]:
    configuration = {
        "data_identifier": "data",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16] * dimensions,
        "batch_dice": False,
        "architecture": architecture(norm, dimensions),
    }
    return {
        "dataset_name": "Dataset001_Squares",
        "plans_name": "nnUNetPlans",
        "configurations": {"full": configuration},
        "continue_training": False,
    }


DATASET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "square": 1}, "file_ending": ".nii.gz"}


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    data = tmp_path / "preprocessed" / "Dataset001_Squares" / "data"
    data.mkdir(parents=True)
    (data / "case.b2nd").touch()


def new_trainer(norm: str = "InstanceNorm", dimensions: int = 3) -> Any:
    from normswap.integrations.nnunet import nnUNetTrainerSwitchNorm

    torch.manual_seed(0)
    trainer = nnUNetTrainerSwitchNorm(plans(norm, dimensions), "full", 0, DATASET, torch.device("cpu"))
    trainer.initialize()
    return trainer


def batch(dimensions: int = 3, seed: int = 0) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    data = torch.randn(2, 1, *[16] * dimensions, generator=random)
    targets = [(data[(..., *[slice(None, None, step)] * dimensions)] > 0).float() for step in (1, 2)]
    return {"data": data, "target": targets}


def plain_network(norm: str, dimensions: int = 3) -> nn.Module:
    """nnU-Net's own network with the same initial weights."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.manual_seed(0)
    trainer = nnUNetTrainer(plans(norm, dimensions), "full", 0, DATASET, torch.device("cpu"))
    trainer.initialize()
    return trainer.network


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("norm", ["InstanceNorm", "BatchNorm"])
def test_the_network_starts_as_nnunets_own(norm: str, dimensions: int) -> None:
    own, network = plain_network(norm, dimensions), new_trainer(norm, dimensions).network
    layers = gated_modules(network)
    kind = nn.InstanceNorm2d if norm == "InstanceNorm" else nn.BatchNorm2d
    kind = getattr(nn, kind.__name__.replace("2d", f"{dimensions}d"))
    assert len(layers) == sum(isinstance(module, kind) for module in own.modules()) > 0
    assert {layer.branches for layer in layers.values()} == {("in", "ln", "bn")}
    x = batch(dimensions)["data"]
    for mine, theirs in zip(network.train()(x), own.train()(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_gates_learn_at_a_rate_of_their_own_that_follows_the_schedule() -> None:
    trainer = new_trainer()
    network, gates = trainer.optimizer.param_groups[0], trainer.optimizer.param_groups[-1]
    ratio = gates["lr"] / network["lr"]
    assert ratio > 1
    assert (network["weight_decay"], gates["weight_decay"]) == (3e-5, 0.0)
    assert {*map(id, gates["params"])} == {*map(id, normswap.trainable_gates(trainer.network).values())}
    before = copy.deepcopy(normswap.importance_weights(trainer.network))
    for epoch in (0, 500):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        assert trainer.train_step(batch(seed=epoch))["loss"] is not None
        assert network["lr"] == pytest.approx(0.01 * (1 - epoch / 1000) ** 0.9)
        assert gates["lr"] == pytest.approx(ratio * network["lr"])
    assert normswap.importance_weights(trainer.network) != before


def test_a_checkpoint_loads_in_a_new_trainer(tmp_path: Path) -> None:
    trainer = new_trainer()
    for seed in range(3):
        trainer.train_step(batch(seed=seed))
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    resumed = new_trainer()
    resumed.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    x = batch(seed=9)["data"]
    for mine, theirs in zip(resumed.network.eval()(x), trainer.network.eval()(x), strict=True):
        assert torch.equal(mine, theirs)
    losses = [float(each.train_step(batch(seed=9))["loss"]) for each in (trainer, resumed)]
    assert losses[0] == losses[1]
    rates = [group["lr"] for group in resumed.optimizer.param_groups]
    assert rates[-1] > rates[0]


def test_nnunet_finds_the_trainer_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from normswap.integrations.nnunet import nnUNetTrainerSwitchNorm

    trainers = tmp_path / "trainers"
    trainers.mkdir()
    (trainers / "switch_norm.py").write_text("from normswap.integrations.nnunet import nnUNetTrainerSwitchNorm\n")
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers))
    assert recursive_find_trainer_class_by_name("nnUNetTrainerSwitchNorm") is nnUNetTrainerSwitchNorm


def test_inference_rebuilds_the_network_of_the_checkpoint() -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from normswap.integrations.nnunet import nnUNetTrainerSwitchNorm

    trained = new_trainer().network
    manager = PlansManager({key: value for key, value in plans().items() if key != "continue_training"})
    network = nnUNetTrainerSwitchNorm.build_network_architecture(
        manager, manager.get_configuration("full"), 1, 2, False
    )
    network.load_state_dict(trained.state_dict())
    x = batch()["data"]
    torch.testing.assert_close(network.eval()(x), trained.eval()(x)[0])
