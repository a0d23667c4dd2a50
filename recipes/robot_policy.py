"""A policy that pushes a block to a goal, from camera images: the task of the recipe `robot_policy`.

The world is a table of 2 x 2 with a round pusher, a round block and a goal. A policy sees an image and the position of
the pusher, and returns the place (2,) where the pusher shall go next. It learns by behaviour cloning: the mean squared
difference from the actions of an expert, which knows all positions. The metric lets the policy act, and counts the
blocks that reach the goal.

In the domain "source" all scenes have the same colours, light and camera. In "target" the camera is turned, moved and
farther away, the colours are others, and light and colours differ from episode to episode.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss, normalize
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset, default_collate
from torchmetrics import MeanMetric, Metric
from torchvision.models import resnet18

Batch = Mapping[str, Any]
Scene = Mapping[str, Tensor]

IMAGE_SIZE = 48
# Positions are (pusher, block, goal). The metric lets a policy act for as many steps as the expert.
STEPS, SPEED, TOLERANCE = 36, 0.12, 0.2
PUSHER, BLOCK, GOAL = 0.14, 0.2, 0.24
_REACH = PUSHER + BLOCK
_FIRST_SEEDS = {"train": 0, "validation": 1_000_000, "test": 2_000_000}
_TARGET_SEED = 10_000_000
_MEAN, _DEVIATION = 0.35, 0.25


class Policy(nn.Module):
    """A ResNet-18 that keeps the places in its last map, and a head that also gets the position of the pusher."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = resnet18(weights=None)
        self.encoder.avgpool = nn.Identity()
        places = math.ceil(IMAGE_SIZE / 32) ** 2
        self.encoder.fc = nn.Linear(512 * places, width)
        self.head = nn.Sequential(nn.Linear(width + 2, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, image: Tensor, pusher: Tensor) -> Tensor:
        """Return actions (N, 2) for images (N, 3, IMAGE_SIZE, IMAGE_SIZE) and positions (N, 2)."""
        features = self.encoder(image).relu()
        action: Tensor = self.head(torch.cat([features, pusher.to(features)], 1))
        return action


def build_model(width: int = 128) -> nn.Module:
    """Return the policy, with `width` features of an image."""
    return Policy(width)


# --- the world --------------------------------------------------------------------------------------------------------


def start_worlds(count: int, generator: Generator) -> Tensor:
    """Return random positions (N, 3, 2) of pusher, block and goal that do not touch."""
    angle = torch.rand(count, 2, generator=generator) * 2 * math.pi
    directions = torch.stack([angle.cos(), angle.sin()], -1)
    block = torch.rand(count, 2, generator=generator) - 0.5
    distances = torch.rand(count, 2, 1, generator=generator) * 0.4 + 0.45
    # A goal or pusher that would be beyond the border is on the other side of the block.
    others = block[:, None] + distances * directions
    others = torch.where((others.abs() > 0.85).any(-1, keepdim=True), block[:, None] - distances * directions, others)
    others = others.clamp(-0.85, 0.85)
    return torch.stack([others[:, 0], block, others[:, 1]], 1)


def move(worlds: Tensor, actions: Tensor) -> Tensor:
    """Return the positions (N, 3, 2) after a step of the pusher, with which a block goes along that it touches."""
    pusher, block, goal = worlds.unbind(1)
    step = actions - pusher
    pusher = (pusher + step * (SPEED / step.norm(dim=1, keepdim=True).clamp_min(SPEED))).clamp(-1, 1)
    offset = block - pusher
    pushed = pusher + _REACH * normalize(offset, dim=1)
    block = torch.where(offset.norm(dim=1, keepdim=True) < _REACH, pushed, block)
    return torch.stack([pusher, block.clamp(-1, 1), goal], 1)


def act_as_expert(worlds: Tensor) -> Tensor:
    """Return the actions (N, 2) of the expert: go behind the block, around it if need be, and push it to the goal."""
    pusher, block, goal = worlds.unbind(1)
    ahead = normalize(goal - block, dim=1)
    from_block = normalize(pusher - block, dim=1)
    is_behind = (from_block * ahead).sum(1, keepdim=True) < -0.9
    is_near = (pusher - block).norm(dim=1, keepdim=True) < _REACH + SPEED
    # Around the block on the shorter side.
    side = torch.stack([-from_block[:, 1], from_block[:, 0]], 1)
    side = side * torch.where((side * ahead).sum(1, keepdim=True) > 0, -1.0, 1.0)
    around = block + (_REACH + 0.05) * normalize(side + from_block, dim=1)
    behind = block - ahead * _REACH
    return torch.where(is_near, torch.where(is_behind, behind + 1.5 * SPEED * ahead, around), behind)


def is_done(worlds: Tensor) -> Tensor:
    """Return for each world (N,) whether the block is at the goal."""
    return (worlds[:, 1] - worlds[:, 2]).norm(dim=1) < TOLERANCE


# --- images -----------------------------------------------------------------------------------------------------------


def make_scene(generator: Generator, domain: str) -> Scene:
    """Return what an episode looks like: colours of table, goal, block and pusher, light, camera, texture of the table.

    The camera is (zoom, cosine, sine, offset): the place of a point is zoom * rotated point + offset.
    """
    shape = (1, IMAGE_SIZE, IMAGE_SIZE)
    colours = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.6, 0.1], [0.8, 0.2, 0.2], [0.2, 0.3, 0.9]])
    if domain == "source":
        light, camera = torch.tensor([1.0, 0, 0]), torch.tensor([1.0, 1, 0, 0, 0])
        return {"colours": colours, "light": light, "camera": camera, "texture": torch.zeros(shape)}
    colours = colours + 0.2 + _uniform(generator, -0.15, 0.15, 4, 3)
    strength = math.exp(_uniform(generator, math.log(0.3), math.log(2.0), 1).item())
    light = torch.cat([torch.tensor([strength]), strength * _uniform(generator, -0.4, 0.4, 2)])
    angle = math.radians(_uniform(generator, 4, 10, 1).item())
    turn = torch.tensor([math.cos(angle), math.sin(angle)])
    camera = torch.cat([_uniform(generator, 0.85, 0.95, 1), turn, _uniform(generator, -0.05, 0.05, 2)])
    return {"colours": colours, "light": light, "camera": camera, "texture": _uniform(generator, -0.05, 0.05, *shape)}


