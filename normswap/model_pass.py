"""One pass of a model under fixed conditions, and what it left: outputs, running statistics, gradients handed on.

The model is as it was afterwards. An error of its own code is a result, not an exception.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map_only

from normswap.comparison import Names
from normswap.gradients import Receive, hand_on_gradients
from normswap.modes import call_model, hooked, preserved_before_writes, seeded
from normswap.output_leaves import Leaves, read_leaves
from normswap.surgery.calls import NORM_CALLS
from normswap.surgery.gated import gated_modules
from normswap.surgery.own_mode import Flags, own_mode
from normswap.surgery.tree import join, walk_modules

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
