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
from normswap.model_state import preserved_state, registered_hooks, seeded
from normswap.surgery.graphs.rewriting import is_rewritten
from normswap.surgery.importance import gated_modules
from normswap.surgery.model_outputs import Leaves, TensorNames, VectorDistance, match_names, read_leaves, relative_l2
from normswap.surgery.module_tree import modules_by_name, walk_modules
from normswap.verification.model_pass import perturb, shared_tensors, stream_gradients

Measure = Literal["evaluation", "training", "gradients", "statistics"]

# A site that differs by more than its precision's limit is wrong unless the original's own norm is as far from itself
# if its input changes by one unit in the last place; beyond the largest response nothing can be said of that input.
_RESPONSE_FACTOR = 10
_MAX_RESPONSE = 1e-3


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
    input_needs_no_grad: bool


class SiteWatch:
    """The pairs of sites that two models have in common, and their errors so far."""

    def __init__(self, original: nn.Module, converted: nn.Module, *, limit: float, eps: float) -> None:
        self._limit, self._eps = limit, eps
        self._original_modules, converted_modules = modules_by_name(original), modules_by_name(converted)
        self._pairs = {
            name: (self._original_modules[name], converted_modules[name])
            for name in (entry.names[0] for entry in walk_modules(converted))
            if name in self._original_modules
            and (isinstance(converted_modules[name], SwitchNorm) or is_rewritten(converted_modules[name]))
        }
        self._modules: dict[nn.Module, list[nn.Module]] = {}
        self.names = tuple(self._pairs)
        self._max_errors: dict[Measure, dict[str, float]] = {measure: {} for measure in get_args(Measure)}
        self.wrong: dict[str, dict[Measure, float]] = {}
        covered = {id(module) for _, new in self._pairs.values() for module in new.modules()}
        self.unpaired = [name for name, gates in gated_modules(converted).items() if id(gates) not in covered]

    def watching(self, *, training: bool, flags: Mapping[int, bool], gradients: bool = False) -> Any:
        """Return a context in which the original's passes are compared site by site.

        Args:
            flags: by the id of a module of the converted model, its training flag in this mode.
            gradients: compare gradients as well.
        """
        return registered_hooks(self._registrations("training" if training else "evaluation", flags, gradients))

    def compare_on_random_input(self, name: str, *, training: bool, flags: Mapping[int, bool]) -> bool:
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
            call = _Call(((x,), {}), torch.get_rng_state(), first=True, input_needs_no_grad=training)
            try:
                with _preserved(self._modules_of(old)), torch.no_grad():
                    output = old.forward(x)
                    found = self._measure_errors(
                        "training" if training else "evaluation", flags, False, old, new, call, output
                    )
            except Exception:  # noqa: BLE001 - that shape is none of its own
                continue
            self._judge(name, found, old, call)
            return True
        return False

    def errors(self) -> tuple[SiteError, ...]:
        """Return the worst error of each site over all calls and batches."""
        return tuple(SiteError(n, *(found.get(n) for found in self._max_errors.values())) for n in self._pairs)

    def _registrations(self, mode: Measure, flags: Mapping[int, bool], gradients: bool) -> Iterator[Callable[[], Any]]:
        for name, (old, new) in self._pairs.items():
            calls: list[_Call] = []
            yield _record_call_hook(old, calls, set())
            yield _compare_call_hook(old, partial(self._compare, name, mode, flags, gradients, old, new), calls)

    def _compare(
        self, name: str, mode: Measure, flags: Mapping[int, bool], gradients: bool,
        old: nn.Module, new: nn.Module, call: _Call, output: Any,
    ) -> None:  # fmt: skip
        found = self._measure_errors(mode, flags, gradients, old, new, call, output)
        for measure, error in found.items():
            self._max_errors[measure][name] = max(self._max_errors[measure].get(name, 0.0), error)
        if isinstance(new, SwitchNorm):
            self._judge(name, found, old, call)

    def _measure_errors(
        self, mode: Measure, flags: Mapping[int, bool], gradients: bool,
        old: nn.Module, new: nn.Module, call: _Call, output: Any,
    ) -> dict[Measure, float]:  # fmt: skip
        found: dict[Measure, float] = {}
        with _preserved(self._modules_of(new)), _set_training_flags(self._modules_of(new), flags):
            found[mode] = _output_distance(new, call, output)
            if call.first:
                found["statistics"] = _statistics_distance(old, new)
        if gradients or (call.input_needs_no_grad and isinstance(new, SwitchNorm)):
            modules = [module for site in (old, new) for module in self._modules_of(site)]
            with _preserved(modules), _set_training_flags(self._modules_of(new), flags):
                found["gradients"] = _gradient_distance(old, new, call)
        return found

    def _judge(self, name: str, found: Mapping[Measure, float], old: nn.Module, call: _Call) -> None:
        for measure, error in found.items():
            if not error <= self._limit and self._is_wrong(measure, error, old, call):
                wrong = self.wrong.setdefault(name, {})
                wrong[measure] = max(wrong.get(measure, 0.0), error)

    def _modules_of(self, site: nn.Module) -> list[nn.Module]:
        """The modules of a site, which is looked through once: sites are called hundreds of times."""
        if site not in self._modules:
            self._modules[site] = [entry.module for entry in walk_modules(site)]
        return self._modules[site]

    def _is_wrong(self, measure: Measure, error: float, old: nn.Module, call: _Call) -> bool:
        """Whether an error beyond the limit is more than what rounding of the input does to the original's norm."""
        if measure == "statistics":
            return True
        perturbed = replace(call, args=tree_map_only(Tensor, lambda t: perturb(t, "random", self._eps), call.args))
        with _preserved(self._modules_of(old)), torch.no_grad():
            if measure == "gradients":
                own_response = _vector_distance(_gradients(old, call), _gradients(old, perturbed))
            else:
                own_response = _leaf_distance(_forward(old, call), _forward(old, perturbed))
        return own_response <= _MAX_RESPONSE and not error <= _RESPONSE_FACTOR * own_response


