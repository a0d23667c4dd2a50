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

from normswap.model_state import call_model, preserved_on_write, registered_hooks, seeded
from normswap.surgery.importance import gated_modules
from normswap.surgery.model_outputs import Leaves, TensorNames, VectorDistance, read_leaves
from normswap.surgery.module_tree import Flags, model_mode, walk_modules
from normswap.surgery.norms.functions import NORM_CALLS
from normswap.text import join_fqn

# MERGED DOC: One pass of a model under fixed conditions, and what it left: outputs, running statistics, gradients handed on.


GradientCallback = Callable[[TensorNames, Tensor], None]

# Bytes of gradients that stay in memory; what comes after them goes to disk.
MAX_BYTES_IN_MEMORY = 1 << 24


def stream_gradients(
    outputs: list[Any], parameters: dict[TensorNames, Tensor], on_gradient: GradientCallback, *, seed: int
) -> None:
    """Give `on_gradient` the gradients of a fixed random projection of every output; nothing where nothing requires any.

    By `backward()`, which reentrant checkpoints need: they run a backward pass of their own inside it, and a parameter
    in several of them is handed on once for each, to be summed. `.grad` of all leaves is as before afterwards.

    Args:
        outputs: leaves of a model's output; what is no tensor with a graph is left aside.
        parameters: those that are asked for, by all their names.
    """
    trainable = {names: parameter for names, parameter in parameters.items() if parameter.requires_grad}
    heads = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not trainable or not heads:
        return
    generator = torch.Generator().manual_seed(seed)  # whatever either model has drawn from the global one
    cotangents = [torch.randn(h.shape, dtype=h.dtype, generator=generator).to(h.device) for h in heads]
    hooks = [_stream_hook(names, parameter, on_gradient) for names, parameter in trainable.items()]
    with _cleared_grad([*trainable.values(), *_graph_leaves(heads)]), registered_hooks(hooks):
        torch.autograd.backward(heads, cotangents)


