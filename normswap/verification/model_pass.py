"""Run a model once under fixed conditions: outputs, running statistics, gradients, and distances between two runs.

Gradients are streamed: backward passes each one on as soon as it is computed. The gradients of the first model are
stored, in a temporary file (in `TMPDIR`) beyond the first 16 MB; those of the second are compared and freed one by one.
In float64 the gradients of a model need twice the size of its file, and a verification compares two models.
"""

import logging
import mmap
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from math import inf
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from normswap.layers.gated_module import GatedModule
from normswap.model_state import call_model, preserved_on_write, registered_hooks, seeded
from normswap.surgery.model_outputs import Leaves, TensorNames, VectorDistance, match_names, read_leaves, relative_l2
from normswap.surgery.module_tree import Flags, ModuleEntry, model_mode, walk_modules
from normswap.surgery.norms.functions import NORM_CALLS
from normswap.text import join_fqn

_logger = logging.getLogger(__name__)

GradientCallback = Callable[[TensorNames, Tensor], None]

# Gradients beyond this size go to a temporary file.
MAX_BYTES_IN_MEMORY = 1 << 24

_SEED = 0


# --- gradients --------------------------------------------------------------------------------------------------------


def stream_gradients(
    outputs: list[Any], parameters: dict[TensorNames, Tensor], on_gradient: GradientCallback, *, seed: int
) -> None:
    """Call `on_gradient` with the gradients of a fixed random projection of all outputs.

    This runs `backward()`, because reentrant checkpoints need it: they run a backward pass of their own inside it, and
    a parameter in several of them comes several times, with parts to be summed. `.grad` of all leaves is restored.

    Args:
        outputs: leaves of a model's output; leaves without a graph are ignored.
        parameters: the parameters by all their names; those that require no gradient are ignored.
    """
    trainable = {names: parameter for names, parameter in parameters.items() if parameter.requires_grad}
    heads = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not trainable or not heads:
        return
    # A generator of its own: the two models may have drawn different numbers from the global one.
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(h.shape, dtype=h.dtype, generator=generator).to(h.device) for h in heads]
    hooks = [_stream_hook(names, parameter, on_gradient) for names, parameter in trainable.items()]
    with _cleared_grad([*trainable.values(), *_graph_leaves(heads)]), registered_hooks(hooks):
        _run_backward(heads, cotangents)