def _preserved(modules: list[nn.Module]) -> AbstractContextManager[None]:
    # Without what hooks refer to: `forward` calls none, and a hook of each site may refer to the whole model. A forward
    # of a single object may refer to anything, such as the object that this is a copy of.
    return preserved_state(modules, follow_objects=any("forward" in vars(module) for module in modules))


def _record_call_hook(old: nn.Module, calls: list[_Call], called: set[nn.Module]) -> Callable[[], Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        copied_inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
        floating_inputs = [
            leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        input_needs_no_grad = (
            torch.is_grad_enabled()
            and bool(floating_inputs)
            and not any(tensor.requires_grad for tensor in floating_inputs)
        )
        calls.append(_Call(copied_inputs, torch.get_rng_state(), module not in called, input_needs_no_grad))
        called.add(module)

    return lambda: old.register_forward_pre_hook(hook, with_kwargs=True)


def _compare_call_hook(old: nn.Module, compare: Callable[[_Call, Any], None], calls: list[_Call]) -> Callable[[], Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        compare(calls.pop(), output)

    # Before all other hooks, which may change the output of the module but not that of its forward.
    return lambda: old.register_forward_hook(hook, prepend=True)


@contextmanager
def _set_training_flags(modules: Sequence[nn.Module], flags: Mapping[int, bool]) -> Iterator[None]:
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.training = flags.get(id(module), module.training)
        yield
    finally:
        for module, flag in zip(modules, before, strict=True):
            module.training = flag


def _output_distance(new: nn.Module, call: _Call, output: Any) -> float:
    with torch.no_grad():
        try:
            return _leaf_distance(read_leaves(output), _forward(new, call))
        except Exception:  # noqa: BLE001 - the end-to-end pass reports it in words
            return float("inf")


def _forward(module: nn.Module, call: _Call) -> Leaves:
    args, kwargs = call.args
    with seeded(0):
        torch.set_rng_state(call.random_state)
        return read_leaves(module.forward(*args, **kwargs))


def _statistics_distance(old: nn.Module, new: nn.Module) -> float:
    """The buffers of a site after a call: floating ones as one vector, the others by equality."""
    expected, found = (shared_tensors(module, "_buffers") for module in (old, new))
    vector, errors = VectorDistance(), [0.0]
    for names, partner in match_names(expected, found):
        reference, value = expected[names], found[partner]
        if reference.is_floating_point():
            vector.add(reference, value)
        else:
            errors.append(relative_l2(reference, value))
    return max(*errors, vector.result())


def _leaf_distance(reference: Leaves, value: Leaves) -> float:
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
            errors.append(relative_l2(expected, found))
    return max(*errors, vector.result())


def _gradient_distance(old: nn.Module, new: nn.Module, call: _Call) -> float:
    """The gradients of the input and of the parameters of a site and of what replaced it, as one vector."""
    try:
        return _vector_distance(*(_gradients(module, call) for module in (old, new)))
    except Exception:  # noqa: BLE001 - as above
        return float("inf")


def _vector_distance(expected: dict[TensorNames, Tensor], found: dict[TensorNames, Tensor]) -> float:
    partners = dict(match_names(expected, found))
    vector = VectorDistance()
    for names, gradient in expected.items():
        vector.add(gradient, found.pop(partners[names]) if names in partners else torch.zeros_like(gradient))
    for gradient in found.values():
        vector.add(torch.zeros_like(gradient), gradient)
    return vector.result()


def _gradients(module: nn.Module, call: _Call) -> dict[TensorNames, Tensor]:
    """The gradients of a fixed random projection of what a module returns for a call, by the names of its leaves."""
    leaves: dict[TensorNames, Tensor] = {}

    def as_leaf(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        leaf = tensor.detach().clone().requires_grad_(True)
        leaves[(f"input {len(leaves)}",)] = leaf
        return leaf.clone()  # which may be changed in place

    found: dict[TensorNames, Tensor] = {}

    def on_gradient(names: TensorNames, gradient: Tensor) -> None:
        found[names] = found[names] + gradient if names in found else gradient

    # Hooks of the pass that this interrupts, such as those of a checkpoint, have no part in it.
    own_hooks = torch.autograd.graph.saved_tensors_hooks(_identity, _identity)
    with torch.inference_mode(False), torch.enable_grad(), seeded(0), own_hooks:
        torch.set_rng_state(call.random_state)
        args, kwargs = tree_map_only(Tensor, as_leaf, call.args)
        outputs = read_leaves(module.forward(*args, **kwargs)).tensors
        stream_gradients(outputs, {**leaves, **shared_tensors(module, "_parameters")}, on_gradient, seed=0)
    return found


def _identity(tensor: Tensor) -> Tensor:
    return tensor
