"""Wrappers around a whole model: what lies inside them, and the same wrapper around its conversion.

Every name that normswap takes or gives is one of the inside, so that a plan fits a model bare and wrapped. Around a
copy a wrapper is built again with the settings that it has; in place it stays, where nothing that it keeps can go
stale. Where neither is true to the original it is refused, with the way out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normswap.errors import SwapError
from normswap.layers.gated_module import GatedModule
from normswap.layers.in_place import shallow_copy
from normswap.surgery.arguments import require_module
from normswap.surgery.module_tree import class_name, walk_modules
from normswap.text import first_line

Problem = str | None


class _Refusal(NamedTuple):
    """What a class of wrapper has done to the model, and what to type instead."""

    reason: str
    suggestion: str


# By class name, also of a base class: none of them can be asked without importing half of torch.
_REFUSALS = {
    "DataParallel": _Refusal("is wrapped in DataParallel", "{verb} {where}.module, then wrap the result again"),
    "DistributedDataParallel": _Refusal(
        "is wrapped in DistributedDataParallel", "{verb} {where}.module, then wrap the result again"
    ),
    "FullyShardedDataParallel": _Refusal(
        "is wrapped in FullyShardedDataParallel", "{verb} {where}.module, then wrap the result again"
    ),
    "FSDPModule": _Refusal(
        "is sharded by fully_shard", "{verb} {where} first, then shard it with the gates in ignored_params"
    ),
    "OptimizedModule": _Refusal("is compiled", "{verb} {where}._orig_mod, then compile the result again"),
}


@dataclass(frozen=True)
class _Wrapper:
    """How to deal with one class of wrapper: where it keeps the inside, and how it is built again around another.

    `goes_stale` and `cannot_return` say why it cannot stay where its inside changes, or cannot be built again.
    """

    inside: str
    rebuild: Callable[[Any, nn.Module], nn.Module]
    stale_reason: Callable[[Any], Problem]
    rebuild_problem: Callable[[Any], Problem] = lambda _: None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers: DataParallel, DistributedDataParallel, torch.compile, in any order.

    Raises:
        ArgumentError: `model` is no module.
    """
    for _, wrapper, kind in _wrappers(model):
        model = wrapper._modules[kind.inside]  # type: ignore[assignment]
    return model


def check_wrapping(model: nn.Module, *, inplace: bool, rebuilt: bool, verb: str = "convert") -> None:
    """Refuse a model in wrappers that cannot stay, if its inside changes `inplace`, or cannot be `rebuilt`.

    Args:
        verb: what the caller is asked to do, for the message.

    Raises:
        SwapError: as said above; or the inside is TorchScript, sharded, or holds a wrapper deeper down.
    """
    where = "model"
    for where, wrapper, kind in _wrappers(model):
        problem = (inplace and kind.stale_reason(wrapper)) or (rebuilt and _rebuild_problem(wrapper, kind))
        if problem:
            raise _wrapping_error(where, type(wrapper).__name__, verb, f" {problem}")
        where = f"{where}.{kind.inside}"
    inside = unwrap(model)
    if isinstance(inside, torch.jit.ScriptModule):
        raise SwapError(
            f"the model is TorchScript, whose code is fixed: {verb} the Python model, then trace or export it"
        )
    for entry in walk_modules(inside):
        for cls in type(entry.module).__mro__:
            if cls.__name__ in _REFUSALS:
                raise _wrapping_error(f"{where}.{entry.names[0]}".rstrip("."), cls.__name__, verb)


# Base classes of what preparing a model for quantization puts into it, by name: in torch, and in torchao since.
_OBSERVERS = {"ObserverBase", "FakeQuantizeBase", "FakeQuantizerBase", "AffineQuantizedObserverBase"}


def check_not_prepared(model: nn.Module) -> None:
    """Refuse a model that is prepared for quantization: its batch norms are parts of fused layers and of observed ones.

    A model that was prepared after its conversion passes.

    Raises:
        SwapError: the model holds observers or fake quantization, and no layer of normswap.
    """
    entries = walk_modules(unwrap(model))
    if any(isinstance(entry.module, GatedModule) for entry in entries):
        return
    for entry in entries:
        cls = type(entry.module)
        if any(b.__name__ in _OBSERVERS and b.__module__.startswith(("torch.", "torchao.")) for b in cls.__mro__):
            raise SwapError(
                f"the model is prepared for quantization ({entry.names[0] or 'the model'} is a {cls.__name__}): "
                "convert the model before it is prepared, then prepare the converted one"
            )


def rewrap(model: nn.Module, inside: nn.Module) -> nn.Module:
    """Return `inside` in the wrappers of `model`: these themselves if it is their inside, else built again.

    Raises:
        SwapError: torch refuses to wrap it again.
    """
    for where, wrapper, kind in reversed(list(_wrappers(model))):
        if wrapper._modules[kind.inside] is inside:
            inside = wrapper
            continue
        try:
            inside = kind.rebuild(wrapper, inside)
        except Exception as error:
            detail = f" and cannot be wrapped again ({first_line(error)})"
            raise _wrapping_error(where, type(wrapper).__name__, "convert", detail) from error
    return inside


