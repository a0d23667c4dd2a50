"""The gradients of a pass, each handed on as soon as backward has it: kept, or held against kept ones, then let go.

In float64 the gradients of a model take twice what its file takes, and a proof compares those of two models. So the
first ones go to a temporary file (in `TMPDIR`) where they are many, and the second ones are let go one by one.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map_only
from torch.utils.hooks import RemovableHandle

from normswap.model_state import call_model, hooked, preserved_before_writes, seeded
from normswap.surgery.importance import gated_modules
from normswap.surgery.model_outputs import Leaves, Names, VectorDistance, read_leaves
from normswap.surgery.module_tree import Flags, own_mode, walk_modules
from normswap.surgery.norms.functions import NORM_CALLS
from normswap.text import join

# MERGED DOC: One pass of a model under fixed conditions, and what it left: outputs, running statistics, gradients handed on.


Receive = Callable[[Names, Tensor], None]

# Bytes of gradients that stay in memory; what comes after them goes to disk.
IN_MEMORY = 1 << 24


def hand_on_gradients(outputs: list[Any], parameters: dict[Names, Tensor], receive: Receive, *, seed: int) -> None:
    """Give `receive` the gradients of a fixed random projection of every output; nothing where nothing requires any.

    By `backward()`, which reentrant checkpoints need: they run a backward pass of their own inside it, and a parameter
    in several of them is handed on once for each, to be summed. `.grad` of all leaves is as before afterwards.

    Args:
        outputs: leaves of a model's output; what is no tensor with a graph is left aside.
        parameters: those that are asked for, by all their names.
    """
    wanted = {names: parameter for names, parameter in parameters.items() if parameter.requires_grad}
    heads = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not wanted or not heads:
        return
    generator = torch.Generator().manual_seed(seed)  # whatever either model has drawn from the global one
    cotangents = [torch.randn(h.shape, dtype=h.dtype, generator=generator).to(h.device) for h in heads]
    hooks = [_handing_on(names, parameter, receive) for names, parameter in wanted.items()]
    with _own_grad([*wanted.values(), *_leaves_behind(heads)]), hooked(hooks):
        torch.autograd.backward(heads, cotangents)


def _handing_on(names: Names, parameter: Tensor, receive: Receive) -> Callable[[], RemovableHandle]:
    def hook(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            receive(names, gradient.to_dense() if gradient.layout is not torch.strided else gradient)

    return lambda: parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


@contextmanager
def _own_grad(leaves: list[Tensor]) -> Iterator[None]:
    """Take `.grad` away from tensors, and give it back at the end."""
    before = [(leaf, leaf.grad) for leaf in leaves]
    try:
        for leaf, _ in before:
            leaf.grad = None
        yield
    finally:
        for leaf, gradient in before:
            leaf.grad = gradient


def _leaves_behind(heads: list[Tensor]) -> list[Tensor]:
    """The tensors that a backward pass from `heads` gives a gradient, whoever they belong to."""
    pending = [node for head in heads if (node := head.grad_fn) is not None]
    seen = set(pending)
    leaves = [head for head in heads if head.grad_fn is None]
    while pending:
        node = pending.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        after = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= after
        pending += after
    return leaves


def _zeros_like(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(()).expand_as(tensor)  # of one element


class KeptGradients:
    """The gradients of one pass by the names of their parameters, beyond the first `IN_MEMORY` bytes in a file.

    What is not on the CPU stays where it is, and so does what the disk does not take.
    """

    def __init__(self) -> None:
        self._held: dict[Names, Tensor] = {}
        self._places: dict[Names, tuple[int, Tensor]] = {}
        self._names: dict[str, Names] = {}
        self._several: set[Names] = set()
        self._bytes = 0
        self._files = ExitStack()
        self._file: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def __iter__(self) -> Iterator[Names]:
        yield from self._held
        yield from self._places

    def __getitem__(self, names: Names) -> Tensor:
        if names in self._held:
            return self._held[names]
        place, like = self._places[names]
        # Mapped, so that it is memory only as long as it is looked at.
        data = mmap.mmap(self._file.fileno(), like.nbytes, access=mmap.ACCESS_COPY, offset=place)
        return torch.frombuffer(data, dtype=like.dtype).view(like.shape)

    def keep(self, names: Names, gradient: Tensor) -> None:
        """Take a gradient in, or add it to what came before for the same parameter."""
        if names in self._held or names in self._places:
            self._several.add(names)
            gradient = self[names] + gradient
            self._held.pop(names, None)
            self._places.pop(names, None)
        self._names |= dict.fromkeys(names, names)
        self._bytes += gradient.nbytes
        if self._bytes <= IN_MEMORY or gradient.device.type != "cpu" or not self._written(names, gradient):
            self._held[names] = gradient

    def partner(self, names: Names) -> Names | None:
        """Return the names of a kept gradient that has one of `names`."""
        return next((self._names[name] for name in names if name in self._names), None)

    def comes_in_parts(self, names: Names) -> bool:
        """Say whether the gradient came as several parts, by which other passes of the model give it too."""
        return names in self._several

    def _written(self, names: Names, gradient: Tensor) -> bool:
        try:
            if self._file is None:
                self._file = self._files.enter_context(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
            end = self._file.seek(0, os.SEEK_END)
            place = self._file.seek(-(-end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY)
            _write_whole(self._file, gradient)
        except OSError:
            return False
        self._places[names] = place, _zeros_like(gradient)
        return True


def _write_whole(file: Any, tensor: Tensor) -> None:
    """Write all bytes of a tensor: one call of the system takes 2 GB at most."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    while data:
        data = data[file.write(data) :]


