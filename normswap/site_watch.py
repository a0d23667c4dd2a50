"""Original against converted site by site: each new site is fed what the original's was fed, as it runs.

Nothing is stored but the worst error of each site. The models are left as they are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from normswap.comparison import worst
from normswap.layers.modules import SwitchNorm
from normswap.modes import hooked, preserved_state, seeded, training_flags
from normswap.surgery.graph_rewrite import is_rewritten
from normswap.surgery.tree import modules_by_name, walk_modules


@dataclass(frozen=True)
class SiteError:
    """Relative L2 between a site and what replaced it, fed the same recorded input; None where it did not run."""

    fqn: str
    evaluation: float | None
    training: float | None


@dataclass(frozen=True)
class _Call:
    """What a site is fed, as it was before the site ran, and the random state then."""

    args: Any
    random_state: Tensor


class SiteWatch:
    """The pairs of sites that two models have in common, and their errors so far."""

    def __init__(self, original: nn.Module, converted: nn.Module) -> None:
        olds, news = modules_by_name(original), modules_by_name(converted)
        self._pairs = {
            name: (olds[name], news[name])
            for name in (place.names[0] for place in walk_modules(converted))
            if name in olds and (isinstance(news[name], SwitchNorm) or is_rewritten(news[name]))
        }
        self._found: dict[bool, dict[str, float]] = {False: {}, True: {}}

    def watching(self, *, training: bool) -> Any:
        """Return a context in which the original's passes are compared site by site."""
        return hooked(self._registrations(self._found[training], training=training))

    def errors(self) -> tuple[SiteError, ...]:
        """Return the worst error of each site over all calls and batches."""
        return tuple(SiteError(n, self._found[False].get(n), self._found[True].get(n)) for n in self._pairs)

    def _registrations(self, found: dict[str, float], *, training: bool) -> Iterator[Callable[[], Any]]:
        for name, (old, new) in self._pairs.items():
            calls: list[_Call] = []
            yield _remember_call(old, calls)
            yield _compare_call(old, new, name, found, calls, training=training)


def _remember_call(old: nn.Module, calls: list[_Call]) -> Callable[[], Any]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        fed = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
        calls.append(_Call(fed, torch.get_rng_state()))

    return lambda: old.register_forward_pre_hook(hook, with_kwargs=True)


def _compare_call(
    old: nn.Module, new: nn.Module, name: str, found: dict[str, float], calls: list[_Call], *, training: bool
) -> Callable[[], Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        fed = calls.pop()
        args, kwargs = fed.args
        modules = [place.module for place in walk_modules(new)]
        # Without what hooks refer to: `forward` calls none, and a hook of each site may refer to the whole model.
        preserved = preserved_state(modules, reach=False)
        with torch.no_grad(), training_flags(modules, training=training), preserved, seeded(0):
            torch.set_rng_state(fed.random_state)
            try:
                result = tree_leaves(new.forward(*args, **kwargs))
            except Exception:  # noqa: BLE001 - the end-to-end pass reports it in words
                result = [None]
            found[name] = max(found.get(name, 0.0), worst(tree_leaves(output), result))

    # Before all other hooks, which may change the output of the module but not that of its forward.
    return lambda: old.register_forward_hook(hook, prepend=True)