def _wrappers(model: nn.Module) -> Iterator[tuple[str, nn.Module, _Wrapper]]:
    """The wrappers from the outermost in, each with its name in Python."""
    where, model = "model", require_module(model)
    while (kind := _WRAPPERS.get(class_name(model))) is not None:
        yield where, model, kind
        where, model = f"{where}.{kind.inside}", model._modules[kind.inside]  # type: ignore[assignment]


def _wrapping_error(where: str, name: str, verb: str, detail: str = "") -> SwapError:
    refusal = _REFUSALS[name]
    return SwapError(f"{where} {refusal.reason}{detail}: {refusal.suggestion.format(verb=verb, where=where)}")


def _rebuild_problem(wrapper: nn.Module, kind: _Wrapper) -> Problem:
    if wrapper._parameters or wrapper._buffers or len(wrapper._modules) > 1:
        return "and holds tensors or modules beside it"
    if any(value for name, value in vars(wrapper).items() if name.endswith("_hooks") and isinstance(value, dict)):
        return "and has hooks on the wrapper"
    return kind.rebuild_problem(wrapper)


def _rebuild_data_parallel(wrapper: nn.DataParallel[Any], inside: nn.Module) -> nn.Module:
    # Not by its constructor, which looks for devices anew and so may choose others.
    module_copy = shallow_copy(wrapper)
    module_copy._modules["module"] = inside
    return module_copy


# Arguments that DDP keeps under their own names; older releases of torch have fewer of them.
_DDP_SETTINGS = (
    "device_ids",
    "output_device",
    "dim",
    "process_group",
    "broadcast_buffers",
    "forward_sync_buffers",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "skip_all_reduce_unused_params",
    "batched_grad_copy",
)
_BYTES_PER_MB = 1024 * 1024


def _rebuild_ddp(wrapper: DistributedDataParallel, inside: nn.Module) -> nn.Module:
    attributes = vars(wrapper)
    settings = {name: attributes[name] for name in _DDP_SETTINGS if name in attributes}
    if not wrapper.bucket_bytes_cap_default:
        settings["bucket_cap_mb"] = wrapper.bucket_bytes_cap / _BYTES_PER_MB
    if caps := attributes.get("bucket_bytes_cap_list"):
        settings["bucket_cap_mb_list"] = [cap / _BYTES_PER_MB for cap in caps]
    from torch.distributed.utils import _verify_param_shape_across_processes  # not in every build of torch

    # Nothing is broadcast: each process keeps its own buffers, which a DDP told not to sync them may rely on. That the
    # processes planned alike is all that is left to check.
    new_wrapper = DistributedDataParallel(inside, init_sync=False, **settings)
    reduced: list[Tensor] = [parameter for parameter in new_wrapper._module_parameters if parameter.requires_grad]
    _verify_param_shape_across_processes(new_wrapper.process_group, reduced)
    new_wrapper.training = wrapper.training
    return new_wrapper


def _ddp_rebuild_problem(wrapper: DistributedDataParallel) -> Problem:
    attributes = vars(wrapper)
    if attributes.get("_delay_all_reduce_params"):
        return "that delays the reduction of chosen parameters"
    if attributes.get("mixed_precision") is not None:
        return "with mixed precision of its own"
    if attributes.get("device_mesh") is not None:
        return "on a device mesh"
    # The one place that tells of hooks of both kinds, in Python and built in.
    if "buffer_hook" in attributes or wrapper._get_ddp_logging_data().get("comm_hook"):  # type: ignore[no-untyped-call]
        return "with a communication hook"
    return None


def _compiled_stale_reason(wrapper: Any) -> Problem:
    if type(vars(wrapper).get("forward")).__name__ == "AOTCompiledModel":
        return "ahead of time"
    hooks = getattr(wrapper.dynamo_ctx, "_hooks", None)
    return "and told which guards to leave out" if getattr(hooks, "guard_filter_fn", None) else None


# By class, exactly: one derived from it may do more.
_WRAPPERS = {
    "torch.nn.parallel.data_parallel.DataParallel": _Wrapper(
        inside="module", rebuild=_rebuild_data_parallel, stale_reason=lambda _: None
    ),
    "torch.nn.parallel.distributed.DistributedDataParallel": _Wrapper(
        inside="module",
        rebuild=_rebuild_ddp,
        stale_reason=lambda _: "whose reducer keeps the parameters it was built with",
        rebuild_problem=_ddp_rebuild_problem,
    ),
    # Its guards see that the classes of modules have changed, and compile again when it is called.
    "torch._dynamo.eval_frame.OptimizedModule": _Wrapper(
        inside="_orig_mod",
        rebuild=lambda wrapper, inside: wrapper.dynamo_ctx(inside),
        stale_reason=_compiled_stale_reason,
    ),
}
