"""Run as `python joint_processes.py FOLDER`: two processes, each with a part of one batch, by synchronized layers.

A script of its own that forks, as `two_processes.py` and for its reasons. What each process found goes to FOLDER; the
cases and the whole batches are here for the test to judge by.
"""

import copy
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch._dynamo  # which DDP would else import in each process
from torch import Tensor, distributed, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from normswap import convert, param_groups, synchronize_statistics, use_backend
from normswap.errors import LayerError
from normswap.layers import sync
from normswap.layers.backends import moment_algebra
from normswap.layers.backends.aten_passes import PLAIN_PASSES
from normswap.layers.matching import MATCHING_BUFFERS, Matching
from normswap.layers.switch_norm import SwitchNorm

ALL = ("in", "ln", "bn")
# Without batch statistics nothing is synchronized.
BATCH: Any = {"bn_statistics": "batch"}
# The node on CPU, the node as on other devices, the plain formula.
BACKENDS = ("native", "plain", "reference")
POINTS = {
    "softmax": {"in": (0.4, -0.6), "ln": (-0.3, 0.8), "bn": (0.9, 0.1)},
    "simplex": {"in": (0.2, 0.6), "ln": (0.5, 0.1), "bn": (0.3, 0.3)},
}


@dataclass(frozen=True)
class Case:
    """One layer: which batch, how many of its samples are the first process's, and how it is normalized."""

    cut: int
    gate: str = "softmax"
    branches: tuple[str, ...] = ALL
    shape: tuple[int, ...] = (4, 3, 2, 3)
    dtype: torch.dtype = torch.float64
    last: bool = False
    backend: str = "native"
    wanted: tuple[bool, bool] = (True, True)
    offset: float = 0.7
    statistics: str = "batch"
    num_groups: int = 1
    matched: bool = False


CASES = [
    *(Case(cut, gate, backend=name) for cut in (2, 3, 0) for gate in POINTS for name in BACKENDS),
    *(Case(1, branches=branches) for branches in (("ln", "bn"), ("in", "bn"), ("bn",))),
    *(Case(1, "simplex", last=True, dtype=dtype) for dtype in (torch.float64, torch.float32)),
    *(Case(4, "simplex", last=True, backend=name) for name in BACKENDS),
    *(Case(1, "simplex", dtype=dtype, backend=name) for dtype in (torch.float32, torch.bfloat16) for name in BACKENDS),
    *(Case(2, shape=(4, 3, 2, 1, 2), last=True, backend=name) for name in BACKENDS),
    # One value per channel in each process, and in one of them only.
    *(Case(1, branches=("ln", "bn"), shape=(2, 3), backend=name) for name in BACKENDS),
    *(Case(1, branches=("ln", "bn"), shape=(1, 3), backend=name) for name in BACKENDS),
    # Only one process asks for the gradient of its input; none does.
    *(Case(2, wanted=wanted, backend=name) for wanted in ((True, False), (False, False)) for name in BACKENDS),
    # Values of the joint running statistics just updated, gradients through the joint batch.
    *(Case(cut, statistics="renorm", backend=name) for cut in (1, 0) for name in BACKENDS),
    # Matched branches; groups of channels.
    *(Case(1, "simplex", shape=(4, 4, 2, 3), num_groups=2, matched=True, backend=name) for name in BACKENDS),
    *(Case(3, shape=(4, 4, 2, 3), matched=True, backend=name) for name in BACKENDS),
    *(Case(2, shape=(4, 4, 2, 3), num_groups=2, backend=name) for name in BACKENDS),
    # A mean of three thousand deviations.
    *(Case(1, "simplex", offset=3e3, dtype=torch.float32, backend=name) for name in BACKENDS),
]


