"""Compare two models site by site, and everything outside their sites.

While the original model runs, hooks give each converted site the input of the site that it replaced. Only the largest
error of each site is kept, and both models are left as they were. Outside the sites, modules, their classes, tensors,
plain attributes and hooks must be equal.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import BuiltinFunctionType, FunctionType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from normswap.layers.switch_norm import SwitchNorm
from normswap.model_state import preserved_state, registered_hooks, seeded, training_flags
from normswap.surgery.graphs.rewriting import is_rewritten
from normswap.surgery.importance import gated_modules
from normswap.surgery.model_outputs import Leaves, TensorNames, VectorDistance, match_names, read_leaves, relative_l2
from normswap.surgery.module_tree import ModuleEntry, class_name, modules_by_name, walk_modules
from normswap.verification.model_pass import gradient_distance, output_distance, shared_tensors, stream_gradients
from normswap.verification.precision import MAX_RESPONSE, RESPONSE_FACTOR, perturb
from normswap.verification.training_reference import is_reference_forward

Measure = Literal["evaluation", "training", "gradients", "statistics"]


@dataclass(frozen=True)
class SiteError:
    """The relative L2 errors of a converted site on the inputs that the original site received; None if not measured.

    Attributes:
        fqn: the name of the site.
        evaluation: of the outputs in evaluation.
        training: of the outputs in training.
        gradients: of the gradients of its input and parameters as one vector; measured only if the whole model cannot
            be judged, or if its gradients do not depend on the site.
        statistics: of its buffers after a call.
    """

    fqn: str
    evaluation: float | None
    training: float | None
    gradients: float | None = None
    statistics: float | None = None


@dataclass(frozen=True)
class SiteCall:
    """The input of a site, copied before the site ran.

    Attributes:
        args: positional and keyword arguments.
        random_state: the state of torch's CPU generator before the call.
        first: whether it is the first call in a pass, which starts from the running statistics of the model.
        input_needs_no_grad: whether the model's backward pass computes no gradient of the input, and so does not
            check it.
    """

    args: Any
    random_state: Tensor
    first: bool
    input_needs_no_grad: bool


@dataclass(frozen=True)
class _Conditions:
    """How sites are compared in one pass: the mode, the flags of converted modules by id, and whether gradients too."""

    mode: Measure
    flags: Mapping[int, bool]
    gradients: bool


@dataclass(frozen=True)
class SitePair:
    """A site of the original model and the converted site of the same name."""

    name: str
    original: nn.Module
    converted: nn.Module

    # Cached: sites are called hundreds of times.
    @cached_property
    def entries(self) -> tuple[Sequence[ModuleEntry], Sequence[ModuleEntry]]:
        """The modules of both sites."""
        return walk_modules(self.original), walk_modules(self.converted)

    @cached_property
    def original_modules(self) -> list[nn.Module]:
        return [entry.module for entry in self.entries[0]]

    @cached_property
    def converted_modules(self) -> list[nn.Module]:
        return [entry.module for entry in self.entries[1]]

    @property
    def is_module_site(self) -> bool:
        """Whether the converted site is a layer, not a module with a rewritten forward."""
        return isinstance(self.converted, SwitchNorm)


class SiteWatch:
    """The errors of all sites that two models have in common.

    Attributes:
        names: the names of these sites.
        wrong: the errors above the limit, by site and measure.
        unpaired: the names of layers of the converted model that belong to none of these sites.
    """

    def __init__(self, original: nn.Module, converted: nn.Module, *, limit: float, eps: float) -> None:
        self._limit, self._eps = limit, eps
        original_modules, converted_modules = modules_by_name(original), modules_by_name(converted)
        self._pairs = {
            name: SitePair(name, original_modules[name], converted_modules[name])
            for name in (entry.names[0] for entry in walk_modules(converted))
            if name in original_modules
            and (isinstance(converted_modules[name], SwitchNorm) or is_rewritten(converted_modules[name]))
        }
        self.names = tuple(self._pairs)
        self._max_errors: dict[Measure, dict[str, float]] = {measure: {} for measure in get_args(Measure)}
        self.wrong: dict[str, dict[Measure, float]] = {}
        covered = {id(module) for pair in self._pairs.values() for module in pair.converted.modules()}
        self.unpaired = [name for name, gates in gated_modules(converted).items() if id(gates) not in covered]

    @property
    def pairs(self) -> tuple[SitePair, ...]:
        """The sites that both models have."""
        return tuple(self._pairs.values())

    def watching(self, *, training: bool, flags: Mapping[int, bool], gradients: bool = False) -> Any:
        """Return a context in which every call of a site of the original model is compared.

        Args:
            training: whether the original model runs in training.
            flags: the training flags of the converted model's modules in this mode, by their `id`.
            gradients: also compare the gradients of each site.
        """
        conditions = _Conditions("training" if training else "evaluation", flags, gradients)
        return registered_hooks(self._registrations(conditions))

    def compare_on_random_input(self, name: str, *, training: bool, flags: Mapping[int, bool]) -> bool:
        """Compare a site on random input; find the number of dimensions that the original site takes.

        Args:
            training, flags: as in `watching`. The original model is in that mode already.

        Returns:
            Whether the original site takes such an input. `wrong` then has the errors above the limit.
        """
        pair, conditions = self._pairs[name], _Conditions("training" if training else "evaluation", flags, False)
        new = pair.converted
        tensor = next((t for t in (*new.parameters(), *new.buffers()) if t.is_floating_point()), None)
        if not isinstance(new, SwitchNorm) or tensor is None:
            return False
        for sizes in ((3, 3), (5,), (3, 3, 3), ()):
            with seeded(0):
                x = torch.randn(4, new.num_features, *sizes).to(tensor)
            call = SiteCall(((x,), {}), torch.get_rng_state(), first=True, input_needs_no_grad=training)
            try:
                with _preserved(pair.original_modules), torch.no_grad():
                    errors = self._measure_errors(conditions, pair, call, pair.original.forward(x))
            except Exception:  # noqa: BLE001 - the site takes another number of dimensions
                continue
            self._judge(pair, errors, call)
            return True
        return False

    def errors(self) -> tuple[SiteError, ...]:
        """Return the largest errors of each site over all calls and batches."""
        return tuple(SiteError(n, *(errors.get(n) for errors in self._max_errors.values())) for n in self._pairs)

    def _registrations(self, conditions: _Conditions) -> Iterator[Callable[[], Any]]:
        for pair in self._pairs.values():
            calls: list[SiteCall] = []
            yield record_calls_hook(pair.original, calls)
            yield _compare_call_hook(pair.original, partial(self._compare, conditions, pair), calls)

    def _compare(self, conditions: _Conditions, pair: SitePair, call: SiteCall, output: Any) -> None:
        errors = self._measure_errors(conditions, pair, call, output)
        for measure, error in errors.items():
            self._max_errors[measure][pair.name] = max(self._max_errors[measure].get(pair.name, 0.0), error)
        if pair.is_module_site:
            self._judge(pair, errors, call)

    def _measure_errors(
        self, conditions: _Conditions, pair: SitePair, call: SiteCall, output: Any
    ) -> dict[Measure, float]:
        errors: dict[Measure, float] = {}
        converted_modules = pair.converted_modules
        with _preserved(converted_modules), training_flags(converted_modules, training=conditions.flags):
            errors[conditions.mode] = _site_output_distance(pair.converted, call, output)
            if call.first:
                errors["statistics"] = site_statistics_distance(pair)
        if conditions.gradients or (call.input_needs_no_grad and pair.is_module_site):
            modules = [*pair.original_modules, *converted_modules]
            with _preserved(modules), training_flags(converted_modules, training=conditions.flags):
                errors["gradients"] = _site_gradient_distance(pair, call)
        return errors

    def _judge(self, pair: SitePair, errors: Mapping[Measure, float], call: SiteCall) -> None:
        for measure, error in errors.items():
            if not error <= self._limit and self._is_wrong(measure, error, pair, call):
                wrong = self.wrong.setdefault(pair.name, {})
                wrong[measure] = max(wrong.get(measure, 0.0), error)

    def _is_wrong(self, measure: Measure, error: float, pair: SitePair, call: SiteCall) -> bool:
        """Return whether an error above the limit is larger than the effect of rounding on the original norm."""
        if measure == "statistics":
            return True
        perturbed = replace(call, args=tree_map_only(Tensor, lambda t: perturb(t, "random", self._eps), call.args))
        old = pair.original
        with _preserved(pair.original_modules), torch.no_grad():
            if measure == "gradients":
                own_response = gradient_distance(*(run_site(pair.entries[0], each)[1] for each in (call, perturbed)))
            else:
                own_response = output_distance(site_outputs(old, call), site_outputs(old, perturbed))
        return own_response <= MAX_RESPONSE and not error <= RESPONSE_FACTOR * own_response


def _preserved(modules: list[nn.Module]) -> AbstractContextManager[None]:
    # Hooks are not followed: `forward` calls none, and a hook of each site may refer to the whole model. A `forward` of
    # a single object may refer to anything, for example to the object that this one is a copy of.
    own_forward = any("forward" in vars(module) and not is_reference_forward(module) for module in modules)
    return preserved_state(modules, follow_objects=own_forward)


def record_calls_hook(old: nn.Module, calls: list[SiteCall]) -> Callable[[], Any]:
    """Return a function that registers a hook on a site, which adds each call to `calls` before the site runs."""
    called: set[nn.Module] = set()

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        """Copy the input of the site."""
        copied_inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
        floating_inputs = [
            leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        input_needs_no_grad = (
            torch.is_grad_enabled()
            and bool(floating_inputs)
            and not any(tensor.requires_grad for tensor in floating_inputs)
        )
        calls.append(SiteCall(copied_inputs, torch.get_rng_state(), module not in called, input_needs_no_grad))
        called.add(module)

    return lambda: old.register_forward_pre_hook(hook, with_kwargs=True)


def _compare_call_hook(
    old: nn.Module, compare: Callable[[SiteCall, Any], None], calls: list[SiteCall]
) -> Callable[[], Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        compare(calls.pop(), output)

    # Before all other hooks, which may change the output.
    return lambda: old.register_forward_hook(hook, prepend=True)


# --- distances of one call --------------------------------------------------------------------------------------------


def _site_output_distance(new: nn.Module, call: SiteCall, output: Any) -> float:
    with torch.no_grad():
        try:
            return output_distance(read_leaves(output), site_outputs(new, call))
        except Exception:  # noqa: BLE001 - the pass of the whole model reports the error
            return float("inf")


def site_outputs(module: nn.Module, call: SiteCall) -> Leaves:
    """Return the outputs of a module for a call."""
    args, kwargs = call.args
    with seeded(0):
        torch.set_rng_state(call.random_state)
        return read_leaves(module.forward(*args, **kwargs))


def site_statistics_distance(pair: SitePair) -> float:
    """Return the distance of a site's buffers after a call: floating ones as one vector, others must be equal."""
    expected, found = (shared_tensors(entries, "_buffers") for entries in pair.entries)
    vector, errors = VectorDistance(), [0.0]
    for names, partner in match_names(expected, found):
        reference, value = expected[names], found[partner]
        if reference.is_floating_point():
            vector.add(reference, value)
        else:
            errors.append(relative_l2(reference, value))
    return max(*errors, vector.result())