def _uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator) * (high - low) + low


def render(worlds: Tensor, scenes: Scene) -> Tensor:
    """Return normalized images (N, 3, IMAGE_SIZE, IMAGE_SIZE) of worlds (N, 3, 2), each in its scene."""
    axis = (torch.arange(IMAGE_SIZE, device=worlds.device) + 0.5) * 2 / IMAGE_SIZE - 1
    zoom, cosine, sine, *offset = (value[:, None] for value in scenes["camera"].unbind(1))
    x, y = worlds.flip(1).unbind(2)  # (N, 3): goal, block, pusher, each in front of the one before
    x, y = zoom * (cosine * x - sine * y) + offset[0], zoom * (sine * x + cosine * y) + offset[1]
    radius = zoom * torch.tensor([GOAL, BLOCK, PUSHER], device=worlds.device)
    to_x, to_y = (axis - x[..., None]).square(), (axis - y[..., None]).square()
    inside = radius.square()[..., None, None] - to_y[..., None] - to_x[..., None, :]
    goal, block, pusher = (inside * (IMAGE_SIZE / 4 / radius)[..., None, None] + 0.5).clamp(0, 1).unbind(1)
    seen = [(1 - goal) * (1 - block) * (1 - pusher), goal * (1 - block) * (1 - pusher), block * (1 - pusher), pusher]
    image = torch.einsum("nkhw,nkc->nchw", torch.stack(seen, 1), scenes["colours"])
    strength, to_right, to_bottom = scenes["light"][..., None, None].unbind(1)
    light = strength + to_right * axis + to_bottom * axis[:, None]
    return (((image + scenes["texture"]) * light[:, None]).clamp(0, 1) - _MEAN) / _DEVIATION


# --- data, loss, metrics ----------------------------------------------------------------------------------------------


class Demonstrations(Dataset[Batch]):
    """The steps of an expert, or only the starts of episodes, with image, pusher, action, world and scene.

    Args:
        seed: of the episodes.
        count: how many episodes.
        domain: "source" or "target".
        length: steps of an episode.
    """

    def __init__(self, *, seed: int, count: int, domain: str, length: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        scenes = default_collate([make_scene(generator, domain) for _ in range(count)])
        worlds, found = start_worlds(count, generator), []
        for _ in range(length):
            actions = act_as_expert(worlds)
            image, pusher = render(worlds, scenes), worlds[:, 0]
            found.append({"image": image, "pusher": pusher, "action": actions, "world": worlds, "scene": scenes})
            # With noise in its actions the expert also shows how to correct an error.
            worlds = move(worlds, actions + 0.1 * torch.randn(count, 2, generator=generator))
        self._samples: Batch = tree_map(lambda *steps: torch.cat(steps), *found)

    def __len__(self) -> int:
        return len(self._samples["image"])

    def __getitem__(self, index: int) -> Batch:
        found: Batch = tree_map(lambda values: values[index], self._samples)
        return found


def open_data(split: str, domain: str = "target", episodes: int = 64, evaluation_episodes: int = 100) -> Demonstrations:
    """Return demonstrations for training, and the starts of other episodes for evaluation."""
    seed = _FIRST_SEEDS[split] + (_TARGET_SEED if domain == "target" else 0)
    if split == "train":
        return Demonstrations(seed=seed, count=episodes, domain=domain, length=STEPS)
    return Demonstrations(seed=seed, count=evaluation_episodes, domain=domain, length=1)


def example_inputs(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the inputs of the policy in a batch."""
    return batch["image"], batch["pusher"]


def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared difference from the actions of the expert."""
    return mse_loss(model(*example_inputs(batch)), batch["action"])


def build_metrics() -> dict[str, Metric]:
    """Return the share of episodes in which the block reaches the goal, and the error of the actions."""
    return {"success": MeanMetric(), "action error": MeanMetric()}


def update_metrics(metrics: Mapping[str, Metric], model: nn.Module, batch: Batch) -> None:
    """Let the policy act from the starts in a batch; its actions are compared with the expert's along the way."""
    worlds, errors, reached = batch["world"], [], []
    for _ in range(STEPS):
        actions = model(render(worlds, batch["scene"]), worlds[:, 0])
        errors.append((actions - act_as_expert(worlds)).norm(dim=1))
        worlds = move(worlds, actions)
        reached.append(is_done(worlds))
    metrics["success"].update(torch.stack(reached).any(0).float())
    metrics["action error"].update(torch.stack(errors))
