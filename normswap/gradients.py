"""The gradients of a pass, each handed on as soon as backward has it: kept, or held against kept ones, then let go.

In float64 the gradients of a model take twice what its file takes, and a proof compares those of two models. So the
first ones go to a temporary file (in `TMPDIR`) where they are many, and the second ones are let go one by one.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from normswap.comparison import Names, VectorDistance
from normswap.modes import hooked

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
