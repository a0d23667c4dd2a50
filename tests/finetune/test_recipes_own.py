"""The recipes for video, for a robot's policy and for published weights: worlds and clips, and a short run of each."""

import math
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import normswap
from normswap.checkpoints.architecture.registry import import_python_file
from normswap.finetune.pretrained import build_pretrained
from normswap.finetune.recipe import read_recipe, shipped_folder
from normswap.finetune.run_files import read_journal
from normswap.finetune.trainer import Outcome, run_recipe

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm closes no image


def shipped_file(name: str) -> ModuleType:
    return import_python_file(shipped_folder() / name)


def short_run(name: str, *overrides: str) -> Outcome:
    """Two steps of a recipe, whose losses are finite."""
    recipe = read_recipe(name, ["train.steps=2", "train.warmup_steps=0", "run.log_every=1", *overrides])
    outcome = run_recipe(recipe)
    losses = [record["loss"] for record in read_journal(outcome.output) if "loss" in record]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    return outcome


def sites_of(outcome: Outcome) -> int:
    """The number of converted sites in the file of a run."""
    loaded = normswap.load(outcome.model, trust=True)
    return len(normswap.importance_weights(loaded.model))


# --- video ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "axis", "sign"), [(0, -1, 1), (1, -1, -1), (2, -2, -1), (3, -2, 1)])
def test_a_patch_moves_as_its_class_says(label: int, axis: int, sign: int) -> None:
    video = shipped_file("video.py")
    patch = video.draw_patch(torch.Generator().manual_seed(0), "source")
    clip = video.show(patch, label, 2, 32, torch.Generator().manual_seed(1))
    errors = {
        step: (clip[:, 0].roll(step, axis) - clip[:, 1])[:, 8:24, 8:24].square().mean().item() for step in range(-6, 7)
    }
    assert min(errors, key=lambda step: errors[step]) * sign > 0


@pytest.mark.parametrize("label", [0, 2, 4, 6])
def test_the_opposite_motion_is_the_same_clip_backwards(label: int) -> None:
    video = shipped_file("video.py")
    patch = video.draw_patch(torch.Generator().manual_seed(0), "source")
    clips = [video.show(patch, each, 4, 24, torch.Generator().manual_seed(1)) for each in (label, label + 1)]
    torch.testing.assert_close(clips[0].flip(1), clips[1])
    assert (clips[0] - clips[1]).abs().max() > 0.1


def test_clips_follow_from_split_domain_and_index() -> None:
    video = shipped_file("video.py")
    clip, label = video.open_data("train", count=4)[3]
    assert (clip.shape, label.item()) == ((3, 4, 24, 24), 3)
    assert torch.equal(video.open_data("train", count=9)[3][0], clip)
    others = [video.open_data("test")[3][0], video.open_data("train", domain="source")[3][0]]
    assert not any(torch.equal(other, clip) for other in others)
    assert torch.equal(others[1][0], others[1][1])  # grey


@pytest.mark.slow
def test_the_recipes_for_video_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = ("own.options={domain='source', count=8, evaluation_count=8, frames=2, size=16}", "data.batch_size=4")
    source = short_run("video_source", *tiny)
    assert sites_of(source) == 0
    target = short_run("video", tiny[0].replace("source", "target"))
    assert sites_of(target) == 20  # a stem, eight blocks of two, three shortcuts
    assert list(target.after.figures) == ["accuracy"]
    assert 0 <= target.after.figures["accuracy"] <= 1
    assert target.after.images == 8


# --- the policy -------------------------------------------------------------------------------------------------------


class Pilot(torch.nn.Module):
    """A policy that knows the world, and follows the expert or stands still."""

    def __init__(self, policy: ModuleType, worlds: Tensor, follows: bool) -> None:
        super().__init__()
        self.policy, self.worlds, self.follows = policy, worlds, follows

    def forward(self, image: Tensor, pusher: Tensor) -> Tensor:
        torch.testing.assert_close(pusher, self.worlds[:, 0])
        assert torch.isfinite(image).all()
        actions = self.policy.act_as_expert(self.worlds) if self.follows else pusher
        self.worlds = self.policy.move(self.worlds, actions)
        return actions


