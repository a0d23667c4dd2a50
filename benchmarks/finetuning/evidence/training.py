"""One run: prepare an arm, fine-tune it and measure it. Also a digest of what an arm does.

All arms of a setting get the same inputs in the same order, the same number of steps and the same optimizer.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from benchmarks.finetuning.evidence.arms import ALL, Arm, norm_layers
from benchmarks.finetuning.evidence.norms import SlowTracking, batch_norms, chunks, reestimate
from benchmarks.finetuning.evidence.settings.task import Examples, Task
from benchmarks.finetuning.training import batch_order
from normswap.surgery.importance import gate_parameters, gated_modules
from normswap.training.gate_steps import limit_gate_steps

WEIGHT_DECAY, CLIP = 1e-4, 1.0
_LAST_LOSSES = 20


@dataclass(frozen=True)
class Outcome:
    """The result of one run. Scores are in percent.

    Args:
        validation: on the validation inputs; selects rates.
        test: on the test inputs; None if it was not asked for.
        form: "re-estimated" if statistics were re-estimated after training, since that was better in validation.
        loss: mean of the last 20 steps, None if it is not finite.
        bn_share: mean importance weight of `bn` after training; None without gates.
    """

    validation: float
    test: float | None
    form: str
    loss: float | None
    bn_share: float | None


def run(
    arm: Arm,
    task: Task,
    *,
    rate: float,
    gate_rate: float | None = None,
    steps: int,
    batch: int,
    seed: int,
    tests: bool = True,
) -> Outcome:
    """Prepare, fine-tune and measure one arm; None: gates have the rate that normswap chooses."""
    torch.manual_seed(seed)
    model = arm.prepare(task.network, task)
    losses = finetune(arm, model, task, rate=rate, gate_rate=gate_rate, steps=steps, batch=batch, seed=seed)
    validation, form = task.evaluate(model, task.validation), ""
    if arm.reestimates_after:
        own = {name: value.clone() for name, value in model.state_dict().items()}
        reestimate(model, batch_norms(model), chunks(task.train.inputs, task.to_input))
        other = task.evaluate(model, task.validation)
        if other > validation:
            validation, form = other, "re-estimated"
        else:
            model.load_state_dict(own)
    return Outcome(
        validation=validation,
        test=task.evaluate(model, task.test) if tests else None,
        form=form,
        loss=_mean_of_last(losses),
        bn_share=bn_share(model),
    )


def finetune(
    arm: Arm,
    model: nn.Module,
    task: Task,
    *,
    rate: float,
    gate_rate: float | None = None,
    steps: int,
    batch: int,
    seed: int,
    extra_loss: Callable[[nn.Module, float], Tensor | float] = lambda model, share: 0.0,
) -> list[float]:
    """Fine-tune `model` in place; return the loss of every step, without penalties. It ends if that is not finite.

    `extra_loss` gets the model and the share of the run that is done, and returns another penalty.
    """
    set_training_mode(arm, model)
    optimizer, network = build_optimizer(model, rate=rate, gate_rate=gate_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    tracking = SlowTracking(gated_modules(model).values(), arm.momentum) if arm.momentum else None
    losses = []
    inputs, targets = task.train
    for step, index in enumerate(batch_order(len(inputs), steps=steps, batch_size=batch, seed=seed)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(task.to_input(inputs[index])), targets[index])
        penalty = arm.penalty * normswap.batch_dependence(model) if arm.penalty else 0.0
        (loss + penalty + extra_loss(model, step / steps)).backward()
        nn.utils.clip_grad_norm_(network, CLIP)
        optimizer.step()
        schedule.step()
        if tracking is not None:
            tracking.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    return losses


def set_training_mode(arm: Arm, model: nn.Module) -> None:
    """Set the modes of all modules, and which parameters are trained."""
    model.train()
    if arm.freezes_statistics:
        for layer in batch_norms(model):
            layer.eval()
    if arm.trained == "all":
        return
    affine = {parameter for layer in norm_layers(model) for parameter in layer.parameters(recurse=False)}
    *_, head = (module for module in model.modules() if [*module.parameters(recurse=False)] and not _is_norm(module))
    trained = affine | set(head.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained if arm.trained == "norms" else parameter not in affine)


def _is_norm(module: nn.Module) -> bool:
    return module in set(norm_layers(module))


def build_optimizer(
    model: nn.Module, *, rate: float, gate_rate: float | None
) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """Return AdamW, and the parameters other than gates, whose gradients are clipped.

    Parameters with one dimension, and gates, have no weight decay. The steps of simplex gates are limited, as in the
    recipes of normswap.
    """
    groups = normswap.param_groups(model, lr=rate, weight_decay=WEIGHT_DECAY, importance_lr=gate_rate)
    optimizer = torch.optim.AdamW(groups, rate, fused=True)  # a third of a step at batch size 1 otherwise
    gates = set(gate_parameters(model).values())
    if gates:
        limit_gate_steps(model, optimizer)
    return optimizer, [p for p in model.parameters() if p.requires_grad and p not in gates]


def bn_share(model: nn.Module) -> float | None:
    """Return the mean importance weight of `bn` over all sites and both gates."""
    sites = normswap.importance_weights(model).values()
    shares = [kind.get("bn", 0.0) for site in sites for kind in (site.mean, site.var)]
    return sum(shares) / len(shares) if shares else None


def _mean_of_last(losses: list[float]) -> float | None:
    last = losses[-_LAST_LOSSES:]
    value = sum(last) / len(last)
    return value if math.isfinite(value) else None


# --- what an arm does, as a digest ------------------------------------------------------------------------------------


@cache
def fingerprint(name: str) -> str:
    """Return a digest of what an arm does in a few steps on a tiny network in float64, rounded to 6 digits.

    It changes with everything that changes results: the arm, its layers, normswap's conversion, the optimizer. It does
    not change with a rewrite that computes the same.
    """
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        digest = hashlib.sha256()
        for outputs in _trial(ALL[name]):
            rounded = (outputs / outputs.abs().max() * 1e6).round().to(torch.int64)
            digest.update(",".join(map(str, rounded.flatten().tolist())).encode())
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    return digest.hexdigest()[:12]


def _trial(arm: Arm) -> Iterator[Tensor]:
    """Yield outputs of the tiny network after the preparation, in evaluation and after training."""
    task = _tiny_task()
    torch.manual_seed(0)
    model = arm.prepare(task.network, task)
    yield model(task.example(8)).detach()
    finetune(arm, model, task, rate=1e-3, gate_rate=arm.gate_rate, steps=8, batch=2, seed=0)
    if arm.reestimates_after:
        reestimate(model, batch_norms(model), chunks(task.train.inputs, task.to_input))
    yield model.eval()(task.example(8)).detach()


def _tiny_task() -> Task:
    """Return a network with two trained BN sites and an untrained one, and a few random inputs."""
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 12), (12, 12), (12, 12)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for bn in batch_norms(network)[:2]:
            bn.weight.add_(1)
            bn.running_mean.copy_(0.2 * torch.randn(12, generator=generator, dtype=torch.float64))
            bn.running_var.copy_(0.5 + torch.rand(12, generator=generator, dtype=torch.float64))
            bn.num_batches_tracked.fill_(7)
    inputs = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64)
    examples = Examples(inputs, torch.arange(8) % 3)
    return Task(network.eval(), examples, examples, examples, to_input=Tensor.double)
