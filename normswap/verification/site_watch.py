"""Original against converted site by site: each new site is fed what the original's was fed, as it runs.

Nothing is stored but the worst error of each site. The models are left as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from normswap.layers.switch_norm import SwitchNorm
from normswap.model_state import hooked, preserved_state, seeded
from normswap.surgery.graphs.rewriting import is_rewritten
from normswap.surgery.importance import gated_modules
from normswap.surgery.model_outputs import Leaves, Names, VectorDistance, distance, read_leaves, shared
from normswap.surgery.module_tree import modules_by_name, walk_modules
from normswap.verification.model_pass import hand_on_gradients, nudge, shared_tensors

Measure = Literal["evaluation", "training", "gradients", "statistics"]

# A site that differs by more than its precision's limit is wrong unless the original's own norm is as far from itself
# if its input changes by one unit in the last place; beyond the largest response nothing can be said of that input.
_RESPONSE_FACTOR = 10
_MOST_RESPONSE = 1e-3


@dataclass(frozen=True)
class SiteError:
    """Relative L2 between a site and what replaced it, fed the same recorded input; None where it was not measured.

    `gradients` are those of its input and of its parameters as one vector, measured only if the whole model cannot be
    judged or its gradients say nothing of the site; `statistics` are its buffers after a call.
    """

    fqn: str
    evaluation: float | None
    training: float | None
    gradients: float | None = None
    statistics: float | None = None


@dataclass(frozen=True)
class _Call:
    """What a site is fed, as it was before the site ran, and the random state then.

    `first` is the first call in a pass, which finds the running statistics of the model; `ends` tells that the backward
    pass of the model takes no gradient of the input, so that nothing else shows whether it is right.
    """

    args: Any
    random_state: Tensor
    first: bool
    ends: bool


class SiteWatch:
    """The pairs of sites that two models have in common, and their errors so far."""

    def __init__(self, original: nn.Module, converted: nn.Module, *, limit: float, eps: float) -> None:
        self._limit, self._eps = limit, eps
        self._olds, news = modules_by_name(original), modules_by_name(converted)
        self._pairs = {
            name: (self._olds[name], news[name])
            for name in (place.names[0] for place in walk_modules(converted))
            if name in self._olds and (isinstance(news[name], SwitchNorm) or is_rewritten(news[name]))
        }
        self._modules: dict[nn.Module, list[nn.Module]] = {}
        self.names = tuple(self._pairs)
        self._found: dict[Measure, dict[str, float]] = {measure: {} for measure in get_args(Measure)}
        self.wrong: dict[str, dict[Measure, float]] = {}
        covered = {id(module) for _, new in self._pairs.values() for module in new.modules()}
        self.without_pair = [name for name, gates in gated_modules(converted).items() if id(gates) not in covered]

    def watching(self, *, training: bool, flags: Mapping[int, bool], gradients: bool = False) -> Any:
        """Return a context in which the original's passes are compared site by site.

        Args:
            flags: by the id of a module of the converted model, its training flag in this mode.
            gradients: compare gradients as well.
        """
        return hooked(self._registrations("training" if training else "evaluation", flags, gradients))

    def feed(self, name: str, *, training: bool, flags: Mapping[int, bool]) -> bool:
        """Compare a site on random input of any number of dimensions that the original's takes.

        Args:
            training, flags: as in `watching`; the original is in that mode already.

        Returns:
            Whether it takes one; what differs then is in `wrong`.
        """
        old, new = self._pairs[name]
        tensor = next((t for t in (*new.parameters(), *new.buffers()) if t.is_floating_point()), None)
        if not isinstance(new, SwitchNorm) or tensor is None:
            return False
        for sizes in ((3, 3), (5,), (3, 3, 3), ()):
            with seeded(0):
                x = torch.randn(4, new.num_features, *sizes).to(tensor)
            call = _Call(((x,), {}), torch.get_rng_state(), first=True, ends=training)
            try:
                with _preserved(self._inside(old)), torch.no_grad():
                    output = old.forward(x)
                    found = self._measured(
                        "training" if training else "evaluation", flags, False, old, new, call, output
                    )
            except Exception:  # noqa: BLE001 - that shape is none of its own
                continue
            self._judge(name, found, old, call)
            return True
        return False

    def errors(self) -> tuple[SiteError, ...]:
        """Return the worst error of each site over all calls and batches."""
        return tuple(SiteError(n, *(found.get(n) for found in self._found.values())) for n in self._pairs)

    def _registrations(self, mode: Measure, flags: Mapping[int, bool], gradients: bool) -> Iterator[Callable[[], Any]]:
        for name, (old, new) in self._pairs.items():
            calls: list[_Call] = []
            yield _remember_call(old, calls, set())
            yield _compare_call(old, partial(self._compare, name, mode, flags, gradients, old, new), calls)

    def _compare(
        self, name: str, mode: Measure, flags: Mapping[int, bool], gradients: bool,
        old: nn.Module, new: nn.Module, call: _Call, output: Any,
    ) -> None:  # fmt: skip
        found = self._measured(mode, flags, gradients, old, new, call, output)
        for measure, error in found.items():
            self._found[measure][name] = max(self._found[measure].get(name, 0.0), error)
        if isinstance(new, SwitchNorm):
            self._judge(name, found, old, call)

    def _measured(
        self, mode: Measure, flags: Mapping[int, bool], gradients: bool,
        old: nn.Module, new: nn.Module, call: _Call, output: Any,
    ) -> dict[Measure, float]:  # fmt: skip
        found: dict[Measure, float] = {}
        with _preserved(self._inside(new)), _flags_of(self._inside(new), flags):
            found[mode] = _outputs_apart(new, call, output)
            if call.first:
                found["statistics"] = _statistics_apart(old, new)
        if gradients or (call.ends and isinstance(new, SwitchNorm)):
            modules = [module for site in (old, new) for module in self._inside(site)]
            with _preserved(modules), _flags_of(self._inside(new), flags):
                found["gradients"] = _gradients_apart(old, new, call)
        return found

    def _judge(self, name: str, found: Mapping[Measure, float], old: nn.Module, call: _Call) -> None:
        for measure, error in found.items():
            if not error <= self._limit and self._is_wrong(measure, error, old, call):
                wrong = self.wrong.setdefault(name, {})
                wrong[measure] = max(wrong.get(measure, 0.0), error)

    def _inside(self, site: nn.Module) -> list[nn.Module]:
        """The modules of a site, which is looked through once: sites are called hundreds of times."""
        if site not in self._modules:
            self._modules[site] = [place.module for place in walk_modules(site)]
        return self._modules[site]

    def _is_wrong(self, measure: Measure, error: float, old: nn.Module, call: _Call) -> bool:
        """Whether an error beyond the limit is more than what rounding of the input does to the original's norm."""
        if measure == "statistics":
            return True
        nudged = replace(call, args=tree_map_only(Tensor, lambda t: nudge(t, "random", self._eps), call.args))
        with _preserved(self._inside(old)), torch.no_grad():
            if measure == "gradients":
                own = _vectors_apart(_gradients(old, call), _gradients(old, nudged))
            else:
                own = _leaves_apart(_forward(old, call), _forward(old, nudged))
        return own <= _MOST_RESPONSE and not error <= _RESPONSE_FACTOR * own


