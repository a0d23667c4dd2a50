"""`preview_recipe`: what a run would do, found by building all of it and taking one step that nobody keeps."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from normswap.errors import TrainingError
from normswap.finetune.data.loaders import derive_seed, seed_generators
from normswap.finetune.optimization import build_optimizer, make_lr_lambda
from normswap.finetune.recipe import Recipe
from normswap.finetune.setup import RunSetup, prepare
from normswap.finetune.tables import TrainTable
from normswap.surgery.importance import gated_modules
from normswap.text import printable_as

# The shares of a run at which the preview shows the learning rates.
_SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 1.0)
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step in each process: measured on the CPU, for the first training batch.

    Attributes:
        weights: parameters and buffers.
        gradients: of the parameters that are trained.
        optimizer: the state of the optimizer after a step.
        average: the moving average of the weights.
        activations: the tensors that the forward pass saves for the backward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """The sum; allocators and temporary tensors come on top."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


@dataclass(frozen=True)
class LearningRate:
    """The learning rates of one step: of the network, and of the gates (None without gates)."""

    step: int
    lr: float
    importance_lr: float | None


@printable_as("preview_table")
@dataclass(frozen=True)
class RunPreview:
    """What a run of a recipe would do, as `normswap.preview_recipe` returns it.

    Attributes:
        recipe, task, output: the name of the recipe, its task, and the folder that the run would write.
        architecture: the name of the architecture, if it has one.
        parameters, trained: the number of parameters, and of those that are trained.
        sites: the number of converted norms.
        batches: the number of training batches of an epoch.
        batch_size, accumulation: samples per forward pass, and forward passes per step.
        inputs: the shape of each input of the model in the first training batch.
        steps: the number of steps.
        loss: the loss of the first batch.
        rates: learning rates over the run.
        memory: bytes of a step.
        notes: notes for the user on the model and the length of the run.

    Examples:
        >>> import normswap
        >>> preview = normswap.preview_recipe(normswap.read_recipe("digits_source", ["data.batch_size=8"]))
        >>> [rate.step for rate in preview.rates][-1], preview.memory.weights
        (1740, 1503072)
    """

    __module__ = "normswap"

    recipe: str
    task: str
    output: str
    architecture: str | None
    parameters: int
    trained: int
    sites: int
    batches: int
    batch_size: int
    accumulation: int
    inputs: tuple[tuple[int, ...], ...]
    steps: int
    loss: float
    rates: tuple[LearningRate, ...]
    memory: MemoryEstimate
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the values as plain data."""
        return asdict(self)


def preview_recipe(recipe: Recipe, *, trust: bool = False) -> RunPreview:
    """Build all that a run of a recipe needs, take one step, and return what the run would do; nothing is written.

    Args:
        recipe: the recipe, as `normswap.read_recipe` returns it.
        trust: run Python code that the recipe, the checkpoint or its architecture names.

    Returns:
        Sizes, number of steps, learning rates over the run, an estimate of the memory, notes.

    Raises:
        NormswapError: the error with which the run would end before its first step.
        TrainingError: the loss of the first batch is not finite.

    Examples:
        >>> import normswap
        >>> preview = normswap.preview_recipe(normswap.read_recipe("digits_source"))
        >>> preview.steps, preview.batches, preview.inputs
        (200, 10, ((64, 3, 32, 32),))
    """
    setup = prepare(recipe, trust=trust)
    model = setup.model
    batch = next(iter(setup.training))
    loss, memory, optimizer = _try_step(recipe, setup, batch)
    if not math.isfinite(loss):
        raise TrainingError(f"the loss of the first batch is {loss}: check the data and the weights of the model")
    inputs = tree_leaves(setup.task.inputs(batch))
    return RunPreview(
        recipe.name,
        recipe.task,
        str(recipe.output),
        setup.source.architecture,
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        len(gated_modules(model)),
        len(setup.training),
        recipe.data.batch_size,
        recipe.train.accumulation,
        tuple(tuple(leaf.shape) for leaf in inputs if isinstance(leaf, Tensor)),
        setup.steps,
        loss,
        _rates(recipe.train, setup, optimizer),
        memory,
        setup.notes,
    )


def _rates(train: TrainTable, setup: RunSetup, optimizer: torch.optim.Optimizer) -> tuple[LearningRate, ...]:
    """The learning rates at the start, at the end and between; gates are the last group of the optimizer."""
    factor, groups = make_lr_lambda(train, setup.steps), optimizer.param_groups
    gates = groups[-1]["lr"] if gated_modules(setup.model) else None
    steps = sorted({round(share * (setup.steps - 1)) for share in _SHARES})
    return tuple(
        LearningRate(step + 1, groups[0]["lr"] * factor(step), None if gates is None else gates * factor(step))
        for step in steps
    )


def _try_step(recipe: Recipe, setup: RunSetup, batch: Any) -> tuple[float, MemoryEstimate, torch.optim.Optimizer]:
    """The loss of a first step, its memory, and the optimizer that took it."""
    model, train = setup.model.train(), recipe.train
    if train.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, train)
    seed_generators(derive_seed(train.seed, 0, 0))
    with _measured_activations(model) as saved, _autocast(train.precision):
        loss = setup.task.compute_loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    weights = sum(map(_bytes, (*model.parameters(), *model.buffers())))
    gradients = sum(_bytes(p.grad) for p in model.parameters() if p.grad is not None)
    state = sum(_bytes(leaf) for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor))
    average = weights if train.ema_decay else 0
    return loss.item(), MemoryEstimate(weights, gradients, state, average, sum(saved.values())), optimizer


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _autocast(precision: str) -> Any:
    return torch.autocast("cpu", _AUTOCAST[precision]) if precision in _AUTOCAST else nullcontext()


@contextmanager
def _measured_activations(model: nn.Module) -> Iterator[Mapping[int, int]]:
    """Yield the sizes of the storages that the block saves for a backward pass, without those of the model."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        """Note the storage of a tensor, and save the tensor as it is."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        yield saved
