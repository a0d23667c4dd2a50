"""Calls with one spatial position per channel, where `in` has no variance: another branch takes its weight.

Parameters stay as they are, and gates get the gradients of the mixture that was used. It is the same for every backend,
since it is done to the gate parameters before one is called.
"""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normswap.errors import LayerError
from normswap.layers.dispatch import can_read, runs_now
from normswap.layers.importance import Branch, Gate, importance_weights
from normswap.layers.mixing import read_weights

_numbers = itertools.count()


class SiteName(NamedTuple):
    """What a warning calls a layer, and a number that tells layers of the same name apart."""

    name: str
    number: int


def new_site_name(name: str) -> SiteName:
    """Return a name that no other layer of this process has; copies of the layer share it."""
    return SiteName(name, next(_numbers))


def without_instance(
    x: Tensor, mean_weight: Tensor, var_weight: Tensor, gate: Gate, branches: Sequence[Branch], site: SiteName | None
) -> tuple[Tensor, Tensor, tuple[Branch, ...]]:
    """Return simplex points (K - 1,) for the branches beside `in`, which are returned third.

    The weight of `in` goes to `ln` if that is among them, else to `bn`.

    Args:
        x: fed to a layer with the gate parameters (K,) `mean_weight` and `var_weight`.
        site: warned of once if `in` has weight, or if reading the weights would wait for a device or break a graph.

    Raises:
        LayerError: `in` is the only branch.
    """
    left = tuple(branch for branch in branches if branch != "in")
    if not left:
        raise LayerError(
            f"one spatial position per channel (input of shape {tuple(x.shape)}) leaves the `in` branch no variance, "
            "and there is no other one: build the layer with branches=('ln', 'bn'), or plan with an input of the real "
            "size"
        )
    heir: Branch = "ln" if "ln" in left else "bn"
    if site is not None:
        _warn(x, (mean_weight, var_weight), gate, branches.index("in"), heir, site)
    weights = importance_weights(torch.stack((mean_weight, var_weight)), gate)
    others = [weights[:, branches.index(branch)] for branch in left if branch != heir]
    # What the others leave: so a weight of exactly 0 or 1 stays one.
    rest = 1 - torch.stack(others).sum(0) if others else 1 + 0 * weights.sum(1)
    taken = iter(others)
    points = torch.stack([rest if branch == heir else next(taken) for branch in left], dim=1)
    return points[0], points[1], left


def _warn(x: Tensor, gates: tuple[Tensor, Tensor], gate: Gate, place: int, heir: Branch, site: SiteName) -> None:
    if torch.compiler.is_compiling():
        if not torch.compiler.is_exporting():
            _warn_once(*site, heir)
        return
    if not runs_now(x) or site in _warned:
        return
    if not all(can_read(point) for point in gates) or any(read_weights(point, gate)[place] != 0 for point in gates):
        _warn_once(*site, heir)


_warned: set[SiteName] = set()


def _warn_once(name: str, number: int, heir: Branch) -> bool:
    """Warn of a site, once; a compiler calls this while it traces, with what is constant."""
    site = SiteName(name, number)
    if site not in _warned:
        _warned.add(site)
        warnings.warn(
            f"{name} is fed one spatial position per channel, where `in` has no variance: in such calls the weight of "
            f"`in` goes to `{heir}`, and parameters stay as they are. To leave `in` out, convert with an example input "
            "of the real size",
            stacklevel=2,
        )
    return True


# The mark that `torch.compiler.assume_constant_result` sets, which would import the compiler for everyone.
_marked: Any = _warn_once
_marked._dynamo_marked_constant = True
