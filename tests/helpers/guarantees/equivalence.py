"""Guarantee 1: original and converted model compute the same function."""

import random
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.helpers.guarantees.walking import (
    CONSTANTS,
    LIMIT,
    MODES,
    STATISTICS,
    call,
    in_float64,
    is_floating,
    own_tensors,
    paths,
    set_mode,
    to_float64,
    twin_of,
)

OWN_RESPONSES = 10


@dataclass
class Run:
    """What one pass gave: outputs, gradients of parameters and of the input, buffers and constants after it."""

    outputs: list[Any]
    gradients: dict[frozenset[str], Tensor]
    input_gradients: list[Tensor]
    buffers: dict[frozenset[str], Tensor]
    constants: dict[str, Tensor]


_TENSORS = ("running_mean", "running_var", "weight", "bias")
# The functions of torch that the zoo calls, with their parameters in order.
_CALLS: dict[Any, tuple[str, ...]] = {
    torch.nn.functional.batch_norm: ("input", *_TENSORS, "training", "momentum", "eps"),
    torch.batch_norm: ("input", *_TENSORS[2:], *_TENSORS[:2], "training", "momentum", "eps", "cudnn_enabled"),
}


class _FrozenCalls(TorchFunctionMode):
    """Calls of batch_norm with one of these running means use running statistics, as in evaluation."""

    def __init__(self, running_means: set[int]) -> None:
        super().__init__()
        self.running_means = running_means

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(_CALLS.get(func, ()), args, strict=False)) | (kwargs or {})
        if func not in _CALLS or id(given.get("running_mean")) not in self.running_means:
            return func(*args, **(kwargs or {}))
        return func(**{**given, "training": False})


@dataclass
class Frozen:
    """The sites with running statistics in training: paths of modules, and names of running means that calls use."""

    modules: set[str] = field(default_factory=set)
    running_means: set[str] = field(default_factory=set)


def frozen_sites(converted: nn.Module, inputs: Any) -> Frozen:
    """The sites of a converted model that use running statistics in training."""
    model, found = twin_of(converted), Frozen()
    used: set[int] = set()
    for path, module in paths(model).items():
        if getattr(module, "bn_statistics", None) == "running" and "bn" in module.branches:  # type: ignore[operator]
            if hasattr(module, "running_mean"):
                found.modules.add(path)
            else:
                module.register_forward_pre_hook(lambda _module, args: used.add(id(args[1])) if args[1:] else None)
                module.register_forward_pre_hook(
                    lambda _module, _args, kwargs: used.add(id(kwargs.get("running_mean"))), with_kwargs=True
                )
    for mode in ("evaluation", "training"):  # a part may run in one of them only
        set_mode(model, mode)
        with torch.no_grad(), suppress(Exception):
            call(model, inputs)
    found.running_means = {name for name, tensor in own_tensors(model) if id(tensor) in used}
    return found


def run(model: nn.Module, inputs: Any, mode: str, frozen: Frozen | None = None) -> Run:
    """One pass of a copy of `model`, seeded, and the gradients of a fixed random projection of its outputs.

    In training the sites in `frozen` are in evaluation.
    """
    model, frozen = twin_of(model), frozen or Frozen()
    set_mode(model, mode)
    for path, module in paths(model).items():
        if path in frozen.modules:
            module.training = False
    running_means = {id(tensor) for name, tensor in own_tensors(model) if name in frozen.running_means}
    leaves = [leaf.clone().requires_grad_() for leaf in tree_leaves(inputs) if is_floating(leaf)]
    remaining = iter(leaves)
    fed = tree_map(lambda leaf: next(remaining) * 1 if is_floating(leaf) else leaf, inputs)
    torch.manual_seed(1)
    random.seed(1)
    with _FrozenCalls(running_means) if running_means else nullcontext():
        outputs = tree_leaves(call(model, fed))
    generator = torch.Generator().manual_seed(2)
    heads = [leaf for leaf in outputs if is_floating(leaf)]
    loss = sum((head * torch.randn(head.shape, generator=generator, dtype=head.dtype)).sum() for head in heads)
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    named = grouped(model)
    return Run(
        outputs=[leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in outputs],
        gradients={names: p.grad for names, p in named.items() if isinstance(p, nn.Parameter) and p.grad is not None},
        input_gradients=[leaf.grad for leaf in leaves if leaf.grad is not None],
        buffers={names: b for names, b in named.items() if not isinstance(b, nn.Parameter)},
        constants=constants_of(model),
    )


