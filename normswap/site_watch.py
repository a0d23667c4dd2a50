"""Original against converted site by site: each new site is fed what the original's was fed, as it runs.

Nothing is stored but the worst error of each site. The models are left as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from normswap.comparison import Names, VectorDistance, distance, shared
from normswap.gradients import hand_on_gradients
from normswap.layers.modules import SwitchNorm
from normswap.model_pass import shared_tensors
from normswap.modes import hooked, preserved_state, seeded
from normswap.output_leaves import Leaves, read_leaves
from normswap.surgery.gated import gated_modules
from normswap.surgery.graph_rewrite import is_rewritten
from normswap.surgery.tree import modules_by_name, walk_modules

Measure = Literal["evaluation", "training", "gradients"]


@dataclass(frozen=True)
class SiteError:
    """Relative L2 between a site and what replaced it, fed the same recorded input; None where it was not measured.

    `gradients` are those of its input and of its parameters as one vector, measured only if the whole model cannot be
    judged.
    """

    fqn: str
    evaluation: float | None
    training: float | None
    gradients: float | None = None


@dataclass(frozen=True)
class _Call:
    """What a site is fed, as it was before the site ran, and the random state then."""

    args: Any
    random_state: Tensor


class SiteWatch:
    """The pairs of sites that two models have in common, and their errors so far."""

    def __init__(self, original: nn.Module, converted: nn.Module) -> None:
        self._olds, news = modules_by_name(original), modules_by_name(converted)
        self._pairs = {
            name: (self._olds[name], news[name])
            for name in (place.names[0] for place in walk_modules(converted))
            if name in self._olds and (isinstance(news[name], SwitchNorm) or is_rewritten(news[name]))
        }
        self._modules: dict[nn.Module, list[nn.Module]] = {}
        self.names = tuple(self._pairs)
        self._found: dict[Measure, dict[str, float]] = {"evaluation": {}, "training": {}, "gradients": {}}
        covered = {id(module) for _, new in self._pairs.values() for module in new.modules()}
        self.without_pair = [name for name, gates in gated_modules(converted).items() if id(gates) not in covered]

    def watching(self, *, training: bool, flags: Mapping[int, bool], gradients: bool = False) -> Any:
        """Return a context in which the original's passes are compared site by site.

        Args:
            flags: by the id of a module of the converted model, its training flag in this mode.
            gradients: compare gradients as well.
        """
        return hooked(self._registrations("training" if training else "evaluation", flags, gradients))

    def errors(self) -> tuple[SiteError, ...]:
        """Return the worst error of each site over all calls and batches."""
        return tuple(SiteError(n, *(found.get(n) for found in self._found.values())) for n in self._pairs)

    def _registrations(self, mode: Measure, flags: Mapping[int, bool], gradients: bool) -> Iterator[Callable[[], Any]]:
        for name, (old, new) in self._pairs.items():
            calls: list[_Call] = []
            yield _remember_call(old, calls)
            yield _compare_call(old, partial(self._compare, name, mode, flags, gradients, old, new), calls)

    def _compare(
        self, name: str, mode: Measure, flags: Mapping[int, bool], gradients: bool,
        old: nn.Module, new: nn.Module, call: _Call, output: Any,
    ) -> None:  # fmt: skip
        modules = [module for site in ((old, new) if gradients else (new,)) for module in self._inside(site)]
        # Without what hooks refer to: `forward` calls none, and a hook of each site may refer to the whole model.
        with preserved_state(modules, reach=False), _flags_of(self._inside(new), flags):
            self._note(mode, name, _outputs_apart(new, call, output))
            if gradients:
                self._note("gradients", name, _gradients_apart(old, new, call))

    def _inside(self, site: nn.Module) -> list[nn.Module]:
        """The modules of a site, which is looked through once: sites are called hundreds of times."""
        if site not in self._modules:
            self._modules[site] = [place.module for place in walk_modules(site)]
        return self._modules[site]

    def _note(self, measure: Measure, name: str, error: float) -> None:
        self._found[measure][name] = max(self._found[measure].get(name, 0.0), error)


def _remember_call(old: nn.Module, calls: list[_Call]) -> Callable[[], Any]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        fed = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
        calls.append(_Call(fed, torch.get_rng_state()))

    return lambda: old.register_forward_pre_hook(hook, with_kwargs=True)


def _compare_call(old: nn.Module, compare: Callable[[_Call, Any], None], calls: list[_Call]) -> Callable[[], Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        compare(calls.pop(), output)

    # Before all other hooks, which may change the output of the module but not that of its forward.
    return lambda: old.register_forward_hook(hook, prepend=True)


@contextmanager
def _flags_of(modules: Sequence[nn.Module], flags: Mapping[int, bool]) -> Iterator[None]:
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = flags.get(id(module), module.training)
        yield
    finally:
        for module, flag in zip(modules, before, strict=True):
            module.training = flag


def _outputs_apart(new: nn.Module, call: _Call, output: Any) -> float:
    args, kwargs = call.args
    with torch.no_grad(), seeded(0):
        torch.set_rng_state(call.random_state)
        try:
            result = read_leaves(new.forward(*args, **kwargs))
            return _leaves_apart(read_leaves(output), result)
        except Exception:  # noqa: BLE001 - the end-to-end pass reports it in words
            return float("inf")


def _leaves_apart(reference: Leaves, value: Leaves) -> float:
    """All floating values as one vector: a number that is zero in truth has no relative error of its own."""
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
            errors.append(distance(expected, found))
    return max(*errors, vector.result())


def _gradients_apart(old: nn.Module, new: nn.Module, call: _Call) -> float:
    """The gradients of the input and of the parameters of a site and of what replaced it, as one vector."""
    try:
        expected, found = (_gradients(module, call) for module in (old, new))
    except Exception:  # noqa: BLE001 - as above
        return float("inf")
    partners = dict(shared(expected, found))
    vector = VectorDistance()
    for names, gradient in expected.items():
        vector.add(gradient, found.pop(partners[names]) if names in partners else torch.zeros_like(gradient))
    for gradient in found.values():
        vector.add(torch.zeros_like(gradient), gradient)
    return vector.result()


def _gradients(module: nn.Module, call: _Call) -> dict[Names, Tensor]:
    """The gradients of a fixed random projection of what a module returns for a call, by the names of its leaves."""
    leaves: dict[Names, Tensor] = {}

    def as_leaf(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        leaf = tensor.detach().clone().requires_grad_(True)
        leaves[(f"input {len(leaves)}",)] = leaf
        return leaf.clone()  # which may be changed in place

    found: dict[Names, Tensor] = {}

    def receive(names: Names, gradient: Tensor) -> None:
        found[names] = found[names] + gradient if names in found else gradient

    with torch.enable_grad(), seeded(0):
        torch.set_rng_state(call.random_state)
        args, kwargs = tree_map_only(Tensor, as_leaf, call.args)
        outputs = read_leaves(module.forward(*args, **kwargs)).tensors
        hand_on_gradients(outputs, {**leaves, **shared_tensors(module, "_parameters")}, receive, seed=0)
    return found
