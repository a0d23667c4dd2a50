"""`run_recipe`: one training loop on accelerate, which handles devices, autocast and several processes.

Every choice comes from the recipe. Every random number follows from the seed and the number of the batch, and states
are saved between two steps, so that an interrupted and resumed run ends with the same weights as an uninterrupted one.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from torch import Tensor, distributed, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_map

from normswap.errors import RunInterrupted, TrainingError
from normswap.finetune.data.loaders import derive_seed, seed_generators
from normswap.finetune.model_source import MODEL, STATE
from normswap.finetune.optimization import build_average, build_optimizer, gate_penalty, limit_steps, make_lr_lambda
from normswap.finetune.recipe import Recipe
from normswap.finetune.run_files import (
    Journal,
    Outcome,
    RunState,
    StopRequest,
    handle_stop_signals,
    read_state,
    write_model,
    write_state,
)
from normswap.finetune.setup import RunSetup, prepare
from normswap.finetune.sharding import Weights, check_launch, distribute_weights, share_tensors
from normswap.finetune.tasks.interface import Batches, Evaluation, OwnLoop, OwnLoopRun
from normswap.model_state import training_flags
from normswap.surgery.importance import gate_parameters, importance_weights
from normswap.training.output_watch import OutputWatch

# The watch for outputs that died runs the model on so many images every so many steps.
_WATCHED_IMAGES, _WATCH_EVERY = 8, 100

# --- evaluation -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(run: "_Run") -> Evaluation:
    """Return loss and metrics on the evaluation split of all processes; the model's training flags are restored."""
    accelerator, task = run.accelerator, run.prepared.task
    with run.weights.whole(run.kept) as model:
        meter = task.make_meter(model, accelerator.device)
        with training_flags(list(model.modules()), training=False), accelerator.autocast():
            for batch in run.prepared.evaluation:
                meter.update(model, send_to_device(batch, accelerator.device))
    return meter.compute(accelerator)


# --- a run ------------------------------------------------------------------------------------------------------------

Record = Mapping[str, Any]
WriteRecord = Callable[[Record], None]