def problem(case: Case) -> dict[str, Tensor]:
    """The whole batch, the gradient that comes back, parameters and running statistics, in the dtype of the case."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    channels = case.shape[1]
    found = {"x": random(*case.shape) + case.offset, "dy": random(*case.shape)}
    found |= {"weight": random(channels).abs() + 0.5, "bias": random(channels)}
    found |= {"running_mean": random(channels), "running_var": random(channels).abs() + 0.5}
    points = torch.tensor([POINTS[case.gate][branch] for branch in case.branches]).double()
    points = points / points.sum(0) if case.gate == "simplex" else points
    found |= {"mean_weight": points[:, 0].clone(), "var_weight": points[:, 1].clone()}
    return {name: tensor.to(case.dtype) for name, tensor in found.items()}


def matching_of(case: Case) -> Matching:
    """The constants of the matched branches of a case."""
    if not case.matched:
        return Matching()
    generator = torch.Generator().manual_seed(4)
    shift, *scales = (torch.rand(case.shape[1], generator=generator).double() for _ in range(3))
    return Matching(shift - 0.5, *(scale + 0.5 for scale in scales))


def layer_of(case: Case, **options: Any) -> SwitchNorm:
    given = problem(case)
    layer = SwitchNorm(
        case.shape[1],
        1e-3,
        0.3,
        gate=case.gate,
        branches=case.branches,
        synchronize=True,
        dtype=case.dtype,
        bn_statistics=case.statistics,
        **options,
    )
    layer.num_groups = case.num_groups
    for name, constant in zip(MATCHING_BUFFERS, matching_of(case), strict=True):
        layer.register_buffer(name, constant)
    state = {name: tensor for name, tensor in given.items() if name not in ("x", "dy")}
    state |= {name: tensor for name, tensor in layer.named_buffers() if name in MATCHING_BUFFERS}
    layer.load_state_dict({**state, "num_batches_tracked": torch.tensor(0)})
    return layer


def part(case: Case, rank: int, name: str = "x") -> Tensor:
    """What the process has of the batch."""
    mine = problem(case)[name].split([case.cut, case.shape[0] - case.cut])[rank]
    if case.last:
        mine = mine.contiguous(memory_format=torch.channels_last if mine.dim() == 4 else torch.channels_last_3d)
    return mine


def step(layer: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor | None]:
    """Output, gradients and buffers of one call."""
    y = layer(x)
    y.backward(dy)
    found = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    return found | {name: buffer.clone() for name, buffer in layer.named_buffers()}


def normalise(case: Case, rank: int) -> dict[str, Tensor | None]:
    x, dy = part(case, rank).requires_grad_(case.wanted[rank]), part(case, rank, "dy")
    with by_backend(case.backend):
        return step(layer_of(case), x, dy)


@contextmanager
def by_backend(name: str) -> Iterator[None]:
    """Normalize on CPU as on some device."""
    with use_backend("reference" if name == "reference" else "native"):
        before = sync.passes_for, moment_algebra._as_array
        if name == "plain":
            sync.passes_for, moment_algebra._as_array = lambda x: PLAIN_PASSES, lambda tensor: tensor
        yield
        sync.passes_for, moment_algebra._as_array = before


# --- what else can be done with a synchronized layer ------------------------------------------------------------------

SINGLE = Case(1, branches=("ln", "bn"), shape=(1, 3))
EMPTY = Case(0, "simplex")
UNEVEN = Case(1, "simplex")


def checkpointed(rank: int) -> list[dict[str, Tensor | None]]:
    """By both ways of running a segment again; in the second process everything, in the first nothing is normalized."""
    found = []
    for reentrant in (False, True):
        layer, x = layer_of(EMPTY), part(EMPTY, rank).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.backward(part(EMPTY, rank, "dy"))
        found.append({"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}})
    return found


def second_derivatives(rank: int) -> dict[str, Tensor]:
    """The gradient of the squared norm of the gradient of all x, which goes through all processes twice."""
    found = {}
    for name in BACKENDS:
        with by_backend(name):
            layer, x = layer_of(UNEVEN), part(UNEVEN, rank).requires_grad_()
            (dx,) = torch.autograd.grad((layer(x) * part(UNEVEN, rank, "dy")).sum(), x, create_graph=True)
            (found[name],) = torch.autograd.grad(dx.square().sum(), x)
    return found


def differentiable(rank: int) -> dict[str, Tensor]:
    """The same first gradient where the second process asks for that of its weight only."""
    found = {}
    for name in BACKENDS[:2]:
        with by_backend(name):
            layer, x = layer_of(UNEVEN), part(UNEVEN, rank).requires_grad_(rank == 0)
            loss = (layer(x) * part(UNEVEN, rank, "dy")).sum()
            (found[name],) = torch.autograd.grad(loss, layer.weight if rank else x, create_graph=True)
    return {name: gradient.detach() for name, gradient in found.items()}


def updated_between(rank: int) -> dict[str, Tensor]:
    """Gradients of a call that used running statistics, which the next call changes before the backward pass."""
    found = {}
    for name in BACKENDS:
        with by_backend(name):
            layer, x = layer_of(SINGLE), part(SINGLE, rank).requires_grad_()
            y = layer(x)
            layer(torch.ones(4, 3).double() + rank)
            y.backward(part(SINGLE, rank, "dy"))
            found[name] = cast(Tensor, x.grad)
    return found


def compiled(rank: int) -> dict[str, Any]:
    layer, x = layer_of(UNEVEN), part(UNEVEN, rank).requires_grad_()
    found = step(torch.compile(layer, backend="eager"), x, part(UNEVEN, rank, "dy"))
    try:
        torch.compile(layer_of(UNEVEN), backend="eager", fullgraph=True)(part(UNEVEN, rank))
    except torch._dynamo.exc.Unsupported as error:
        found["refused"] = str(error)
    return {name.removeprefix("_orig_mod."): value for name, value in found.items()}


def kept(rank: int) -> dict[str, list[int]]:
    """How many entries each tensor has that is kept for the backward pass."""
    found = {}
    for name in BACKENDS:
        tensors: dict[int, int] = {}
        layer, x = layer_of(UNEVEN), torch.randn(2, 3, 8, 8).double().requires_grad_()
        with by_backend(name), saved_tensors_hooks(lambda t, to=tensors: to.update({t.data_ptr(): t.numel()}), id):  # type: ignore[misc]
            layer(x).sum()
        found[name] = sorted(tensors.values())
    return found


def groups(rank: int) -> dict[str, Any]:
    """By a group of its own each process is alone; a copy shares the group, a pickle does not hold it."""
    alone = [distributed.new_group([each]) for each in (0, 1)][rank]
    both = distributed.new_group([0, 1])
    layers = {"alone": layer_of(UNEVEN, process_group=alone), "both": layer_of(UNEVEN, process_group=both)}
    layers["copied"] = copy.deepcopy(layers["alone"])
    file = io.BytesIO()
    torch.save(layers["alone"], file)
    file.seek(0)
    layers["loaded"] = torch.load(file, weights_only=False)
    layers["local"] = layer_of(UNEVEN)
    layers["local"].synchronize = False
    sync = nn.Sequential(nn.SyncBatchNorm(3, process_group=both))
    taken = convert(sync, bn_statistics="batch").model[0]
    groups = {"copied": layers["copied"].process_group is alone, "taken over": taken.process_group is both}
    return {name: layer(part(UNEVEN, rank)).detach() for name, layer in layers.items()} | {"groups": groups}


def refused(rank: int) -> str:
    with torch.set_grad_enabled(rank == 0):
        try:
            layer_of(UNEVEN)(part(UNEVEN, rank).requires_grad_())
        except LayerError as error:
            return str(error)
    return ""


def silent(rank: int) -> Tensor:
    """In training without gradients both have to call; in evaluation one can alone, and is not kept waiting."""
    layer = layer_of(UNEVEN)
    with torch.no_grad():
        layer(part(UNEVEN, rank))
    layer.eval()
    if rank == 0:
        layer(part(UNEVEN, rank).requires_grad_()).sum().backward()
    return layer.running_mean


# --- training a network -----------------------------------------------------------------------------------------------

SAMPLES, STEPS = 6, 3


def network(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), norm(8), nn.Flatten(2)
    ).double()


def batches() -> list[Tensor]:
    return list(torch.randn(STEPS, SAMPLES, 3, 6, 6, generator=torch.Generator().manual_seed(7)).double())


def train(model: nn.Module, parts: list[Tensor], weight: float) -> dict[str, Tensor]:
    """SGD on the mean over all samples of a loss; `weight` is what the trainer makes of the sum over local ones."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x in parts:
        optimizer.zero_grad()
        (model(x).pow(3).sum() * weight).backward()
        optimizer.step()
    # As the optimizer has left them: a state dict would put points back on the simplex.
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name.removeprefix("module."): tensor.detach().clone() for name, tensor in found.items()}