def _site_gradient_distance(pair: SitePair, call: SiteCall) -> float:
    """Return the distance of the gradients of a site's input and parameters, as one vector."""
    try:
        return gradient_distance(*(run_site(entries, call)[1] for entries in pair.entries))
    except Exception:  # noqa: BLE001 - as above
        return float("inf")


def run_site(entries: Sequence[ModuleEntry], call: SiteCall) -> tuple[Leaves, dict[TensorNames, Tensor]]:
    """Return the outputs of a site for a call, and the gradients of a fixed random projection of them by leaf.

    Args:
        entries: the modules of the site, as `walk_modules` returns them.
    """
    leaves: dict[TensorNames, Tensor] = {}

    def as_leaf(tensor: Tensor) -> Tensor:
        """Return a copy of an input whose gradient is measured."""
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        leaf = tensor.detach().clone().requires_grad_(True)
        leaves[(f"input {len(leaves)}",)] = leaf
        return leaf.clone()  # the module may change it in place

    gradients: dict[TensorNames, Tensor] = {}

    def on_gradient(names: TensorNames, gradient: Tensor) -> None:
        gradients[names] = gradients[names] + gradient if names in gradients else gradient

    # The hooks of the pass that this interrupts, such as those of a checkpoint, must not see these tensors.
    own_hooks = torch.autograd.graph.saved_tensors_hooks(_identity, _identity)
    with torch.inference_mode(False), torch.enable_grad(), seeded(0), own_hooks:
        torch.set_rng_state(call.random_state)
        args, kwargs = tree_map_only(Tensor, as_leaf, call.args)
        outputs = read_leaves(entries[0].module.forward(*args, **kwargs))
        parameters = shared_tensors(entries, "_parameters")
        stream_gradients(outputs.tensors, {**leaves, **parameters}, on_gradient, seed=0)
    return outputs.detached(), gradients