@pytest.mark.parametrize("follows", [True, False])
def test_success_is_counted_by_letting_the_policy_act(follows: bool) -> None:
    policy = shipped_file("robot_policy.py")
    batch = torch.utils.data.default_collate([*policy.open_data("test", evaluation_episodes=20)])
    metrics = policy.build_metrics()
    policy.update_metrics(metrics, Pilot(policy, batch["world"], follows), batch)
    assert metrics["success"].compute().item() == follows
    assert (metrics["action error"].compute().item() == 0) is follows


def test_a_block_goes_along_with_the_pusher() -> None:
    policy = shipped_file("robot_policy.py")
    reach = policy.PUSHER + policy.BLOCK
    world = torch.tensor([[[0.0, 0.0], [reach + 0.05, 0.0], [0.9, 0.0]]])
    after = policy.move(world, torch.tensor([[3.0, 0.0]]))  # farther than a step
    torch.testing.assert_close(after[0, 0], torch.tensor([policy.SPEED, 0.0]))
    torch.testing.assert_close(after[0, 1], torch.tensor([policy.SPEED + reach, 0.0]))
    away = policy.move(world, torch.tensor([[-0.05, 0.0]]))
    torch.testing.assert_close(away, torch.tensor([[[-0.05, 0.0], [reach + 0.05, 0.0], [0.9, 0.0]]]))


def test_the_camera_shows_the_objects_where_they_are() -> None:
    policy = shipped_file("robot_policy.py")
    scene = policy.make_scene(torch.Generator(), "source")
    world = torch.tensor([[[-0.5, 0.5], [0.5, 0.5], [0.5, -0.5]]])
    image = policy.render(world, {name: value[None] for name, value in scene.items()})[0]
    pixels = image * 0.25 + 0.35
    quarter = policy.IMAGE_SIZE // 4
    places = {"pusher": (3 * quarter, quarter), "block": (3 * quarter, 3 * quarter), "goal": (quarter, 3 * quarter)}
    for row, name in ((3, "pusher"), (2, "block"), (1, "goal")):
        torch.testing.assert_close(pixels[:, *places[name]], scene["colours"][row])
    torch.testing.assert_close(pixels[:, 0, 0], scene["colours"][0])


@pytest.mark.slow
def test_the_recipes_for_a_policy_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = "own.options={domain='source', episodes=2, evaluation_episodes=2}"
    assert sites_of(short_run("robot_policy_source", tiny, "data.batch_size=4")) == 0
    outcome = short_run("robot_policy", tiny.replace("source", "target"))
    assert sites_of(outcome) == 20
    assert list(outcome.after.figures) == ["success", "action error"]
    assert outcome.after.figures["success"] in (0, 0.5, 1)
    assert math.isfinite(outcome.after.figures["action error"])


# --- published weights ------------------------------------------------------------------------------------------------


def write_clothes(root: Path) -> None:
    """Files of grey images as those of Fashion-MNIST: 8 for training and 4 for testing."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 8), ("t10k", 4)):
        images = np.arange(count * 28 * 28).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        labels = bytes(index % 10 for index in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels)


def write_folder(root: Path) -> None:
    """A folder of images of two classes in two splits."""
    for number, place in enumerate(f"{split}/{name}" for split in ("train", "validation") for name in ("cat", "dog")):
        (root / place).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (40, 32), (60 * number, 90 * index, 128)).save(root / place / f"{index}.png")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "source", "classes"),
    [(write_clothes, (), 10), (write_folder, ("data.source=folder:data", "data.root=none"), 2)],
)
def test_the_recipe_with_published_weights_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, source: tuple[str, ...], classes: int
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data")
    outcome = short_run("pretrained_small_batch", *source, "data.image_size=32", "train.lr=1e-6")
    assert f"model.new_head: classifier of 1000 classes replaced by one of {classes}" in "".join(outcome.notes)
    assert outcome.after.images == 4
    assert 0 <= outcome.after.accuracy <= 100
    model = normswap.load(outcome.model).model
    assert len(normswap.importance_weights(model)) == 49
    published = build_pretrained("timm:tf_efficientnet_lite0").conv_stem.weight
    torch.testing.assert_close(model.conv_stem.weight, published, rtol=0, atol=1e-3)