class GradientDistance:
    """The gradients of one pass held against kept ones, as one vector; one that is missing counts as zeros."""

    def __init__(self, kept: KeptGradients) -> None:
        self._kept = kept
        self._met: set[Names] = set()
        self._parts: dict[Names, Tensor] = {}
        self._vector = VectorDistance()

    def meet(self, names: Names, gradient: Tensor) -> None:
        """Hold a gradient against the kept one of the same parameter."""
        partner = self._kept.partner(names)
        if partner is not None and self._kept.comes_in_parts(partner):
            self._parts[partner] = self._parts[partner] + gradient if partner in self._parts else gradient
            return
        if partner is None or partner in self._met:
            self._vector.add(_zeros_like(gradient), gradient)
            return
        self._met.add(partner)
        self._vector.add(self._kept[partner], gradient)

    def result(self) -> float:
        """Return the relative L2 over all parameters, once the pass is over."""
        for names, gradient in self._parts.items():
            self._met.add(names)
            self._vector.add(self._kept[names], gradient)
        self._parts.clear()
        for names in self._kept:
            if names not in self._met:
                self._met.add(names)
                self._vector.add(self._kept[names], _zeros_like(self._kept[names]))
        return self._vector.result()


_SEED = 0


@dataclass(frozen=True)
class ModelPass:
    """What one pass left: the leaves of the output, in training also buffers by all their names.

    `has_graph` tells that an output depends on tensors that require a gradient, `backward_error` what the backward pass
    raised.
    """

    leaves: Leaves
    buffers: dict[Names, Tensor]
    has_graph: bool = False
    backward_error: Exception | None = None


def run_pass(
    model: nn.Module,
    batch: Any,
    receive: Receive | None = None,
    *,
    training: bool,
    flags: Flags | None = None,
    within: AbstractContextManager[Any] | None = None,
) -> ModelPass | Exception:
    """Run `model` once with a fixed seed, in training with a backward pass, and return what it left or its own error.

    Args:
        receive: what the gradients of the shared parameters are handed to.
        flags: training flags of single modules, over those that the model's own `train()` or `eval()` sets.
        within: a context for both passes.
    """
    modules = [place.module for place in walk_modules(model)]
    backward_error = None
    with (
        preserved_before_writes(modules, "weights"),
        own_mode(model, training=training, flags=flags),
        seeded(_SEED),
        within or nullcontext(),
    ):
        try:
            with torch.set_grad_enabled(training):
                leaves = read_leaves(call_model(model, batch), model=frozenset(map(id, modules)))
            # Before the backward pass, in which activation checkpointing has BN record its batch a second time.
            found = shared_tensors(model, "_buffers") if training else {}
            buffers = {names: buffer.detach().clone() for names, buffer in found.items()}
        except Exception as error:  # noqa: BLE001 - whatever the model's code raises is the answer
            return error
        if training and receive:
            try:
                hand_on_gradients(leaves.tensors, shared_tensors(model, "_parameters"), receive, seed=_SEED)
            except Exception as error:  # noqa: BLE001 - as above
                backward_error = error
    has_graph = any(leaf.requires_grad for leaf in leaves.tensors)
    return ModelPass(leaves.detached(), buffers, has_graph, backward_error)