def _identity(tensor: Tensor) -> Tensor:
    return tensor


# --- outside the sites ------------------------------------------------------------------------------------------------


def differences_outside_sites(first: nn.Module, second: nn.Module, sites: tuple[str, ...]) -> list[str]:
    """Return the differences between two models outside their sites, and different hooks also at sites.

    Args:
        first: the original model.
        second: the converted model.
        sites: the names of the sites.
    """
    original_modules, converted_modules = modules_by_name(first), modules_by_name(second)
    inside = {id(module) for name in sites for module in converted_modules[name].modules() if name in converted_modules}
    added = [
        name for name, module in converted_modules.items() if name not in original_modules and id(module) not in inside
    ]
    problems = [f"{name} exists only in the converted model" for name in added]
    for name, old in original_modules.items():
        new = converted_modules.get(name)
        if new is not None and _hooks(old) != _hooks(new):
            problems.append(f"{name or 'the model'} has different hooks")
        if name in sites:
            continue
        if new is None:
            problems.append(f"{name} exists only in the original model")
        elif class_name(new) != class_name(old) and not is_rewritten(new):
            classes = f"a {class_name(old)} in the original model and a {class_name(new)} in the converted one"
            problems.append(f"{name or 'the model'} is {classes}")
        else:
            different = [*_different_tensors(old, new), *([] if is_rewritten(new) else _different_attributes(old, new))]
            problems += [f"{name}.{key}".lstrip(".") + " has different values" for key in different]
    return problems


