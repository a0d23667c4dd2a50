"""Wrappers around a whole model, such as DistributedDataParallel: the model inside, and the wrapper after a conversion.

All names in plans and results are those of the model inside, so a plan fits a model with and without wrappers. A
converted copy gets a new wrapper with the same settings. In place, the wrapper stays, unless it stores something that
the conversion makes invalid. If neither is possible, the model is refused with the remedy.
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
    """The reason in words for a class of wrapper, and what to type instead."""

    reason: str
    suggestion: str


# By class name, also of a base class, since importing these classes is slow.
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
    """One class of wrapper.

    Attributes:
        inside: the name of the child with the model.
        rebuild: creates the same wrapper around another model.
        stale_reason: why it cannot stay if the model inside changes, or None.
        rebuild_problem: why it cannot be built again, or None.
    """

    inside: str
    rebuild: Callable[[Any, nn.Module], nn.Module]
    stale_reason: Callable[[Any], Problem]
    rebuild_problem: Callable[[Any], Problem] = lambda _: None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers: DataParallel, DistributedDataParallel, torch.compile, in any order.

    Raises:
        ArgumentError: `model` is not a module.
    """
    for _, wrapper, kind in _wrappers(model):
        model = wrapper._modules[kind.inside]  # type: ignore[assignment]
    return model


def check_wrapping(model: nn.Module, *, inplace: bool, rebuilt: bool, verb: str = "convert") -> None:
    """Refuse a model whose wrappers cannot stay or be built again.

    Args:
        inplace: the model inside changes, and the wrappers stay.
        rebuilt: the wrappers are built again around another model.
        verb: what the user wants to do, for the message.

    Raises:
        SwapError: a wrapper does not support it, or the model inside is TorchScript, sharded, or contains a wrapper.
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


# Base classes, by name, of the modules that preparation for quantization adds, in torch and torchao.
_OBSERVERS = {"ObserverBase", "FakeQuantizeBase", "FakeQuantizerBase", "AffineQuantizedObserverBase"}


def check_not_prepared(model: nn.Module) -> None:
    """Refuse a model that is prepared for quantization, since its batch norms are parts of fused or observed layers.

    A model that was converted before it was prepared is accepted.

    Raises:
        SwapError: the model has observers or fake quantization, and no layer of normswap.
    """
    entries = walk_modules(unwrap(model))
    if any(isinstance(entry.module, GatedModule) for entry in entries):
        return
    for entry in entries:
        cls = type(entry.module)
        if any(b.__name__ in _OBSERVERS and b.__module__.startswith(("torch.", "torchao.")) for b in cls.__mro__):
            raise SwapError(
                f"the model is prepared for quantization ({entry.names[0] or 'the model'} is a {cls.__name__}): "
                "convert the original model, then prepare the converted one"
            )


def rewrap(model: nn.Module, inside: nn.Module) -> nn.Module:
    """Return `inside` in the wrappers of `model`: the same objects if they contain it, else new ones.

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
    """The wrappers, the outermost first, each with its Python expression such as `model.module`."""
    where, model = "model", require_module(model)
    while (kind := _WRAPPERS.get(class_name(model))) is not None:
        yield where, model, kind
        where, model = f"{where}.{kind.inside}", model._modules[kind.inside]  # type: ignore[assignment]


def _wrapping_error(where: str, name: str, verb: str, detail: str = "") -> SwapError:
    refusal = _REFUSALS[name]
    return SwapError(f"{where} {refusal.reason}{detail}: {refusal.suggestion.format(verb=verb, where=where)}")


def _rebuild_problem(wrapper: nn.Module, kind: _Wrapper) -> Problem:
    if wrapper._parameters or wrapper._buffers or len(wrapper._modules) > 1:
        return "that has tensors or modules of its own"
    if any(value for name, value in vars(wrapper).items() if name.endswith("_hooks") and isinstance(value, dict)):
        return "that has hooks"
    return kind.rebuild_problem(wrapper)


def _rebuild_data_parallel(wrapper: nn.DataParallel[Any], inside: nn.Module) -> nn.Module:
    # Not by its constructor, which may choose other devices.
    module_copy = shallow_copy(wrapper)
    module_copy._modules["module"] = inside
    return module_copy


# Arguments that are attributes of DDP with the same name; older releases of torch have fewer.
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

    # Nothing is broadcast, since with `broadcast_buffers=False` each process has its own buffers. What remains is the
    # check that all processes have the same plan.
    new_wrapper = DistributedDataParallel(inside, init_sync=False, **settings)
    reduced: list[Tensor] = [parameter for parameter in new_wrapper._module_parameters if parameter.requires_grad]
    _verify_param_shape_across_processes(new_wrapper.process_group, reduced)
    new_wrapper.training = wrapper.training
    return new_wrapper


def _ddp_rebuild_problem(wrapper: DistributedDataParallel) -> Problem:
    attributes = vars(wrapper)
    if attributes.get("_delay_all_reduce_params"):
        return "that delays the reduction of some parameters"
    if attributes.get("mixed_precision") is not None:
        return "with mixed precision"
    if attributes.get("device_mesh") is not None:
        return "on a device mesh"
    # The logging data lists hooks of both kinds, in Python and built in.
    if "buffer_hook" in attributes or wrapper._get_ddp_logging_data().get("comm_hook"):  # type: ignore[no-untyped-call]
        return "with a communication hook"
    return None


def _compiled_stale_reason(wrapper: Any) -> Problem:
    if type(vars(wrapper).get("forward")).__name__ == "AOTCompiledModel":
        return "ahead of time"
    hooks = getattr(wrapper.dynamo_ctx, "_hooks", None)
    return "with guard_filter_fn" if getattr(hooks, "guard_filter_fn", None) else None


# By class, exactly: one derived from it may do more.
_WRAPPERS = {
    "torch.nn.parallel.data_parallel.DataParallel": _Wrapper(
        inside="module", rebuild=_rebuild_data_parallel, stale_reason=lambda _: None
    ),
    "torch.nn.parallel.distributed.DistributedDataParallel": _Wrapper(
        inside="module",
        rebuild=_rebuild_ddp,
        stale_reason=lambda _: "whose reducer refers to the old parameters",
        rebuild_problem=_ddp_rebuild_problem,
    ),
    # Its guards notice that the classes of modules changed, so the next call compiles again.
    "torch._dynamo.eval_frame.OptimizedModule": _Wrapper(
        inside="_orig_mod",
        rebuild=lambda wrapper, inside: wrapper.dynamo_ctx(inside),
        stale_reason=_compiled_stale_reason,
    ),
}