def _preserved(modules: list[nn.Module]) -> AbstractContextManager[None]:
    # Without what hooks refer to: `forward` calls none, and a hook of each site may refer to the whole model. A forward
    # of a single object may refer to anything, such as the object that this is a copy of.
    return preserved_state(modules, reach=any("forward" in vars(module) for module in modules))


def _remember_call(old: nn.Module, calls: list[_Call], called: set[nn.Module]) -> Callable[[], Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        fed = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        ends = torch.is_grad_enabled() and bool(given) and not any(tensor.requires_grad for tensor in given)
        calls.append(_Call(fed, torch.get_rng_state(), module not in called, ends))
        called.add(module)

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
    with torch.no_grad():
        try:
            return _leaves_apart(read_leaves(output), _forward(new, call))
        except Exception:  # noqa: BLE001 - the end-to-end pass reports it in words
            return float("inf")


def _forward(module: nn.Module, call: _Call) -> Leaves:
    args, kwargs = call.args
    with seeded(0):
        torch.set_rng_state(call.random_state)
        return read_leaves(module.forward(*args, **kwargs))


def _statistics_apart(old: nn.Module, new: nn.Module) -> float:
    """The buffers of a site after a call: floating ones as one vector, the others by equality."""
    expected, found = (shared_tensors(module, "_buffers") for module in (old, new))
    vector, errors = VectorDistance(), [0.0]
    for names, partner in shared(expected, found):
        reference, value = expected[names], found[partner]
        if reference.is_floating_point():
            vector.add(reference, value)
        else:
            errors.append(distance(reference, value))
    return max(*errors, vector.result())


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
        return _vectors_apart(*(_gradients(module, call) for module in (old, new)))
    except Exception:  # noqa: BLE001 - as above
        return float("inf")


def _vectors_apart(expected: dict[Names, Tensor], found: dict[Names, Tensor]) -> float:
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

    # Hooks of the pass that this interrupts, such as those of a checkpoint, have no part in it.
    own_hooks = torch.autograd.graph.saved_tensors_hooks(_same, _same)
    with torch.inference_mode(False), torch.enable_grad(), seeded(0), own_hooks:
        torch.set_rng_state(call.random_state)
        args, kwargs = tree_map_only(Tensor, as_leaf, call.args)
        outputs = read_leaves(module.forward(*args, **kwargs)).tensors
        hand_on_gradients(outputs, {**leaves, **shared_tensors(module, "_parameters")}, receive, seed=0)
    return found


def _same(tensor: Tensor) -> Tensor:
    return tensor