def _hooks(module: nn.Module) -> list[tuple[str, str]]:
    """Return the hooks of a module by qualified name: a copy of a model has copies of bound methods."""
    registries = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    hooks = [(registry, hook) for registry in registries for hook in (getattr(module, registry, None) or {}).values()]
    return [(registry, getattr(hook, "__qualname__", type(hook).__qualname__)) for registry, hook in hooks]


def _different_attributes(old: nn.Module, new: nn.Module) -> list[str]:
    original_values, converted_values = vars(old), vars(new)
    plain = [name for name, value in original_values.items() if name != "training" and _is_plain(value)]
    return [
        n
        for n in plain
        if type(original_values[n]) is not type(converted_values.get(n))
        or not _same_plain(original_values[n], converted_values[n])
    ]


def _is_plain(value: Any) -> bool:
    """Return whether a value can change what code computes: a number, text, dtype or function, or a tuple of these."""
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | FunctionType | BuiltinFunctionType | torch.dtype)


def _same_plain(a: Any, b: Any) -> bool:
    return bool(a == b or a != a)


def _different_tensors(old: nn.Module, new: nn.Module) -> list[str]:
    pairs = [
        (key, tensor, converted_values.get(key))
        for original_values, converted_values in ((old._parameters, new._parameters), (old._buffers, new._buffers))
        for key, tensor in original_values.items()
    ]
    return [key for key, a, b in pairs if not _same_values(a, b) or _requires_grad(a) != _requires_grad(b)]


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _same_values(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a is b:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a, b)) or bool(((a == b) | (a.isnan() & b.isnan())).all())