@dataclass
class _Run:
    """Everything that a step needs; `losses` are those of the steps since the last line of the log."""

    recipe: Recipe
    accelerator: Accelerator
    prepared: RunSetup
    weights: Weights
    optimizer: Any
    schedule: LambdaLR
    average: Any
    steps: int
    step: int = 0
    seconds: float = 0.0
    saved: int | None = None
    before: Evaluation | None = None
    losses: list[Tensor] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        return self.prepared.model

    @property
    def kept(self) -> nn.Module:
        """The weights that are evaluated and saved as the result."""
        return self.average.module if self.average is not None else self.model


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trust: bool = False,
    on_record: Callable[[Record], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Run a recipe: load the model, convert and verify it, train, evaluate, save.

    Under `torchrun` or `accelerate launch` every process trains on its own part of the images, and the first process
    writes the files. After SIGINT or SIGTERM the run finishes the step, saves its state, and raises `RunInterrupted`.

    Args:
        recipe: the recipe, as `normswap.read_recipe` returns it.
        resume: continue from the saved state in the folder of the run.
        overwrite: start from the beginning even if the folder has a saved state.
        trust: run Python code that the checkpoint or its architecture names.
        on_record: called with every line of the log, in the first process.
        on_step: called after every step with its number and the number of all steps.

    Returns:
        Loss and accuracy before and after training, the files, the learned importance weights.

    Raises:
        RunInterrupted: a signal stopped the run; the state is saved.
        TrainingError: the loss is not finite, or the log cannot be written; the last saved state is kept.
        NormswapError: any error of reading, converting, opening data and saving.

    Examples:
        >>> import normswap
        >>> recipe = normswap.read_recipe("digits_source", ["train.steps=2", "train.warmup_steps=0"])
        >>> outcome = normswap.run_recipe(recipe)
        >>> outcome.steps, str(outcome.output)
        (2, 'runs/digits_source')
        >>> model = normswap.load(outcome.model).model
    """
    output = recipe.output
    recipe, state = _load_state(recipe, output, resume=resume, overwrite=overwrite)
    accelerator = _make_accelerator(recipe)
    run = _set_up_run(recipe, accelerator, state, trust=trust)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
    with handle_stop_signals() as request, _open_journal(run) as journal:

        def write_record(record: Record) -> None:
            for write in filter(None, (journal.write, on_record)) if journal is not None else ():
                write(record)

        return _execute(run, request, write_record, on_step or (lambda *_: None))


def is_first_process() -> bool:
    """Return whether this process writes and prints: the first of those that a launcher has started."""
    return int(os.environ.get("RANK", "0")) == 0


def _load_state(recipe: Recipe, output: Path, *, resume: bool, overwrite: bool) -> tuple[Recipe, RunState | None]:
    if resume:
        return read_state(output, recipe)
    if any((output / name).exists() for name in (STATE, MODEL)) and not overwrite:
        raise TrainingError(
            f"{output}: contains a run already: continue it with resume=True, or replace it with overwrite=True"
        )
    return recipe, None


def _make_accelerator(recipe: Recipe) -> Accelerator:
    if not distributed.is_initialized():
        # Otherwise the first run in a process sets the precision of all later ones.
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=recipe.train.precision)
    check_launch(accelerator, recipe.train.sharding)
    return accelerator


def _set_up_run(recipe: Recipe, accelerator: Accelerator, state: RunState | None, *, trust: bool) -> _Run:
    shard = accelerator.process_index, accelerator.num_processes
    prepared = prepare(recipe, state=recipe.output / STATE if state else None, trust=trust, shard=shard)
    model, train = prepared.model, recipe.train
    if train.channels_last:
        model.to(memory_format=torch.channels_last)
    model.to(accelerator.device)
    average = build_average(model, train.ema_decay)
    if average is not None and state is not None and state.average is not None:
        average.module.load_state_dict(state.average)
    weights = distribute_weights(prepared, train, average, accelerator)
    optimizer = build_optimizer(model, train)
    schedule = LambdaLR(optimizer, make_lr_lambda(train, prepared.steps))
    prepared_optimizer = accelerator.prepare(optimizer)
    run = _Run(recipe, accelerator, prepared, weights, prepared_optimizer, schedule, average, prepared.steps)
    if state is not None:
        _restore(run, state)
    limit_steps(model, optimizer, train, step=run.step)
    return run


def _restore(run: _Run, state: RunState) -> None:
    run.weights.load_optimizer_state(run.optimizer, state.optimizer)
    run.schedule.load_state_dict(dict(state.schedule))
    if run.accelerator.scaler is not None and state.scaler is not None:
        run.accelerator.scaler.load_state_dict(dict(state.scaler))
    run.step = run.saved = state.step
    run.seconds = state.seconds
    run.before = Evaluation.from_dict(state.before)


def _open_journal(run: _Run) -> Any:
    return Journal(run.recipe.output, after=run.step) if run.accelerator.is_main_process else nullcontext()


def _execute(
    run: _Run, request: StopRequest, write_record: WriteRecord, on_step: Callable[[int, int], None]
) -> Outcome:
    if run.before is None:
        facts = {"recipe": run.recipe.to_dict(), "processes": run.accelerator.num_processes}
        importance = _plain_importance(run.model)
        write_record({"step": 0, **facts, "notes": run.prepared.notes, "importance": importance})
        run.before = _evaluate_and_log(run, write_record)
    own_loop = run.prepared.task.own_loop
    if own_loop is None:
        _train(run, request, write_record, on_step)
    else:
        _train_by_own_loop(run, own_loop, write_record)
    after = _evaluate_and_log(run, write_record)
    if own_loop is None:
        _save(run, write_record)
    model = run.recipe.output / MODEL
    with run.weights.whole(run.kept) as kept:
        if run.accelerator.is_main_process:
            write_model(run.recipe.output, run.recipe, run.prepared.source, kept)
    run.accelerator.wait_for_everyone()
    importance, notes = importance_weights(run.kept), (*run.prepared.notes, *run.warnings)
    return Outcome(run.recipe.output, model, run.steps, run.seconds, run.before, after, importance, notes)


def _train(run: _Run, request: StopRequest, write_record: WriteRecord, on_step: Callable[[int, int], None]) -> None:
    """Take the remaining steps."""
    run_table = run.recipe.run
    batches = _iter_batches(run.prepared.training, first=run.step * run.recipe.train.accumulation)
    gates = set(gate_parameters(run.model).values())
    network = [parameter for parameter in run.model.parameters() if parameter not in gates]
    watch = _make_watch(run, write_record)
    run.weights.network.train()
    while run.step < run.steps:
        start_time = time.monotonic()
        _step(run, batches, network)
        run.step += 1
        run.seconds += time.monotonic() - start_time
        on_step(run.step, run.steps)
        if run.step % _WATCH_EVERY == 0:
            with run.weights.whole(run.model), run.accelerator.autocast():
                if watch is not None:
                    watch.on_step(run.step)
        _log_if_due(run, request, write_record)
        if run.step < run.steps:
            if run_table.evaluate_every and run.step % run_table.evaluate_every == 0:
                _evaluate_and_log(run, write_record)
            if run_table.save_every and run.step % run_table.save_every == 0:
                _save(run, write_record)


def _make_watch(run: _Run, write_record: WriteRecord) -> OutputWatch | None:
    """The watch for outputs that died, in the first process, which has measured the model before the next step."""

    def report(warning: str) -> None:
        run.warnings.append(warning)
        write_record({"step": run.step, "notes": [warning]})

    with run.weights.whole(run.model) as model, run.accelerator.autocast():
        if not run.accelerator.is_main_process:
            return None
        inputs = run.prepared.task.inputs(next(iter(run.prepared.evaluation)))
        if not isinstance(inputs, Tensor) or len(inputs) < 2:
            return None
        watch = OutputWatch(model, inputs[:_WATCHED_IMAGES].to(run.accelerator.device), report, every=_WATCH_EVERY)
        watch.on_step(run.step)
        return watch


def _log_if_due(run: _Run, request: StopRequest, write_record: WriteRecord) -> None:
    """Write a line of the log if it is due, and stop if a signal asked for that.

    Several processes look for signals only if a line is due: that synchronizes the processes, and host with device.
    """
    is_due = run.step % run.recipe.run.log_every == 0 or run.step == run.steps
    if is_due:
        write_record(_make_record(run))
    if (is_due or run.accelerator.num_processes == 1) and run.step < run.steps and _is_stop_requested(run, request):
        _save(run, write_record)
        raise RunInterrupted(
            f"stopped after step {run.step} of {run.steps}; the state is saved in {run.recipe.output}: continue with "
            "resume=True",
            request.number,
        )


def _iter_batches(data: Batches, *, first: int) -> Iterator[Any]:
    """Endless batches of successive epochs, from batch number `first` on."""
    epoch, start = divmod(first, len(data))
    while True:
        yield from data.epoch(epoch, first=start)
        epoch, start = epoch + 1, 0


def _step(run: _Run, batches: Iterator[Any], network: list[nn.Parameter]) -> None:
    """One update of all parameters, from `accumulation` batches in each process."""
    train, accelerator = run.recipe.train, run.accelerator
    for micro_batch in range(train.accumulation):
        batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
        if train.channels_last:
            batch = tree_map(_to_channels_last, batch)
        seed_generators(derive_seed(train.seed, accelerator.process_index, run.step * train.accumulation + micro_batch))
        is_last = micro_batch == train.accumulation - 1
        with run.weights.micro_batch(is_last=is_last):
            loss = run.prepared.task.compute_loss(run.weights.network, batch)
            run.losses.append(loss.detach())
            loss = loss / train.accumulation
            if is_last:
                loss = loss + gate_penalty(run.model, train, run.step / run.steps)
            accelerator.backward(loss)
    run.weights.finish_backward()
    if train.clip:
        accelerator.clip_grad_norm_(network, train.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.schedule.step()
    if run.average is not None:
        run.average.update(run.model, step=run.step)


def _to_channels_last(leaf: Any) -> Any:
    is_images = isinstance(leaf, Tensor) and leaf.dim() == 4
    return leaf.contiguous(memory_format=torch.channels_last) if is_images else leaf


def _train_by_own_loop(run: _Run, own_loop: OwnLoop, write_record: WriteRecord) -> None:
    """Let the function of an own task train the model. It is not interrupted between steps, and saves no state."""
    train = run.recipe.train

    def build(model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of the recipe for a model, whose gates move by its limit."""
        optimizer = build_optimizer(model, train)
        limit_steps(model, optimizer, train)
        return optimizer

    start_time = time.monotonic()
    seed_generators(derive_seed(train.seed, run.accelerator.process_index, 0))
    run.model.train()
    own_loop(
        run.model,
        OwnLoopRun(
            run.recipe,
            run.prepared.training,
            run.prepared.evaluation,
            run.recipe.own.options,
            run.accelerator.device,
            write_record,
            build,
        ),
    )
    run.step, run.seconds = run.steps, time.monotonic() - start_time


def _is_stop_requested(run: _Run, request: StopRequest) -> bool:
    """Whether a signal reached any process; the answer is the same in all of them."""
    if run.accelerator.num_processes == 1:
        return request.number is not None
    requested = torch.tensor(float(request.number is not None), device=run.accelerator.device)
    return bool(run.accelerator.reduce(requested, "sum") > 0)


def _make_record(run: _Run) -> Record:
    """A line of the log on the steps since the last one.

    Raises:
        TrainingError: one of the losses is not finite.
    """
    losses = run.accelerator.reduce(torch.stack(run.losses).float(), "mean").tolist()
    run.losses.clear()
    bad = next((number for number, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None:
        first = run.step - (len(losses) - 1 - bad) // run.recipe.train.accumulation
        kept = f"the state after step {run.saved} is kept in {run.recipe.output}" if run.saved else "no state was saved"
        raise TrainingError(
            f"the loss of step {first} is {losses[bad]}: {kept}; lower train.lr, or check the images of that step"
        )
    groups = run.optimizer.param_groups
    return {
        "step": run.step,
        "loss": sum(losses) / len(losses),
        "lr": groups[0]["lr"],
        "importance_lr": groups[-1]["lr"],
        "seconds": run.seconds,
        "importance": _plain_importance(run.model),
    }


def _plain_importance(model: nn.Module) -> dict[str, Any]:
    return {fqn: weights._asdict() for fqn, weights in importance_weights(model).items()}


def _evaluate_and_log(run: _Run, write_record: WriteRecord) -> Evaluation:
    if run.accelerator.num_processes > 1:
        share_tensors(run.kept.buffers())
    found = evaluate(run)
    write_record({"step": run.step, "evaluation": found.to_dict()})
    run.weights.network.train()
    return found


def _save(run: _Run, write_record: WriteRecord) -> None:
    """Save the state, unless one of the losses before it is not finite."""
    if run.losses:
        write_record(_make_record(run))
    run.accelerator.wait_for_everyone()
    average, optimizer = _whole_average(run), run.weights.optimizer_state(run.optimizer)
    with run.weights.whole(run.model) as model:
        if run.accelerator.is_main_process and run.before is not None:
            scaler = run.accelerator.scaler
            state = RunState(
                run.step,
                run.step * run.recipe.train.accumulation // len(run.prepared.training),
                run.seconds,
                run.before.to_dict(),
                average,
                optimizer,
                run.schedule.state_dict(),
                scaler.state_dict() if scaler is not None else None,
            )
            write_state(run.recipe.output, run.recipe, run.prepared.source, model, state)
    run.saved = run.step
    run.accelerator.wait_for_everyone()


def _whole_average(run: _Run) -> Mapping[str, Any] | None:
    """The moving average of the weights in the first process."""
    if run.average is None:
        return None
    with run.weights.whole(run.average.module) as model:
        return model.state_dict() if run.accelerator.is_main_process else None
