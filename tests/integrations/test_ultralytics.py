"""YOLO trained with SN: a few steps on generated images, without a network connection."""

import contextlib
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import normswap
from normswap.errors import ArgumentError
from normswap.integrations.ultralytics import convert_yolo, fold_while_exact, regroup, switch_norm_trainer
from normswap.surgery.importance import gated_modules

needs_ultralytics = pytest.mark.skipif(find_spec("ultralytics") is None, reason="needs ultralytics")
trains = [needs_ultralytics, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of ultralytics

SIZE = 64
STEPS: dict[str, Any] = {
    "epochs": 2, "batch": 4, "imgsz": SIZE, "workers": 0, "device": "cpu", "plots": False, "amp": False,
    "exist_ok": True, "verbose": False,
}  # fmt: skip


# --- without Ultralytics ----------------------------------------------------------------------------------------------


class Network(nn.Sequential):
    """A network with a method `fuse`, as those of Ultralytics have."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))

    def fuse(self, verbose: bool = True) -> str:
        return f"folded, verbose={verbose}"


class Trainer:
    """Builds a network, and an optimizer with the names of groups of Ultralytics' trainers."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Network:
        network = Network()
        if weights is not None:
            network.load_state_dict(weights.state_dict(), strict=False)
        return network

    def build_optimizer(self, model: nn.Module, name: str = "SGD") -> torch.optim.Optimizer:
        options = {"lr": 0.01, "weight_decay": 0.1, "param_group": "weight"}
        groups = [{"params": list(model.parameters()), **options}]
        return torch.optim.SGD(groups if name == "SGD" else [{**groups[0], "use_muon": True}])


YOLO = SimpleNamespace(task="detect", task_map={"detect": {"trainer": Trainer}})


def move_gates(model: nn.Module) -> None:
    for point in normswap.trainable_gates(model).values():
        point.data.copy_(torch.tensor([0.25, 0.25, 0.5]))


def test_a_model_without_a_trainer_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"yolo: expected a model such as YOLO\('yolo11n.pt'\), got Network"):
        switch_norm_trainer(Network())


@pytest.mark.parametrize("name", ["SGD", "MuSGD"])
def test_gates_and_affine_parameters_get_groups_without_weight_decay(name: str) -> None:
    trainer = switch_norm_trainer(YOLO, importance_lr=0.5)()
    model = trainer.get_model()
    optimizer = trainer.build_optimizer(model, name)
    found = [(len(g["params"]), g["weight_decay"], g["param_group"], g["lr"]) for g in optimizer.param_groups]
    assert found == [(4, 0.1, "weight", 0.01), (4, 0.0, "bn", 0.01), (4, 0.0, "bn", 0.5)]
    assert {id(p) for p in optimizer.param_groups[-1]["params"]} == {*map(id, normswap.trainable_gates(model).values())}
    assert [group.get("use_muon", False) for group in optimizer.param_groups] == [name == "MuSGD", False, False]


def test_steps_of_gates_are_limited() -> None:
    model = convert_yolo(Network(), None)
    optimizer = regroup(model, torch.optim.SGD(model.parameters(), lr=100.0), None)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    moved = [1 - weights.mean["bn"] for weights in normswap.importance_weights(model).values()]
    assert max(moved) <= 0.1 / 100 + 1e-6  # the first of 100 steps of the warm-up


def test_statistics_are_those_of_the_batch_unless_there_are_weights() -> None:
    trainer = switch_norm_trainer(YOLO)()
    assert trainer.get_model()[1].bn_statistics == "batch"
    assert trainer.get_model(weights=Network())[1].bn_statistics == "running"
    assert switch_norm_trainer(YOLO, bn_statistics="renorm")().get_model()[1].bn_statistics == "renorm"