def _run_backward(heads: list[Tensor], cotangents: list[Tensor]) -> None:
    """Do what `torch.autograd.backward` does, inside the torch function modes of the pass.

    The function itself leaves them, as any function of torch does, and a checkpoint then runs its code without them.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(tuple(heads), tuple(cotangents), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _stream_hook(names: TensorNames, parameter: Tensor, on_gradient: GradientCallback) -> Callable[[], RemovableHandle]:
    def hook(leaf: Tensor) -> None:
        """Pass the gradient on and free it."""
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            on_gradient(names, gradient.to_dense() if gradient.layout is not torch.strided else gradient)

    return lambda: parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


@contextmanager
def _cleared_grad(leaves: list[Tensor]) -> Iterator[None]:
    """Set `.grad` of tensors to None, and restore it at the end."""
    before = [(leaf, leaf.grad) for leaf in leaves]
    try:
        for leaf, _ in before:
            leaf.grad = None
        yield
    finally:
        for leaf, gradient in before:
            leaf.grad = gradient


def _graph_leaves(heads: list[Tensor]) -> list[Tensor]:
    """Return all tensors that get a gradient in a backward pass from `heads`."""
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
    return tensor.new_zeros(()).expand_as(tensor)  # a single element in memory


class GradientStore:
    """The gradients of one pass by the names of their parameters, beyond `MAX_BYTES_IN_MEMORY` in a temporary file.

    Gradients on other devices than the CPU stay in memory, as do all if the disk has no space.
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
        # Mapped, so that it needs memory only while it is used.
        data = mmap.mmap(self._file.fileno(), like.nbytes, access=mmap.ACCESS_COPY, offset=offset)
        return torch.frombuffer(data, dtype=like.dtype).view(like.shape)

    def store(self, names: TensorNames, gradient: Tensor) -> None:
        """Store a gradient, or add it to the stored one of the same parameter."""
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
        """Return the names of the stored gradient whose parameter has one of `names`."""
        return next((self._names[name] for name in names if name in self._names), None)

    def is_partial(self, names: TensorNames) -> bool:
        """Return whether the gradient came in several parts; it then does so in other passes of the model too."""
        return names in self._accumulated

    def _write_to_file(self, names: TensorNames, gradient: Tensor) -> bool:
        try:
            if self._file is None:
                self._file = self._files.enter_context(tempfile.TemporaryFile(buffering=0))  # noqa: SIM115
            end = self._file.seek(0, os.SEEK_END)
            offset = self._file.seek(-(-end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY)
            _write_all(self._file, gradient)
        except OSError as error:
            _logger.info("gradients stay in memory: the temporary file cannot be written (%s)", error)
            return False
        self._file_offsets[names] = offset, _zeros_like(gradient)
        return True


def _write_all(file: Any, tensor: Tensor) -> None:
    """Write all bytes of a tensor; one system call writes at most 2 GB."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    while data:
        data = data[file.write(data) :]


class GradientDistance:
    """The distance of the gradients of a pass from stored ones, as one vector; a missing gradient counts as zeros."""

    def __init__(self, reference: GradientStore) -> None:
        self._reference = reference
        self._compared: set[TensorNames] = set()
        self._parts: dict[TensorNames, Tensor] = {}
        self._vector = VectorDistance()

    def compare_gradient(self, names: TensorNames, gradient: Tensor) -> None:
        """Compare a gradient with the stored one of the same parameter."""
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
        """Return the relative L2 over all parameters; call it after the pass."""
        for names, gradient in self._parts.items():
            self._compared.add(names)
            self._vector.add(self._reference[names], gradient)
        self._parts.clear()
        for names in self._reference:
            if names not in self._compared:
                self._compared.add(names)
                self._vector.add(self._reference[names], _zeros_like(self._reference[names]))
        return self._vector.result()


# --- one pass ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelPass:
    """The results of one pass.

    Attributes:
        leaves: the leaves of the output, detached.
        buffers: in training, the buffers after the forward pass, by all their names.
        buffers_before: the same before it.
        has_graph: whether an output depends on tensors that require a gradient.
        backward_error: the error that the backward pass raised.
    """

    leaves: Leaves
    buffers: dict[TensorNames, Tensor]
    buffers_before: dict[TensorNames, Tensor]
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
    before_backward: Callable[[], None] = lambda: None,
) -> ModelPass | Exception:
    """Run `model` once with a fixed seed, in training with a backward pass; return the results or the model's error.

    Args:
        on_gradient: called with the gradients of the shared parameters.
        flags: training flags of single modules by name; they override those that the model's own `train()` or `eval()`
            sets.
        context: a context for both passes.
        before_backward: called between the forward and the backward pass.
    """
    entries = walk_modules(model)
    modules = [entry.module for entry in entries]
    backward_error = None
    with (
        preserved_on_write(modules, "weights"),
        model_mode(model, training=training, flags=flags, entries=entries),
        seeded(_SEED),
        context or nullcontext(),
    ):
        try:
            before = _copies(shared_tensors(entries, "_buffers")) if training else {}
            with torch.set_grad_enabled(training):
                leaves = read_leaves(call_model(model, batch), model=frozenset(map(id, modules)))
            # Before the backward pass: activation checkpointing makes BN record its batch a second time there.
            buffers = _copies(shared_tensors(entries, "_buffers")) if training else {}
        except Exception as error:  # noqa: BLE001 - the model's own code may raise anything; the caller reports it
            return error
        if training and on_gradient:
            before_backward()
            try:
                stream_gradients(leaves.tensors, shared_tensors(entries, "_parameters"), on_gradient, seed=_SEED)
            except Exception as error:  # noqa: BLE001 - as above
                backward_error = error
    has_graph = any(leaf.requires_grad for leaf in leaves.tensors)
    return ModelPass(leaves.detached(), buffers, before, has_graph, backward_error)


def _copies(tensors: dict[TensorNames, Tensor]) -> dict[TensorNames, Tensor]:
    return {names: tensor.detach().clone() for names, tensor in tensors.items()}


def shared_tensors(entries: Sequence[ModuleEntry], registry: str) -> dict[TensorNames, Tensor]:
    """Return the tensors that an original model and its conversion share, by all their names: all but the gates.

    Args:
        entries: the modules of a model, as `walk_modules` returns them.
        registry: `"_parameters"` or `"_buffers"`.
    """
    layers = [entry.module for entry in entries if isinstance(entry.module, GatedModule)]
    gates = {id(p) for layer in layers for p in (layer.mean_weight, layer.var_weight)}
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for entry in entries:
        for name, tensor in getattr(entry.module, registry).items():
            if tensor is not None and id(tensor) not in gates:
                tensors[id(tensor)] = tensor
                names.setdefault(id(tensor), []).extend(join_fqn(owner, name) for owner in entry.names)
    return {tuple(names[key]): tensor for key, tensor in tensors.items()}


# --- distances between two passes -------------------------------------------------------------------------------------


class _Missing:
    """A placeholder for a leaf that only the other model returns."""


MISSING = _Missing()


def leaf_distances(a: Leaves, b: Leaves) -> dict[str, float]:
    """Return the relative L2 of every leaf by path, infinite if the leaf cannot be compared."""

    def distance(path: str) -> float:
        """Return the relative L2 of one leaf."""
        try:
            return relative_l2(a.values.get(path, MISSING), b.values.get(path, MISSING))
        except Exception:  # noqa: BLE001 - the comparison of the two models notes the reason
            return inf

    return {path: distance(path) for path in {**a.values, **b.values}}


def statistics_distances(references: dict[TensorNames, Tensor], values: dict[TensorNames, Tensor]) -> dict[str, float]:
    """Return the relative L2 of the floating buffers of each module as one vector; other buffers must be equal.

    One vector per module, because a running mean whose exact value is zero (after a convolution of a normalized map)
    contains only rounding errors and has no meaningful relative error.
    """
    vectors: dict[str, VectorDistance] = {}
    errors: dict[str, float] = {}
    for names, partner in match_names(references, values):
        reference, value, owner = references[names], values[partner], names[0].rpartition(".")[0]
        if not reference.is_floating_point() or reference.dtype != value.dtype or reference.shape != value.shape:
            errors[names[0]] = relative_l2(reference, value)
            continue
        vectors.setdefault(owner, VectorDistance()).add(reference, value)
    return errors | {f"{owner or 'the model'} (statistics)": vector.result() for owner, vector in vectors.items()}


def constant_buffer_distances(reference: ModelPass, found: ModelPass, constants: Collection[str]) -> dict[str, float]:
    """Return the relative L2 of buffers that `reference` does not have from their values before the forward pass.

    Args:
        constants: the names of the buffers of `found` that must not change.
    """
    compared = {partner for _, partner in match_names(reference.buffers, found.buffers)}
    return {
        names[0]: relative_l2(found.buffers_before[names], buffer)
        for names, buffer in found.buffers.items()
        if names not in compared and names in found.buffers_before and not set(names).isdisjoint(constants)
    }


def output_distance(reference: Leaves, value: Leaves) -> float:
    """Return the distance of all floating values as one vector: a value that should be zero has no relative error."""
    vector, errors = VectorDistance(), [0.0]
    if reference.values.keys() != value.values.keys() or reference.opaque:
        return float("inf")
    for path, expected in reference.values.items():
        found = value.values[path]
        if isinstance(expected, float) and isinstance(found, float):
            vector.add(*(torch.tensor([number], dtype=torch.float64) for number in (expected, found)))
        elif isinstance(expected, Tensor) and isinstance(found, Tensor) and expected.is_floating_point():
            vector.add(expected, found)
        else:
            errors.append(relative_l2(expected, found))
    return max(*errors, vector.result())


def gradient_distance(expected: dict[TensorNames, Tensor], found: dict[TensorNames, Tensor]) -> float:
    """Return the distance of gradients as one vector; a missing gradient counts as zeros."""
    partners = dict(match_names(expected, found))
    vector = VectorDistance()
    for names, gradient in expected.items():
        vector.add(gradient, found.pop(partners[names]) if names in partners else torch.zeros_like(gradient))
    for gradient in found.values():
        vector.add(torch.zeros_like(gradient), gradient)
    return vector.result()


# --- batch normalization by its formula -------------------------------------------------------------------------------


class FormulaBatchNorm(TorchFunctionMode):
    """Compute `batch_norm` of activations by its formula in plain operations, instead of by torch's kernels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = NORM_CALLS.get(func)
        if call is None or call.kind != "bn" or call.results is not None:
            return func(*args, **(kwargs or {}))
        arguments = dict(zip(call.parameters, args, strict=False)) | (kwargs or {})
        arguments.pop("cudnn_enabled", None)
        return _batch_norm(**arguments)


def _batch_norm(
    input: Tensor,  # noqa: A002 - torch's name
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return what `F.batch_norm` returns, without an update of running statistics."""
    shape = (1, -1, *(1,) * (input.dim() - 2))
    if training or running_mean is None or running_var is None:
        dims = [0, *range(2, input.dim())]
        mean, var = input.mean(dims), input.var(dims, unbiased=False)
    else:
        mean, var = running_mean, running_var
    y = (input - mean.view(shape)) / (var.view(shape) + eps).sqrt()
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)