def trained(rank: int) -> list[dict[str, Tensor]]:
    """Layers synchronized by `convert`, later, and in place of SyncBatchNorm, each in DDP, which averages gradients."""
    converted = [
        convert(network(), torch.zeros(2, 3, 6, 6).double(), synchronize=True, **BATCH).model,
        convert(network(), torch.zeros(2, 3, 6, 6).double(), **BATCH).model,
        convert(network(nn.SyncBatchNorm), torch.zeros(2, 3, 6, 6).double(), **BATCH).model,
    ]
    assert synchronize_statistics(converted[1]) == ["1", "4"]
    parts = [x.split([2, SAMPLES - 2])[rank] for x in batches()]
    return [train(DistributedDataParallel(model), parts, 2 / SAMPLES) for model in converted]


def sharded(rank: int) -> dict[str, Tensor]:
    """By fully_shard, which leaves the gates alone: their gradients are averaged beside it."""
    model = convert(network(), torch.zeros(2, 3, 6, 6).double(), synchronize=True, **BATCH).model
    gates = param_groups(model)[-1]["params"]
    for gate in gates:
        gate.register_post_accumulate_grad_hook(average)
    fully_shard(model, ignored_params=set(gates))
    parts = [x.split([2, SAMPLES - 2])[rank] for x in batches()]
    with warnings.catch_warnings():
        # The network's output is a view, which torch warns of where it might be written to; nobody does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        found = train(model, parts, 2 / SAMPLES)
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}


def average(gate: Tensor) -> None:
    assert gate.grad is not None
    distributed.all_reduce(gate.grad)
    gate.grad /= distributed.get_world_size()


def run(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    results = {"cases": [normalise(case, rank) for case in CASES]}
    tasks: tuple[Callable[[int], Any], ...] = (checkpointed, second_derivatives, differentiable, updated_between)
    for task in (*tasks, compiled, kept, groups, refused, silent, trained, sharded):
        results[task.__name__] = task(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    other = os.fork()
    run(0 if other else 1, sys.argv[1])
    if other:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