def test_layers_of_converted_weights_are_passed_on() -> None:
    weights = convert_yolo(Network(), None, bn_statistics="renorm", branches=("in", "bn"), exclude=["3"])
    weights[1].mean_weight.data.copy_(torch.tensor([0.5, 0.5]))
    model = switch_norm_trainer(YOLO)().get_model(weights=weights.half())
    assert model[1] is not weights[1]
    assert (model[1].bn_statistics, model[1].branches) == ("renorm", ("in", "bn"))
    assert model[1].mean_weight.tolist() == [0.5, 0.5]
    assert model[1].weight.dtype == torch.float32
    assert model[3].branches == ("in", "ln", "bn")  # was no SN layer: converted


def test_norms_are_folded_while_all_gates_are_at_bn_only() -> None:
    model = convert_yolo(Network(), None)
    assert model.fuse(verbose=False) == "folded, verbose=False"
    move_gates(model)
    assert model.fuse(verbose=False) is model
    assert isinstance(model.fuse, partial)
    assert model.fuse.func is fold_while_exact


# --- with Ultralytics -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data set of bright squares, and settings with which Ultralytics connects to nothing."""
    cv2 = pytest.importorskip("cv2")
    folder = tmp_path_factory.mktemp("yolo")
    settings = {"YOLO_CONFIG_DIR": str(folder), "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        images, labels = (folder / split / name for name in ("images", "labels"))
        for path in (images, labels):
            path.mkdir(parents=True)
        for number in range(count):
            image = random.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
            x, y = (int(value) for value in random.integers(16, 48, 2))
            image[y - 8 : y + 8, x - 8 : x + 8] = 220
            cv2.imwrite(str(images / f"{number}.png"), image)
            (labels / f"{number}.txt").write_text(f"0 {x / SIZE} {y / SIZE} 0.25 0.25\n")
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: train/images\nval: val/images\nnames: {{0: square}}\n")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield folder


def new_yolo(start: str | Path) -> Any:
    from ultralytics import YOLO

    return YOLO(start, task="detect")


def train(yolo: Any, folder: Path, name: str, **options: Any) -> Any:
    settings = {"data": str(folder / "data.yaml"), "project": str(folder / "runs"), "name": name}
    yolo.train(trainer=switch_norm_trainer(yolo), **STEPS, **settings, **options)
    return yolo.trainer


class StoppedError(Exception):
    """Ends a training run after its first checkpoint."""


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Path:
    """The checkpoint of a run from a YAML description that was stopped after the first epoch."""

    def stop(trainer: Any) -> None:
        raise StoppedError

    yolo = new_yolo("yolo11n.yaml")
    yolo.add_callback("on_model_save", stop)
    with contextlib.suppress(StoppedError):
        train(yolo, folder, "first", optimizer="AdamW")
    return Path(yolo.trainer.last)


class TestTraining:
    pytestmark = trains

    def test_a_checkpoint_of_a_run_has_sn_layers_and_a_group_of_gates(self, stopped: Path) -> None:
        content = torch.load(stopped, weights_only=False)
        layers = gated_modules(content["ema"])
        assert len(layers) == 81
        assert {type(layer) for layer in layers.values()} == {normswap.SwitchNorm2d}
        last = content["optimizer"]["param_groups"][-1]
        assert (len(last["params"]), last["weight_decay"], last["gates"]) == (162, 0.0, True)
        moments = [content["optimizer"]["state"][number]["exp_avg"] for number in last["params"]]
        assert any(moment.abs().max() > 0 for moment in moments)  # the gates have been trained

    def test_a_run_resumes_with_its_layers_and_its_optimizer(self, folder: Path, stopped: Path) -> None:
        yolo = new_yolo(stopped)
        yolo.train(resume=True, trainer=switch_norm_trainer(yolo))
        trainer = yolo.trainer
        assert trainer.start_epoch == 1
        layers = gated_modules(trainer.model)
        assert len(layers) == len(gated_modules(trainer.ema.ema)) == 81
        assert {layer.bn_statistics for layer in layers.values()} == {"batch"}  # as the run started
        assert len(trainer.optimizer.param_groups[-1]["params"]) == 162
        assert len(gated_modules(new_yolo(trainer.last).model)) == 81

    @pytest.mark.parametrize("optimizer", ["MuSGD", "SGD"])
    def test_a_new_run_takes_over_gates_that_moved(self, folder: Path, stopped: Path, optimizer: str) -> None:
        yolo = new_yolo(stopped)
        move_gates(yolo.model.requires_grad_())
        trainer = train(yolo, folder, optimizer, optimizer=optimizer, lr0=1e-4)
        weights = normswap.importance_weights(trainer.model)
        assert all(abs(value - 0.5) < 0.02 for site in weights.values() for value in (site.mean["bn"], site.var["bn"]))
        gates = trainer.optimizer.param_groups[-1]
        assert (len(gates["params"]), gates["weight_decay"], gates["param_group"]) == (162, 0.0, "bn")
        final = new_yolo(trainer.best)
        found = final.val(data=str(folder / "data.yaml"), imgsz=SIZE, plots=False, workers=0, device="cpu")
        assert np.isfinite(found.box.map)
        assert len(gated_modules(final.model)) == 81

    def test_norms_of_a_network_at_bn_are_folded(self) -> None:
        model = convert_yolo(new_yolo("yolo11n.yaml").model, None)
        x = torch.rand(2, 3, SIZE, SIZE)
        with torch.no_grad():
            expected = model.eval()(x)[0]
            torch.testing.assert_close(model.fuse(verbose=False)(x)[0], expected, rtol=1e-3, atol=1e-3)
        assert not gated_modules(model)

    def test_predictions_with_gates_that_moved_are_those_of_the_network(self, folder: Path, stopped: Path) -> None:
        yolo = new_yolo(stopped)
        x = torch.rand(2, 3, SIZE, SIZE)
        with torch.no_grad():
            before = yolo.model.eval()(x)[0]
            move_gates(yolo.model.requires_grad_())
            moved = yolo.model(x)[0]
            assert torch.equal(yolo.model.fuse(verbose=False)(x)[0], moved)
        assert (moved - before).abs().max() > 1e-3
        image = str(folder / "val" / "images" / "0.png")
        assert len(yolo.predict(image, imgsz=SIZE, device="cpu", verbose=False)) == 1
        assert len(gated_modules(yolo.model)) == 81

    def test_the_trainer_reaches_the_processes_of_several_gpus(self) -> None:
        cloudpickle = pytest.importorskip("cloudpickle")  # with which Ultralytics sends it
        sent = cloudpickle.loads(cloudpickle.dumps(switch_norm_trainer(new_yolo("yolo11n.yaml"))))
        assert sent.__name__ == "SwitchNormTrainer"
        assert {"get_model", "build_optimizer"} <= {*vars(sent)}
        assert [base.__name__ for base in sent.__mro__[1:3]] == ["DetectionTrainer", "BaseTrainer"]

    @pytest.mark.parametrize("task", ["detect", "segment", "classify", "pose", "obb"])
    def test_every_task_has_a_network_that_is_converted_exactly(self, task: str) -> None:
        from ultralytics.nn import tasks

        suffix = {"detect": "", "segment": "-seg", "classify": "-cls", "pose": "-pose", "obb": "-obb"}[task]
        kinds = {"detect": "DetectionModel", "segment": "SegmentationModel", "classify": "ClassificationModel",
                 "pose": "PoseModel", "obb": "OBBModel"}  # fmt: skip
        model = getattr(tasks, kinds[task])(f"yolo11n{suffix}.yaml", verbose=False)
        conversion = normswap.convert(model, torch.zeros(1, 3, 64, 64))
        assert conversion.plan.swaps
        assert normswap.verify(model, conversion.model, [torch.rand(2, 3, 64, 64)]).passed