def constants_of(model: nn.Module) -> dict[str, Tensor]:
    """What no pass may change: the constants of matched branches, and running statistics that are used as constants."""
    found = {}
    for path, module in paths(model).items():
        running = getattr(module, "bn_statistics", None) == "running"
        constants = (*CONSTANTS, *(STATISTICS if running else ()))
        for name, tensor in module._buffers.items():
            if name in constants and tensor is not None:
                found[f"{path}.{name}"] = tensor.clone()
    return found


def grouped(model: nn.Module) -> dict[frozenset[str], Tensor]:
    """Every tensor once, by all its names."""
    names: dict[int, set[str]] = {}
    tensors = {}
    for name, tensor in own_tensors(model):
        tensors[id(tensor)] = tensor
        names.setdefault(id(tensor), set()).add(name)
    return {frozenset(names[key]): tensor for key, tensor in tensors.items()}


def partner(names: frozenset[str], tensors: dict[frozenset[str], Tensor]) -> Tensor | None:
    """The tensor that has a name in common; a whole-model graph keeps one name of each."""
    return next((tensor for others, tensor in tensors.items() if names & others), None)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative L2 of b to a, their own size where a is zero."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    size = a.double().norm().item()
    return (a.double() - b.double()).norm().item() / (size or 1.0)


def distances(a: Run, b: Run) -> dict[str, float]:
    """How far two runs are apart: outputs, gradients of parameters as one vector, of the input, running statistics."""
    found = {"number of outputs": 0.0 if len(a.outputs) == len(b.outputs) else float("inf")}
    for index, (x, y) in enumerate(zip(a.outputs, b.outputs, strict=False)):
        same_kind = isinstance(x, Tensor) == isinstance(y, Tensor)
        far = distance(x, y) if isinstance(x, Tensor) and same_kind else 0.0 if same_kind and x == y else float("inf")
        found[f"output {index}"] = far
    if a.gradients:
        other = [partner(names, b.gradients) for names in a.gradients]
        pairs = [(x, torch.zeros_like(x) if y is None else y) for x, y in zip(a.gradients.values(), other, strict=True)]
        found["gradients of parameters"] = distance(
            *(torch.cat([t.flatten() for t in side]) for side in zip(*pairs, strict=True))
        )
    if a.input_gradients:
        vectors = [torch.cat([g.flatten() for g in r.input_gradients]) for r in (a, b)]
        found["gradients of inputs"] = distance(*vectors)
    for names, buffer in a.buffers.items():
        other = partner(names, b.buffers)
        if other is not None:
            found[f"buffer {min(names)}"] = distance(buffer, other)
    return found


def same_function(
    original: nn.Module, converted: nn.Module, inputs: Any, modes: tuple[str, ...] = MODES
) -> dict[str, float | None]:
    """Guarantee 1. Returns the worst error in each mode, None if the original raises and the law is silent.

    Where the converted model uses running statistics in training, the original has its norms in evaluation.
    """
    first, second, inputs = in_float64(original), in_float64(converted), to_float64(inputs)
    frozen = frozen_sites(second, inputs)
    worst: dict[str, float | None] = {}
    for mode in modes:
        try:
            reference = run(first, inputs, mode, frozen)
        except Exception:  # noqa: BLE001 - whatever it is, the converted model owes nothing then
            worst[mode] = None
            continue
        result = run(second, inputs, mode)
        for name, value in constants_of(second).items():
            assert torch.equal(result.constants[name], value), f"guarantee 1, {mode}: {name} changed"
        far = distances(reference, result)
        if max(far.values()) > LIMIT:
            nudged = tree_map(lambda leaf: leaf * (1 + 2**-52) if is_floating(leaf) else leaf, inputs)
            own = distances(reference, run(first, nudged, mode, frozen))
            for name, error in far.items():
                limit = max(LIMIT, OWN_RESPONSES * own.get(name, 0.0))
                assert error <= limit, f"guarantee 1, {mode}: {name} is {error:.1e} off, limit {limit:.1e}"
        worst[mode] = max(far.values())
    return worst
