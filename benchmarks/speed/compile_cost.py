"""Compare converted networks with their originals under `torch.compile` (`make bench`) -> docs/measured/compile.md.

The program needs a C++ compiler. Compilation is measured in CPU time, including compilers started by torch, because
wall time depends on the load of the machine.
"""

import argparse
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
from benchmarks.paths import PAGES
from benchmarks.provenance import provenance

SHAPE = (4, 3, 64, 64)
ROUNDS = 15
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: timm.create_model("resnet18"),
    "efficientnet_b0": lambda: timm.create_model("efficientnet_b0"),
    "convnext_tiny with BatchNorm": lambda: timm.create_model("convnext_tiny", norm_layer="batchnorm2d", conv_mlp=True),
    "convnext_tiny": lambda: timm.create_model("convnext_tiny"),
}


class Run:
    """One network compiled by the default backend: the cost of compilation, and one step of it."""

    def __init__(self, model: nn.Module, x: Tensor, *, training: bool) -> None:
        counters.clear()
        self.nodes = 0
        self.training = training
        self.x = x
        self.eager = copy.deepcopy(model).train(training)
        self.compiled = torch.compile(copy.deepcopy(self.eager), backend=self._counting)
        start = _cpu_seconds()
        with torch.random.fork_rng():
            ours = self._values(self.compiled)
        self.seconds = _cpu_seconds() - start
        self.breaks = sum(counters["graph_break"].values())
        self.error = max(_relative_error(a, b) for a, b in zip(ours, self._values(self.eager), strict=True))

    def _counting(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.nodes += len(graph.graph.nodes)
        return lookup_backend("inductor")(graph, inputs)

    def step(self, model: Any) -> Tensor:
        """Run a forward pass, and a backward pass in training."""
        with torch.set_grad_enabled(self.training):
            y: Tensor = model(self.x)
        if self.training:
            y.square().mean().backward()
        return y

    def _values(self, model: Any) -> tuple[Tensor, ...]:
        """Return the output, all gradients as one vector, and all buffers as one vector."""
        y = self.step(model).detach()
        return y, _joined(p.grad for p in model.parameters()), _joined(b.double() for b in model.buffers())

    def milliseconds(self, model: Any) -> float:
        """Return the CPU time of one step."""
        start = time.thread_time()
        self.step(model)
        return 1000 * (time.thread_time() - start)


@dataclass(frozen=True)
class Row:
    """The results of one network in one mode, original and converted."""

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
    """Measure, print and write docs/measured/compile.md after each network."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # compile in this process, whose time is measured
    torch._inductor.config.force_disable_caches = True
    rows: list[Row] = []
    Run(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(SHAPE), training=True)
    for name, make in NETWORKS.items():
        rows += (_row(name, make, training) for training in (True, False))
        text = _document(rows)
        (PAGES / "compile.md").write_text(text)
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


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _joined(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([torch.zeros(1), *(tensor.flatten() for tensor in tensors if tensor is not None)])


def _relative_error(a: Tensor, b: Tensor) -> float:
    scale = float(b.double().norm())
    return float((a.double() - b.double()).norm()) / scale if scale else float(a.double().norm())


def _document(rows: list[Row]) -> str:
    lines = [
        "# Compilation",
        "",
        "Written by `make bench` (`python -m benchmarks.speed.compile_cost`).",
        provenance(),
        "",
        "`torch.compile` with the default backend (inductor) and empty caches. Original and converted network run in",
        f"one process with one thread, float32, batch size {SHAPE[0]} at {SHAPE[2]}x{SHAPE[3]}. Training is a forward",
        "and a backward pass; evaluation is a forward pass without gradients of a new conversion. The load of the",
        "machine varies, so only times of the same row are comparable.",
        "",
        "- nodes: number of nodes in the graph for the backend;",
        "- breaks: additional graph breaks in the converted network;",
        "- compile, s: CPU time of the first step, including the C++ compiler;",
        "- error: largest relative L2 distance of outputs, gradients and buffers, compiled to eager conversion;",
        f"- step: median time of {ROUNDS} interleaved steps, converted / original, both compiled, or both eager.",
        "",
        "| network | mode | sites | nodes | breaks | compile, s | ratio | error | step, compiled | step, eager |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, rows),
        "",
        "The published `convnext_tiny` has only LayerNorms: it has no sites, and nothing is converted.",
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