def _stream_hook(names: TensorNames, parameter: Tensor, on_gradient: GradientCallback) -> Callable[[], RemovableHandle]:
    def hook(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            on_gradient(names, gradient.to_dense() if gradient.layout is not torch.strided else gradient)

    return lambda: parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


@contextmanager
def _cleared_grad(leaves: list[Tensor]) -> Iterator[None]:
    """Take `.grad` away from tensors, and give it back at the end."""
    before = [(leaf, leaf.grad) for leaf in leaves]
    try:
        for leaf, _ in before:
            leaf.grad = None
        yield
    finally:
        for leaf, gradient in before:
            leaf.grad = gradient


def _graph_leaves(heads: list[Tensor]) -> list[Tensor]:
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


class GradientStore:
    """The gradients of one pass by the names of their parameters, beyond the first `MAX_BYTES_IN_MEMORY` bytes in a file.

    What is not on the CPU stays where it is, and so does what the disk does not take.
    """

    def __init__(self) -> None:
        self._in_memory: dict[TensorNames, Tensor] = {}
        self._file_offsets: dict[TensorNames, tuple[int, Tensor]] = {}
        self._names: dict[str, TensorNames] = {}
        self._accumulated: set[TensorNames] = set()
        self._bytes = 0
        self._files = ExitStack()
        self._file: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def __iter__(self) -> Iterator[TensorNames]:
        yield from self._in_memory
        yield from self._file_offsets

    def __getitem__(self, names: TensorNames) -> Tensor:
        if names in self._in_memory:
            return self._in_memory[names]
        offset, like = self._file_offsets[names]
        # Mapped, so that it is memory only as long as it is looked at.
        data = mmap.mmap(self._file.fileno(), like.nbytes, access=mmap.ACCESS_COPY, offset=offset)
        return torch.frombuffer(data, dtype=like.dtype).view(like.shape)

    def store(self, names: TensorNames, gradient: Tensor) -> None:
        """Take a gradient in, or add it to what came before for the same parameter."""
        if names in self._in_memory or names in self._file_offsets:
            self._accumulated.add(names)
            gradient = self[names] + gradient
            self._in_memory.pop(names, None)
            self._file_offsets.pop(names, None)
        self._names |= dict.fromkeys(names, names)
        self._bytes += gradient.nbytes
        if (
            self._bytes <= MAX_BYTES_IN_MEMORY
            or gradient.device.type != "cpu"
            or not self._write_to_file(names, gradient)
        ):
            self._in_memory[names] = gradient

    def partner(self, names: TensorNames) -> TensorNames | None:
        """Return the names of a kept gradient that has one of `names`."""
        return next((self._names[name] for name in names if name in self._names), None)

    def is_partial(self, names: TensorNames) -> bool:
        """Say whether the gradient came as several parts, by which other passes of the model give it too."""
        return names in self._accumulated

    def _write_to_file(self, names: TensorNames, gradient: Tensor) -> bool:
        try:
            if self._file is None:
                self._file = self._files.enter_context(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
            end = self._file.seek(0, os.SEEK_END)
            offset = self._file.seek(-(-end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY)
            _write_all(self._file, gradient)
        except OSError:
            return False
        self._file_offsets[names] = offset, _zeros_like(gradient)
        return True


def _write_all(file: Any, tensor: Tensor) -> None:
    """Write all bytes of a tensor: one call of the system takes 2 GB at most."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    while data:
        data = data[file.write(data) :]


class GradientDistance:
    """The gradients of one pass held against kept ones, as one vector; one that is missing counts as zeros."""

    def __init__(self, kept: GradientStore) -> None:
        self._reference = kept
        self._compared: set[TensorNames] = set()
        self._parts: dict[TensorNames, Tensor] = {}
        self._vector = VectorDistance()

    def compare_gradient(self, names: TensorNames, gradient: Tensor) -> None:
        """Hold a gradient against the kept one of the same parameter."""
        partner = self._reference.partner(names)
        if partner is not None and self._reference.is_partial(partner):
            self._parts[partner] = self._parts[partner] + gradient if partner in self._parts else gradient
            return
        if partner is None or partner in self._compared:
            self._vector.add(_zeros_like(gradient), gradient)
            return
        self._compared.add(partner)
        self._vector.add(self._reference[partner], gradient)

    def result(self) -> float:
        """Return the relative L2 over all parameters, once the pass is over."""
        for names, gradient in self._parts.items():
            self._compared.add(names)
            self._vector.add(self._reference[names], gradient)
        self._parts.clear()
        for names in self._reference:
            if names not in self._compared:
                self._compared.add(names)
                self._vector.add(self._reference[names], _zeros_like(self._reference[names]))
        return self._vector.result()


_SEED = 0


@dataclass(frozen=True)
class ModelPass:
    """What one pass left: the leaves of the output, in training also buffers by all their names.

    `has_graph` tells that an output depends on tensors that require a gradient, `backward_error` what the backward pass
    raised.
    """

    leaves: Leaves
    buffers: dict[TensorNames, Tensor]
    has_graph: bool = False
    backward_error: Exception | None = None


def run_pass(
    model: nn.Module,
    batch: Any,
    on_gradient: GradientCallback | None = None,
    *,
    training: bool,
    flags: Flags | None = None,
    context: AbstractContextManager[Any] | None = None,
) -> ModelPass | Exception:
    """Run `model` once with a fixed seed, in training with a backward pass, and return what it left or its own error.

    Args:
        receive: what the gradients of the shared parameters are handed to.
        flags: training flags of single modules, over those that the model's own `train()` or `eval()` sets.
        within: a context for both passes.
    """
    modules = [entry.module for entry in walk_modules(model)]
    backward_error = None
    with (
        preserved_on_write(modules, "weights"),
        model_mode(model, training=training, flags=flags),
        seeded(_SEED),
        context or nullcontext(),
    ):
        try:
            with torch.set_grad_enabled(training):
                leaves = read_leaves(call_model(model, batch), model=frozenset(map(id, modules)))
            # Before the backward pass, in which activation checkpointing has BN record its batch a second time.
            found = shared_tensors(model, "_buffers") if training else {}
            buffers = {names: buffer.detach().clone() for names, buffer in found.items()}
        except Exception as error:  # noqa: BLE001 - whatever the model's code raises is the answer
            return error
        if training and on_gradient:
            try:
                stream_gradients(leaves.tensors, shared_tensors(model, "_parameters"), on_gradient, seed=_SEED)
            except Exception as error:  # noqa: BLE001 - as above
                backward_error = error
    has_graph = any(leaf.requires_grad for leaf in leaves.tensors)
    return ModelPass(leaves.detached(), buffers, has_graph, backward_error)


def shared_tensors(model: nn.Module, registry: str) -> dict[TensorNames, Tensor]:
    """Return the parameters or buffers that an original and its conversion share, by all their names: all but gates."""
    gates = {id(p) for layer in gated_modules(model).values() for p in (layer.mean_weight, layer.var_weight)}
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for entry in walk_modules(model):
        for name, tensor in getattr(entry.module, registry).items():
            if tensor is not None and id(tensor) not in gates:
                tensors[id(tensor)] = tensor
                names.setdefault(id(tensor), []).extend(join_fqn(owner, name) for owner in entry.names)
    return {tuple(names[key]): tensor for key, tensor in tensors.items()}


# --- the input changed by one unit in the last place ------------------------------------------------------------------


def perturbed_passes(
    model: nn.Module, batch: Any, run: Callable[[Any, AbstractContextManager[Any] | None], Any], *, eps: float
) -> Iterator[Any]:
    """Yield what `run` gives if the input is changed by one unit in the last place: upwards, downwards, at random.

    If the input holds no floating tensor of that precision, as with token ids or images of bytes, the first such output
    of any module is changed instead.

    Args:
        eps: relative size of that unit in the precision of the comparison.
    """
    has_fine_inputs = tree_any(lambda leaf: _resolves_eps(leaf, eps), batch)
    for direction in ("up", "down", "random"):
        perturbed = partial(perturb, direction=direction, eps=eps)
        if has_fine_inputs:
            yield run(tree_map_only(Tensor, perturbed, batch), None)
        else:
            yield run(batch, _first_output_perturbed(model, perturbed, eps))


@contextmanager
def _first_output_perturbed(model: nn.Module, perturb: Callable[[Tensor], Tensor], eps: float) -> Iterator[None]:
    done = False

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        nonlocal done
        if done or not tree_any(lambda leaf: _resolves_eps(leaf, eps), output):
            return None
        done = True
        return tree_map_only(Tensor, perturb, output)

    modules = [entry.module for entry in walk_modules(model)]
    with registered_hooks(
        _registration(module, hook) for module in modules if not isinstance(module, torch.jit.ScriptModule)
    ):
        yield


def _registration(module: nn.Module, hook: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: module.register_forward_hook(hook)


def _resolves_eps(leaf: Any, eps: float) -> bool:
    """Whether a leaf is a floating tensor that can be changed by as little as `eps`."""
    is_floating = isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    return is_floating and torch.finfo(leaf.dtype).eps <= eps


def perturb(tensor: Tensor, direction: str, eps: float) -> Tensor:
    """Return a tensor changed by one unit in the last place, one that is too coarse for that as it is."""
    if not _resolves_eps(tensor, eps):
        return tensor
    if direction != "random":
        return tensor * (1 + eps if direction == "up" else 1 - eps)
    random_bits = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(_SEED)).to(tensor.device)
    signs = (2 * random_bits - 1).to(tensor.dtype)  # or float32, in which 1 + eps of float64 is 1
    return tensor * (1 + signs * eps)


# --- batch normalization by its formula -------------------------------------------------------------------------------


class FormulaBatchNorm(TorchFunctionMode):
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
