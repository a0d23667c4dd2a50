"""`NormSite`: what is known of one place where a model normalizes."""

from dataclasses import dataclass

import torch

from normswap.surgery.observation import Observation, Shape
from normswap.surgery.tracing import GraphFacts
from normswap.surgery.tree import Place


@dataclass(frozen=True)
class NormSite:
    """One place where a model normalizes: a module with all its names, or a functional call and its owner.

    Attributes:
        fqn, aliases: the first name and the others; of a functional site the name that its gates will have.
        kind, class_name, num_features, eps, momentum: what it is; None or 0 where the place does not tell.
        frozen: normalizes with running statistics in training too.
        kept_in_evaluation: the model's own `train()` leaves it in evaluation.
        trainable: some parameter of its own requires a gradient, or it has none of its own.
        registered: its tensors are in the model's state dict (false: held in a Python container only).
        owner: fqn of the module whose forward calls a function that normalizes; None for a module site.
        shapes: distinct input shapes (N, C, *spatial) in the observed pass, None without one.
        calls: calls per forward pass in evaluation, None if not observed.
        order: place in the order of execution, None if it was not seen to run.
        producer: module or function whose output it reads, where known.
        seen_by: what told the order: "forward pass", "symbolic trace", or "module tree" where it was not seen to run.
        problem: why it cannot be swapped, or None.
    """

    fqn: str
    aliases: tuple[str, ...]
    kind: str
    class_name: str
    num_features: int = 0
    eps: float | None = None
    momentum: float | None = None
    frozen: bool = False
    kept_in_evaluation: bool = False
    trainable: bool = True
    registered: bool = True
    synchronize: bool = False
    owner: str | None = None
    shapes: tuple[Shape, ...] | None = None
    calls: int | None = None
    order: int | None = None
    producer: str | None = None
    seen_by: str = "module tree"
    problem: str | None = None

    @property
    def positions(self) -> int | None:
        """Smallest number of spatial positions per sample that was fed, None where nothing was."""
        return min((_positions(shape) for shape in self.shapes), default=None) if self.shapes else None


def _positions(shape: Shape) -> int:
    return int(torch.Size(shape[2:]).numel())


def order_of(place: Place, facts: GraphFacts | None, seen: Observation | None) -> tuple[int | None, str]:
    """When the site runs and what told so; the forward pass knows better than the graph."""
    if seen is not None and place.names[0] in seen.order:
        return seen.order[place.names[0]], "forward pass"
    traced = [facts.order.index(name) for name in place.names if name in facts.order] if facts and not seen else []
    return (traced[0], "symbolic trace") if traced else (None, "module tree")
