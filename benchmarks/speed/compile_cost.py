"""What `torch.compile` makes of converted networks, against their originals in one process -> docs/measured/compile.md.

Run by `make bench`; needs a C++ compiler. Compilation is told in seconds of processor time, compilers that torch starts
included, since time on the clock is that of whatever else the machine does.
"""

import copy
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters

import normswap
from benchmarks.paths import DOCS
from benchmarks.provenance import provenance

SHAPE = (4, 3, 64, 64)
ROUNDS = 15
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: timm.create_model("resnet18"),
    "efficientnet_b0": lambda: timm.create_model("efficientnet_b0"),
    "convnext_tiny of BatchNorms": lambda: timm.create_model("convnext_tiny", norm_layer="batchnorm2d", conv_mlp=True),
    "convnext_tiny": lambda: timm.create_model("convnext_tiny"),
}


class Run:
    """One network compiled by the default backend: what that cost, and a step of it."""

    def __init__(self, model: nn.Module, x: Tensor, *, training: bool) -> None:
        counters.clear()
        self.nodes = 0
        self.training = training
        self.x = x
        self.eager = copy.deepcopy(model).train(training)
        self.compiled = torch.compile(copy.deepcopy(self.eager), backend=self._counting)
        start = _processor_seconds()
        with torch.random.fork_rng():
            ours = self._values(self.compiled)
        self.seconds = _processor_seconds() - start
        self.breaks = sum(counters["graph_break"].values())
        self.error = max(_relative_error(a, b) for a, b in zip(ours, self._values(self.eager), strict=True))

    def _counting(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.nodes += len(graph.graph.nodes)
        return lookup_backend("inductor")(graph, inputs)

    def step(self, model: Any) -> Tensor:
        """Run forward, and backward in training."""
        with torch.set_grad_enabled(self.training):
            y: Tensor = model(self.x)
        if self.training:
            y.square().mean().backward()
        return y

    def _values(self, model: Any) -> tuple[Tensor, ...]:
        """The output, all gradients as one vector, and all buffers as one."""
        y = self.step(model).detach()
        return y, _joined(p.grad for p in model.parameters()), _joined(b.double() for b in model.buffers())

    def milliseconds(self, model: Any) -> float:
        """The time of one step."""
        start = time.thread_time()
        self.step(model)
        return 1000 * (time.thread_time() - start)


@dataclass(frozen=True)
class Row:
    """A network in one mode, original and converted."""

    network: str
    mode: str
    sites: int
    nodes: tuple[int, int]
    breaks: int
    seconds: tuple[float, float]
    error: float
    compiled_ratio: float
    eager_ratio: float


def main() -> None:
    """Measure, print and write docs/measured/compile.md, anew after each network."""
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # in this process, whose time is taken
    torch._inductor.config.force_disable_caches = True
    rows: list[Row] = []
    Run(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(SHAPE), training=True)
    for name, make in NETWORKS.items():
        rows += (_row(name, make, training) for training in (True, False))
        text = _document(rows)
        (DOCS / "compile.md").write_text(text)
        print(text, flush=True)


def _row(name: str, make: Callable[[], nn.Module], training: bool) -> Row:
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(SHAPE)
    conversion = normswap.convert(model, x)
    original, converted = (Run(m, x, training=training) for m in (model, conversion.model))
    arms = [(run, module) for run in (original, converted) for module in (run.compiled, run.eager)]
    times: list[list[float]] = [[] for _ in arms]
    for _ in range(ROUNDS):
        for (run, module), kept in zip(arms, times, strict=True):
            kept.append(run.milliseconds(module))
    fast, slow, fast_converted, slow_converted = map(statistics.median, times)
    return Row(
        name,
        "training" if training else "evaluation",
        len(conversion.plan.swaps),
        (original.nodes, converted.nodes),
        converted.breaks - original.breaks,
        (original.seconds, converted.seconds),
        converted.error,
        fast_converted / fast,
        slow_converted / slow,
    )


def _processor_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _joined(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([torch.zeros(1), *(tensor.flatten() for tensor in tensors if tensor is not None)])


def _relative_error(a: Tensor, b: Tensor) -> float:
    scale = float(b.double().norm())
    return float((a.double() - b.double()).norm()) / scale if scale else float(a.double().norm())


def _document(rows: list[Row]) -> str:
    lines = [
        "# What compiling costs",
        "",
        "Written by `make bench` (`benchmarks/compiling.py`).",
        provenance(),
        "",
        "`torch.compile` with the default backend (inductor) and empty caches; original and converted network in one",
        f"process on one thread, float32, batch {SHAPE[0]} at {SHAPE[2]}x{SHAPE[3]}. Training is a forward and a",
        "backward pass, evaluation runs without gradients on a freshly converted model. The machine is shared: times",
        "of one row can be compared, others cannot.",
        "",
        "- nodes: of the graph that is handed to the backend;",
        "- breaks: places where the converted network splits the graph and the original does not;",
        "- compile, s: processor time of the first step, C++ compiler included;",
        "- error: largest relative L2 between compiled and eager converted network: outputs, gradients, buffers;",
        f"- step: median time of {ROUNDS} interleaved steps, converted / original, both compiled, or both eager.",
        "",
        "| network | mode | sites | nodes | breaks | compile, s | ratio | error | step, compiled | step, eager |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, rows),
        "",
        "`convnext_tiny` as it is published has LayerNorms only: no site, nothing converted.",
        "",
    ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    (nodes, more_nodes), (seconds, more_seconds) = row.nodes, row.seconds
    return (
        f"| {row.network} | {row.mode} | {row.sites} | {nodes} -> {more_nodes} | {row.breaks} "
        f"| {seconds:.1f} -> {more_seconds:.1f} | {more_seconds / seconds:.2f} | {row.error:.0e} "
        f"| {row.compiled_ratio:.2f} | {row.eager_ratio:.2f} |"
    )


if __name__ == "__main__":
    main()
