"""Which dimensions of the inputs stay free in an exported file, their lower bounds, and inputs of other sizes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from normswap.baking.compact_norm import CompactNorm
from normswap.errors import ModelError
from normswap.model_state import call_model, registered_hooks
from normswap.surgery.arguments import describe_shapes

_SPATIAL_NAMES = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}
BATCH = "batch"
_BATCH_SIZES = (1, 2, 5)


@dataclass(frozen=True)
class FreeSize:
    """A dimension that may have any size from `at_least` on, in an input with a name such as `height`."""

    name: str
    at_least: int = 1


def name_dimensions(tensor: Tensor) -> dict[int, str]:
    """Return the dimensions that can stay free by index: the batch, and of a floating tensor the spatial ones."""
    names = {0: BATCH} if tensor.dim() else {}
    if tensor.is_floating_point():
        spatial = _SPATIAL_NAMES.get(tensor.dim(), ())
        names |= {index: name for index, name in enumerate(spatial, 2) if tensor.shape[index] > 1}
    return names


def with_two_samples(inputs: Any) -> Any:
    """Return inputs whose batch has two samples if it had one, since tracers treat a size of 1 as a constant."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    if not all(tensor.shape[0] == 1 for tensor in tensors):
        return inputs
    return tree_map_only(Tensor, lambda t: torch.cat((t, t)) if t.dim() else t, inputs)


def smallest_size(network: nn.Module, inputs: Any) -> int:
    """Return the smallest size of all spatial dimensions at which every site with an `in` branch has two positions.

    It is found by halving, with tensors without values. The bound is 1 if no site needs two positions. A dimension of
    the example that is smaller than the bound must not become smaller.

    Raises:
        ModelError: such a site has one position even on `inputs`.
    """
    sites = {name: each for name, each in network.named_modules() if _needs_positions(each)}
    sizes = [
        leaf.shape[index]
        for leaf in tree_leaves(inputs)
        if isinstance(leaf, Tensor)
        for index, name in name_dimensions(leaf).items()
        if name != BATCH
    ]
    if not sites or not sizes:
        return 1
    low, high = 0, max(sizes)  # the answer is in (low, high]
    if name := _first_small_site(network, inputs, sites, high):
        raise ModelError(
            f"{name}: expected at least two spatial positions for its `in` branch, got one on inputs of "
            f"{describe_shapes(inputs)}: pass larger ones with example_inputs="
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _first_small_site(network, inputs, sites, middle) else (low, middle)
    return high


def _needs_positions(module: nn.Module) -> bool:
    kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    return module.needs_positions if isinstance(module, CompactNorm) else isinstance(module, kinds)


class _OnePosition(Exception):  # noqa: N818 - ends a forward pass
    """A site has one position."""


def _first_small_site(network: nn.Module, inputs: Any, sites: Mapping[str, nn.Module], size: int) -> str | None:
    """Return the first site with one position if no dimension is larger than `size`; "the network" if that fails."""

    def watch(name: str, site: nn.Module) -> Any:
        def check(_module: nn.Module, args: Any) -> None:
            if args and prod(args[0].shape[2:]) == 1:
                raise _OnePosition(name)

        return lambda: site.register_forward_pre_hook(check)

    def shrink(tensor: Tensor) -> Tensor:
        index = (
            tuple(
                slice(size) if axis in names and names[axis] != BATCH else slice(None) for axis in range(tensor.dim())
            )
            if (names := name_dimensions(tensor))
            else ()
        )
        return tensor[index]

    smaller = tree_map_only(Tensor, shrink, inputs)
    with registered_hooks(watch(name, site) for name, site in sites.items()), torch.no_grad():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with mode:
                call_model(network, tree_map_only(Tensor, mode.from_tensor, smaller))
        except _OnePosition as found:
            return str(found)
        except Exception:  # noqa: BLE001 - the model's code: it needs a larger input
            return "the network"
    return None


def sample_cases(inputs: Any, free: Mapping[str, FreeSize]) -> list[Any]:
    """Return inputs of three batch sizes and two sizes of images, as far as these are free, the example first.

    The values are drawn from those of `inputs`.
    """
    batches: tuple[int | None, ...] = _BATCH_SIZES if BATCH in free else (None,)
    spatial = [name for name in free if name != BATCH]
    generator = torch.Generator().manual_seed(0)
    cases = {describe_shapes(inputs): inputs}
    for changed in (False, True) if spatial else (False,):
        for batch in batches:
            resample = partial(_resample, free=free, batch=batch, changed=changed, generator=generator)
            case = tree_map_only(Tensor, resample, inputs)
            cases.setdefault(describe_shapes(case), case)
    return list(cases.values())


def _resample(
    tensor: Tensor, *, free: Mapping[str, FreeSize], batch: int | None, changed: bool, generator: torch.Generator
) -> Tensor:
    shape = list(tensor.shape)
    for order, (index, name) in enumerate(name_dimensions(tensor).items()):
        if name == BATCH:
            shape[index] = batch or shape[index]
        elif name in free and changed:
            shape[index] = _other_size(shape[index], free[name].at_least, order)
    if not tensor.numel():
        return tensor
    drawn = torch.randint(tensor.numel(), shape, generator=generator)
    return tensor.detach().flatten().cpu()[drawn]


def _other_size(size: int, at_least: int, order: int) -> int:
    """A smaller size that is allowed, else a larger one; another one for each dimension of an image."""
    smaller = size - (size * (order + 1)) // 8
    return smaller if at_least <= smaller < size else size + 8 * order


def symbolic_dimensions(program: torch.export.ExportedProgram, inputs: Any) -> Iterator[tuple[str, int, Any]]:
    """Yield name, size in the example and symbol of each dimension of the inputs that is free in a program."""
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    names = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    tensors = [value for value in values if isinstance(value, Tensor)]
    for leaf, traced in zip(leaves, tensors, strict=True):
        for index, name in name_dimensions(leaf).items():
            size: Any = traced.shape[index]
            # Else the network fixes it; torch also fixes a size that a later layer reduces to 1.
            if isinstance(size, torch.SymInt) and not _is_fixed(program, size):
                yield name, leaf.shape[index], size.node.expr


def _is_fixed(program: torch.export.ExportedProgram, size: torch.SymInt) -> bool:
    """Whether only one value of a size is allowed, or none above that of the example."""
    node: Any = size.node
    allowed: Any = program.range_constraints.get(node.expr)
    return node.maybe_as_int() is not None or (allowed is not None and allowed.upper <= node.hint)
