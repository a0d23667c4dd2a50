"""Functional sites: the calls of functions that normalize, in the own forward of the module that makes them.

A batch_norm call can be rewritten where its owner's forward can. An instance_norm call is named and explained, as is a
batch_norm call on samples that were folded into the channels: neither has batch statistics to lose.
"""

import copy
from collections.abc import Callable
from functools import partial
from itertools import compress, cycle
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from normswap.layers.modules import FunctionalSwitchNorm
from normswap.surgery.calls import (
    call_name,
    is_batch_norm_call,
    is_folded,
    norm_arguments,
    norm_call,
    norm_nodes,
    other_use,
    reads_activation,
)
from normswap.surgery.graph_rewrite import compile_forward, free_names
from normswap.surgery.norm_site import NormSite, order_of
from normswap.surgery.observation import Observation, Shape
from normswap.surgery.own_forward import OwnForward, OwnForwards, mentioned_kinds
from normswap.surgery.tracing import GraphFacts
from normswap.surgery.tree import Place, join, modules_by_name
from normswap.surgery.trial import agree, outcome

_FUNCTIONS = {"bn": "torch.nn.functional.batch_norm", "in": "torch.nn.functional.instance_norm"}
_STEMS = {"bn": "batch_norm", "in": "instance_norm"}
_BY_ITSELF = (
    "has no batch statistics to lose at small batches: stays as it is, since of other kinds only modules are swapped "
    "(use nn.InstanceNorm and kinds=('bn', 'in') to have it swapped)"
)
_TRACKED = (
    "instance_norm with running statistics uses each sample's own in training and the running ones in evaluation, and "
    "no mix of SN does both: stays as it is"
)
_FOLDED = f"a call on samples folded into the channels normalizes each by itself, and {_BY_ITSELF}"


def calls_a_norm(module: nn.Module, forwards: OwnForwards, *, ran: bool) -> bool:
    """Ask the own forward of a suspected module; where it cannot be traced, its code, so that a call in it is not lost.

    Of one that `ran` a call would have been seen, unless it makes it in training only: the code tells whether to ask.
    """
    if type(module).__module__.startswith("torch.nn."):
        return False
    if ran and not mentioned_kinds(module):
        return False
    own = forwards.of(module)
    return any(norm_nodes(own.evaluation, kind) for kind in _STEMS) if own.evaluation else bool(mentioned_kinds(module))


def functional_sites(
    place: Place, facts: GraphFacts | None, seen: Observation | None, forwards: OwnForwards
) -> list[NormSite]:
    """One site per call in the owner's own forward, or one of each kind with a problem if that is unreadable."""
    own = forwards.of(place.module)
    if own.evaluation:
        kinds = {kind for kind in _STEMS if norm_nodes(own.evaluation, kind)}
        # What else was seen is a kernel, computed into a new tensor, or a call that the graph does not show.
        kernels = any(map(is_batch_norm_call, own.evaluation.nodes))
        kinds |= set() if kernels else _seen_kinds(place, seen)
    else:
        kinds = _seen_kinds(place, seen) or mentioned_kinds(place.module)
    return [site for kind in _STEMS if kind in kinds for site in _sites_of_kind(kind, place, own, facts, seen)]


def _seen_kinds(place: Place, seen: Observation | None) -> set[str]:
    return {kind for kind in _STEMS if seen and place.names[0] in _seen_calls(kind, seen)}


def _seen_calls(kind: str, seen: Observation) -> dict[str, list[Shape]]:
    return seen.functional if kind == "bn" else seen.instance


def _sites_of_kind(
    kind: str, place: Place, own: OwnForward, facts: GraphFacts | None, seen: Observation | None
) -> list[NormSite]:
    owner, module = place.names[0], place.module
    nodes = norm_nodes(own.evaluation, kind) if own.evaluation else []
    fed = _fed(kind, owner, own, seen) if seen else []
    order, seen_by = order_of(place, facts, seen)
    general = _problem_of_owner(place, own, len(nodes), fed, seen) if kind == "bn" else None
    sites = []
    for index, name in enumerate(free_names(module, max(1, len(nodes)), _STEMS[kind])):
        node = nodes[index] if nodes else None
        shapes = fed[index :: len(nodes)] if nodes else fed
        told_kind, own_problem = _kind_and_problem(kind, node, owner, shapes, seen)
        sites.append(
            NormSite(
                fqn=join(owner, name),
                aliases=tuple(join(alias, name) for alias in place.names[1:]),
                kind=told_kind,
                class_name=_FUNCTIONS[kind] if node is None else call_name(node.target),
                num_features=_channels(module, node, shapes),
                frozen=kind == "bn" and _is_frozen(own, index),
                trainable=_affine_trainable(module, node),
                registered=place.registered,
                owner=owner,
                shapes=tuple(dict.fromkeys(shapes)) if seen else None,
                calls=len(shapes) if seen else None,
                order=order,
                seen_by=seen_by,
                problem=own_problem or general,
            )
        )
    return sites


