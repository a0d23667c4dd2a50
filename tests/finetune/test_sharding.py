"""`train.sharding = "fsdp"`: which modules are blocks, and that two processes train as one does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock  # torch needs it too
from torch import Tensor, nn

import normswap
from normswap.errors import RecipeError
from normswap.finetune.recipe import parse_recipe
from normswap.finetune.sharding import check_launch, choose_blocks, distribute_weights
from normswap.finetune.tables import TrainTable
from normswap.finetune.trainer import run_recipe
from tests.helpers.sharding_processes import recipe, train_small

SCRIPT = Path(__file__).parents[1] / "helpers" / "sharding_processes.py"

# --- blocks -----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 9)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One layer is called twice, and the weight of another one is read without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.read, self.last = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.again(x)) @ self.read.weight)  # type: ignore[no-any-return]


def chain(*modules: nn.Module) -> nn.Sequential:
    """Modules between two layers."""
    return nn.Sequential(nn.Linear(9, 9), nn.Sequential(*modules), nn.Linear(9, 9))


BLOCKS: dict[str, tuple[nn.Module, list[str]]] = {
    "large layers": (chain(nn.Linear(9, 9)), ["0", "1.0", "2"]),
    "a small part": (nn.Sequential(nn.Linear(9, 20), nn.Sequential(nn.ReLU(), nn.Linear(20, 1))), ["0", "1"]),
    "a tiny part": (nn.Sequential(nn.Linear(9, 60), nn.PReLU(), nn.Linear(60, 9)), ["0", "2"]),
    "a shared weight": (Tied(), ["last"]),
    "called twice or never": (Twice(), ["last"]),
    "changes its input": (chain(nn.ReLU(inplace=True), nn.LayerNorm(9)), ["0", "1.1", "2"]),
    "returns a view": (chain(nn.LayerNorm(9), nn.Unflatten(1, (9,))), ["0", "1.0", "2"]),
}


@pytest.mark.parametrize(("model", "expected"), BLOCKS.values(), ids=BLOCKS)
def test_a_block_is_called_once_and_owns_its_parameters(model: nn.Module, expected: list[str]) -> None:
    assert choose_blocks(model, torch.randn(2, 9)) == expected


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs with sharded parameters in two processes, and of the same runs in one.

    The workers of xdist share it, since the runs take most of the time of these tests.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sharded"
    with FileLock(f"{folder}.lock"):
        if not (folder / "finished").exists():
            folder.mkdir()
            make_runs(folder)
            (folder / "finished").touch()
    return folder


# A relative change of the learning rate. In float32 a rounding error can move a value to the other side of a ReLU,
# which changes a gradient by far more; a run with this change shows how far such errors move the weights.
_NUDGE = 1e-5


def make_runs(folder: Path) -> None:
    """Run all cases into a folder."""
    keys: dict[str, Any] = {
        "model": {"architecture": "timm:test_resnet,num_classes=10"},
        "data": {"source": "digits:shifted", "image_size": 32},
        "train": {"steps": 1, "lr": 0.0, "importance_lr": 0.0},
        "run": {"output": str(folder / "start")},
    }
    # Running statistics of untrained sites depend on the images of each process: both start from the same ones.
    shutil.copy(run_recipe(parse_recipe("start", keys)).model, folder / "start.pt")
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    run_recipe(recipe(folder, "one", batch_size=4, sharding="none"))
    whole = recipe(folder, "nudged", batch_size=4, sharding="none")
    run_recipe(recipe(folder, "nudged", batch_size=4, sharding="none", lr=whole.train.lr * (1 + _NUDGE)))
    run_recipe(recipe(folder, "one bf16", batch_size=4, sharding="none", precision="bf16", steps=4))


def distance(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor] | None = None) -> float:
    """The difference of two sets of tensors as one vector, relative to what they moved since the start."""
    assert list(one) == list(other)
    difference = torch.cat([(one[key] - other[key]).double().flatten() for key in one])
    moved = torch.cat([(one[key] - (start[key] if start else 0)).double().flatten() for key in one])
    return float(difference.norm() / moved.norm())


@pytest.mark.multiprocess
def test_each_process_has_its_share_of_every_parameter_but_gates_and_scalars(runs: Path) -> None:
    first, second = (torch.load(runs / f"seen{rank}.pt") for rank in (0, 1))
    for seen in (first, second):
        sharded, parameters = seen["parameters"]
        assert sharded == parameters > 40
    total = first["values"][1]
    assert first["values"][0] + second["values"][0] == total
    assert second["values"][0] > 0.45 * total


@pytest.mark.multiprocess
def test_sharded_training_is_that_of_one_process_on_the_whole_batch(runs: Path) -> None:
    # Sums over images are taken in another order, with an error of 6e-8 each; 20 steps add them up.
    names = ("one/model.pt", "whole/model.pt", "nudged/model.pt", "start.pt")
    one, two, nudged, start = (torch.load(runs / name) for name in names)
    by_rounding = distance(one, nudged, start)
    assert _NUDGE / 2 < by_rounding < 1e-3
    assert distance(one, two, start) < 2 * by_rounding
    states = [torch.load(runs / name / "state.pt") for name in ("one", "whole", "nudged")]
    assert states[0]["optimizer"]["param_groups"] == states[1]["optimizer"]["param_groups"]
    momenta = [{key: s["momentum_buffer"] for key, s in state["optimizer"]["state"].items()} for state in states]
    assert distance(momenta[0], momenta[1]) < 2 * distance(momenta[0], momenta[2])


@pytest.mark.multiprocess
@pytest.mark.parametrize(("optimizer", "limit"), [("momentum", 1e-12), ("adamw", 1e-10), ("adafactorbv", 1e-2)])
def test_shards_agree_in_float64_with_joint_statistics_and_a_scalar(runs: Path, optimizer: str, limit: float) -> None:
    # adamw divides by small gradients, and the momentum of adafactorbv is bfloat16.
    first, second = (torch.load(runs / f"seen{rank}.pt")[optimizer] for rank in (0, 1))
    one = train_small(optimizer, slice(6), sharding="none")
    assert distance(one, first) < limit
    gates = [key for key in first if key.endswith(("mean_weight", "var_weight", "scale"))]
    assert gates
    assert all(torch.equal(first[key], second[key]) for key in gates)


@pytest.mark.multiprocess
def test_a_sharded_run_resumes_bit_by_bit(runs: Path) -> None:
    whole, parts = (torch.load(runs / name / "model.pt") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


@pytest.mark.multiprocess
def test_the_checkpoint_of_a_sharded_run_has_no_trace_of_shards_and_converts_back(runs: Path) -> None:
    one, two = (torch.load(runs / name / "model.pt") for name in ("one", "whole"))
    assert two._metadata == one._metadata
    assert {key: (type(value), value.dtype, value.shape) for key, value in two.items()} == {
        key: (type(value), value.dtype, value.shape) for key, value in one.items()
    }
    loaded = normswap.load(runs / "whole" / "model.pt")
    assert [step.action for step in loaded.history] == ["converted", "finetuned", "finetuned"]
    assert not [name for name, module in loaded.model.named_modules() if "FSDP" in type(module).__name__]
    reverted = normswap.revert(loaded.model, discard=True)
    assert loaded.plan is not None
    norms = [module for module in reverted.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == len(loaded.plan.swaps) == 15
    entry = normswap.load(runs / "whole" / "state.pt", entry="state_dict").model
    assert type(entry.fc.weight) is nn.Parameter


@pytest.mark.multiprocess
def test_sharded_training_in_bfloat16_keeps_weights_in_float32(runs: Path) -> None:
    one, two, start = (torch.load(runs / name) for name in ("one bf16/model.pt", "bf16/model.pt", "start.pt"))
    assert {value.dtype for value in two.values() if value.is_floating_point()} == {torch.float32}
    assert distance(one, two, start) < 0.05


@pytest.mark.multiprocess
def test_an_optimizer_that_does_not_support_shards_is_refused_before_training(runs: Path) -> None:
    for rank in (0, 1):
        assert torch.load(runs / f"seen{rank}.pt")["refused"].startswith(
            "train.optimizer = 'adafactor': does not support sharded parameters (aten."
        )
    assert not (runs / "refused").exists()


# --- refused ----------------------------------------------------------------------------------------------------------


def test_sharding_needs_several_processes(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match='"fsdp" needs several processes, but there is one: start the recipe with torchrun'
    ):
        run_recipe(recipe(tmp_path, "alone"))


@pytest.mark.parametrize("kind", ["FSDP", "DistributedType.DEEPSPEED", "environment"])
def test_sharding_by_accelerate_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "environment":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    accelerator: Any = SimpleNamespace(distributed_type="MULTI_CPU" if kind == "environment" else kind, num_processes=2)
    with pytest.raises(RecipeError, match=r'accelerate would shard the gates too.* set train.sharding = "fsdp", and'):
        check_launch(accelerator, "none")


def test_the_loop_of_an_own_task_is_refused() -> None:
    prepared: Any = SimpleNamespace(task=SimpleNamespace(own_loop=lambda *_: None))
    accelerator: Any = None
    with pytest.raises(RecipeError, match="train_model of an own task calls the model as it is, without shards"):
        distribute_weights(prepared, TrainTable(sharding="fsdp"), None, accelerator)


def test_a_scaled_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r'train\.precision: "fp16" scales the loss in each process by itself'):
        recipe(tmp_path, "half", precision="fp16")