def shared_tensors(model: nn.Module, registry: str) -> dict[Names, Tensor]:
    """Return the parameters or buffers that an original and its conversion share, by all their names: all but gates."""
    gates = {id(p) for layer in gated_modules(model).values() for p in (layer.mean_weight, layer.var_weight)}
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for place in walk_modules(model):
        for name, tensor in getattr(place.module, registry).items():
            if tensor is not None and id(tensor) not in gates:
                tensors[id(tensor)] = tensor
                names.setdefault(id(tensor), []).extend(join(owner, name) for owner in place.names)
    return {tuple(names[key]): tensor for key, tensor in tensors.items()}


# --- the input changed by one unit in the last place ------------------------------------------------------------------


def nudged_passes(
    model: nn.Module, batch: Any, run: Callable[[Any, AbstractContextManager[Any] | None], Any], *, eps: float
) -> Iterator[Any]:
    """Yield what `run` gives if the input is changed by one unit in the last place: upwards, downwards, at random.

    If the input holds no floating tensor of that precision, as with token ids or images of bytes, the first such output
    of any module is changed instead.

    Args:
        eps: relative size of that unit in the precision of the comparison.
    """
    fine = tree_any(lambda leaf: _is_fine(leaf, eps), batch)
    for direction in ("up", "down", "random"):
        nudged = partial(nudge, direction=direction, eps=eps)
        if fine:
            yield run(tree_map_only(Tensor, nudged, batch), None)
        else:
            yield run(batch, _first_output_nudged(model, nudged, eps))


@contextmanager
def _first_output_nudged(model: nn.Module, nudge: Callable[[Tensor], Tensor], eps: float) -> Iterator[None]:
    done = False

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        nonlocal done
        if done or not tree_any(lambda leaf: _is_fine(leaf, eps), output):
            return None
        done = True
        return tree_map_only(Tensor, nudge, output)

    modules = [place.module for place in walk_modules(model)]
    with hooked(_registration(module, hook) for module in modules if not isinstance(module, torch.jit.ScriptModule)):
        yield


def _registration(module: nn.Module, hook: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: module.register_forward_hook(hook)


def _is_fine(leaf: Any, eps: float) -> bool:
    """Whether a leaf is a floating tensor that can be changed by as little as `eps`."""
    fractions = isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    return fractions and torch.finfo(leaf.dtype).eps <= eps


def nudge(tensor: Tensor, direction: str, eps: float) -> Tensor:
    """Return a tensor changed by one unit in the last place, one that is too coarse for that as it is."""
    if not _is_fine(tensor, eps):
        return tensor
    if direction != "random":
        return tensor * (1 + eps if direction == "up" else 1 - eps)
    coins = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(_SEED)).to(tensor.device)
    signs = (2 * coins - 1).to(tensor.dtype)  # or float32, in which 1 + eps of float64 is 1
    return tensor * (1 + signs * eps)


# --- batch normalization by its formula -------------------------------------------------------------------------------


class PlainBatchNorm(TorchFunctionMode):
    """Computes `batch_norm` on activations by its formula in plain operations, in place of torch's own kernels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = NORM_CALLS.get(func)
        if call is None or call.kind != "bn" or call.results is not None:
            return func(*args, **(kwargs or {}))
        arguments = dict(zip(call.parameters, args, strict=False)) | (kwargs or {})
        arguments.pop("cudnn_enabled", None)
        return _batch_norm(**arguments)


def _batch_norm(
    input: Tensor,  # noqa: A002 - the name that torch gives it
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """What `F.batch_norm` returns; running statistics stay as they are."""
    shape = (1, -1, *(1,) * (input.dim() - 2))
    if training or running_mean is None or running_var is None:
        dims = [0, *range(2, input.dim())]
        mean, var = input.mean(dims), input.var(dims, unbiased=False)
    else:
        mean, var = running_mean, running_var
    y = (input - mean.view(shape)) / (var.view(shape) + eps).sqrt()
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)