def _fed(kind: str, owner: str, own: OwnForward, seen: Observation) -> list[Shape]:
    """The shapes that were seen, without those of kernels that were computed into new tensors."""
    shapes = _seen_calls(kind, seen).get(owner, [])
    graph = own.evaluation.nodes if own.evaluation else ()
    calls = [node for node in graph if (call := norm_call(node)) and call.kind == kind]
    if len(shapes) != max(1, seen.runs.get(owner, 0)) * len(calls):
        return shapes
    on_activations = [reads_activation(norm_arguments(node)["input"]) for node in calls]
    return list(compress(shapes, cycle(on_activations)))


def _problem_of_owner(
    place: Place, own: OwnForward, calls: int, fed: list[Shape], seen: Observation | None
) -> str | None:
    """Why no batch_norm call in the owner's forward can be rewritten."""
    owner, module = place.names[0], place.module
    if own.reason:
        return (
            f"the forward of {type(module).__name__} cannot be rewritten ({own.reason}): move its F.batch_norm call "
            "into a module of its own, or use nn.BatchNorm"
        )
    if seen and len(fed) not in (0, max(1, seen.runs.get(owner, 0)) * calls):
        return "not every F.batch_norm call runs in every pass: move the call into a module of its own"
    if seen and owner in seen.owner_inputs and not isinstance(module, fx.GraphModule):
        return _differs_from_eager(module, own, *seen.owner_inputs[owner])
    return None


def _kind_and_problem(
    kind: str, node: fx.Node | None, owner: str, shapes: list[Shape], seen: Observation | None
) -> tuple[str, str | None]:
    """What a call is, and why it stays whatever its owner's forward is like."""
    if kind == "in":
        tracked = norm_arguments(node).get("running_mean") is not None if node else seen and owner in seen.tracked
        return "in", _TRACKED if tracked else _BY_ITSELF
    if (node and is_folded(node)) or _was_fed_folded(owner, shapes, seen):
        return "in", _FOLDED
    use = other_use(node) if node else None
    return "bn", use and f"{use}: export the program again, and convert it without run_decompositions()"


def _was_fed_folded(owner: str, shapes: list[Shape], seen: Observation | None) -> bool:
    """Say whether every batch that a call was fed was one sample, with all samples' channels of a tensor given."""
    given = tree_leaves(seen.owner_inputs.get(owner)) if seen else []
    samples = {tuple(leaf.shape[:2]) for leaf in given if isinstance(leaf, Tensor) and leaf.dim() > 2}
    return bool(shapes) and all(
        shape[0] == 1 and any(n > 1 and n * channels == shape[1] for n, channels in samples) for shape in shapes
    )


def _is_frozen(own: OwnForward, index: int) -> bool:
    """Say whether a call uses the running statistics in both modes, as in a program exported in evaluation."""
    if own.training is None or own.evaluation is None:
        return False
    calls = (norm_nodes(graph, "bn")[index] for graph in (own.training, own.evaluation))
    return all(norm_arguments(node).get("training", False) is False for node in calls)


def _differs_from_eager(
    module: nn.Module, own: OwnForward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """A trace can succeed and be wrong: hold it against the module itself, in both modes, on what it was fed."""

    def run(forward: Callable[..., Any]) -> Any:
        return forward(module, *copy.deepcopy(args), **copy.deepcopy(kwargs))

    forwards = type(module).forward, compile_forward(module, own=own)
    for training in (True, False):
        real, traced = (outcome(module, partial(run, forward), training=training) for forward in forwards)
        if not agree(real, traced):
            return "its traced forward differs from the real one: move its F.batch_norm call into a module of its own"
    return None


def tensors_used(owners: list[tuple[str, nn.Module]], forwards: OwnForwards) -> dict[int, str]:
    """By identity, the tensors that functional sites read, those swapped before included, each with its owner."""
    used: dict[int, str] = {}
    for owner, module in owners:
        graph = forwards.of(module).evaluation
        for arguments in map(_site_arguments(module), graph.nodes) if graph else ():
            tensors = [_attribute(module, arguments.get(name)) for name in _OWN_TENSORS]
            used |= {id(tensor): owner for tensor in tensors if tensor is not None}
    return used


def _site_arguments(module: nn.Module) -> Callable[[fx.Node], dict[str, Any]]:
    gates = {name for name, child in module.named_children() if isinstance(child, FunctionalSwitchNorm)}

    def arguments(node: fx.Node) -> dict[str, Any]:
        if is_batch_norm_call(node):
            return norm_arguments(node)
        return node.kwargs if node.op == "call_module" and node.target in gates else {}

    return arguments


_OWN_TENSORS = ("running_mean", "running_var", "weight", "bias")


def _channels(module: nn.Module, node: fx.Node | None, shapes: list[Shape]) -> int:
    if shapes:
        return shapes[0][1]
    for name in ("running_mean", "weight"):
        tensor = _attribute(module, norm_arguments(node).get(name)) if node is not None else None
        if tensor is not None:
            return tensor.shape[0]
    return 0


def _affine_trainable(module: nn.Module, node: fx.Node | None) -> bool:
    arguments = norm_arguments(node) if node is not None else {}
    tensors = [_attribute(module, arguments.get(name)) for name in ("weight", "bias")]
    own = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    return not own or any(tensor.requires_grad for tensor in own)


def _attribute(module: nn.Module, node: Any) -> Tensor | None:
    if getattr(node, "op", None) != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    found = getattr(modules_by_name(module).get(owner), name, None)
    return found if isinstance(found, Tensor) else None
