"""Compare two models on data in one precision: every check, leaf by leaf, against its limit.

The limit of a check is that of the precision, or ten times the original's own response to a change of its input by one
unit in the last place, if that is larger. If the response is not finite or exceeds 1e-3, the check cannot judge the
whole model, and `equivalence` compares the sites one by one.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from torch import nn

from normswap.layers.gated_module import GatedModule
from normswap.layers.switch_norm import SwitchNorm
from normswap.surgery.importance import gated_modules
from normswap.surgery.model_outputs import Leaves, count_numbers, max_abs_difference, relative_l2
from normswap.surgery.module_tree import Flags, ModelTrainingFlags, model_mode, modules_by_name, walk_modules
from normswap.text import first_line, pluralize
from normswap.verification.model_pass import (
    MISSING,
    FormulaBatchNorm,
    GradientCallback,
    GradientDistance,
    GradientStore,
    ModelPass,
    leaf_distances,
    run_pass,
    shared_tensors,
    statistics_distances,
)
from normswap.verification.precision import (
    MAX_RESPONSE,
    RESPONSE_FACTOR,
    Check,
    CheckAccumulator,
    Precision,
    perturbed_passes,
)
from normswap.verification.site_watch import SiteWatch

OUTPUTS = {False: "outputs in evaluation", True: "outputs in training"}
GRADIENTS, STATISTICS = "gradients", "running statistics"
CHECKS = (OUTPUTS[False], OUTPUTS[True], GRADIENTS, STATISTICS)
_TRAINING = CHECKS[1:]

Errors = dict[str, dict[str, float]]  # by check and by leaf


class ModelComparison:
    """A comparison of two models in one precision, in evaluation and in training.

    Args:
        first: the original model.
        second: the converted model.
        inputs: the batches, in the same precision.
        limit: the largest relative L2 error that passes.
        precision: the precision of the models.
        flags: for each model, the training flags that its own `train()` and `eval()` set, or None.
    """

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        inputs: list[Any],
        *,
        limit: float,
        precision: Precision,
        flags: tuple[ModelTrainingFlags | None, ModelTrainingFlags | None],
    ) -> None:
        self.models = first, second
        self.inputs, self.limit, self._eps = inputs, limit, precision.eps
        self.site_limit = max(limit, precision.limit)
        self.accumulators = {name: CheckAccumulator(name, limit) for name in CHECKS}
        self.raised: dict[bool, tuple[Exception, Any]] = {}
        self.largest_difference = 0.0
        self.has_comparable_output = self._has_infinite_output = False
        self._unchecked: set[str] = set()
        self.training = _training_setup(first, second)
        self._flags = {
            training: (
                {
                    **_flags_for_mode(flags[0], training),
                    **(dict.fromkeys(self.training.frozen, False) if training else {}),
                },
                _flags_for_mode(flags[1], training),
            )
            for training in (False, True)
        }
        self.modes = (False,) if self.training.skip_reason else (False, True)
        if self.training.skip_reason:
            self._note(_TRAINING, self.training.skip_reason)
        self.site_watch = self.new_watch()

    def new_watch(self) -> SiteWatch:
        """Return a comparison of the two models site by site."""
        return SiteWatch(*self.models, limit=self.site_limit, eps=self._eps)

    def compare(self) -> None:
        """Compare the models in all modes on all inputs."""
        for batch in self.inputs:
            for training in self.modes:
                self._compare_pass(batch, training=training)
                if False in self.raised:
                    return

    @property
    def is_judged(self) -> bool:
        """Whether all checks can judge the whole models."""
        # A model whose outputs are never finite is judged: none of its checks passes.
        partly_finite = self._has_infinite_output and any(
            accumulator.error is not None for accumulator in self.accumulators.values()
        )
        return not partly_finite and not any(accumulator.unjudged for accumulator in self.accumulators.values())

    def checks(self, raised: Mapping[bool, tuple[Exception, Any]] | None = None) -> tuple[Check, ...]:
        """Return the results of all checks.

        Args:
            raised: the errors of the original, by mode (True for training); default is those of this comparison.
        """
        errors = self.raised if raised is None else raised
        raised_note = (
            f"skipped: the original model raises in training: {first_line(errors[True][0])}" if True in errors else ""
        )
        return tuple(
            accumulator.check(raised_note if accumulator.name in self._unchecked else "")
            for accumulator in self.accumulators.values()
        )

    def run(
        self,
        index: int,
        batch: Any,
        on_gradient: GradientCallback | None = None,
        *,
        training: bool,
        context: AbstractContextManager[Any] | None = None,
    ) -> ModelPass | Exception:
        """Run the first (0) or the second model (1) once."""
        flags = self._flags[training][index]
        return run_pass(self.models[index], batch, on_gradient, training=training, flags=flags, context=context)

    def watching(self, watch: SiteWatch, *, training: bool, gradients: bool = False) -> Any:
        """Return a context in which passes of the first model are compared with the second one site by site."""
        return watch.watching(training=training, flags=self._second_flags(training=training), gradients=gradients)

    def compare_on_random_input(self, watch: SiteWatch, name: str, *, training: bool) -> bool:
        """Compare a site that did not run on random input; return whether the original site takes such an input."""
        with model_mode(self.models[0], training=training, flags=self._flags[training][0]):
            return watch.compare_on_random_input(name, training=training, flags=self._second_flags(training=training))

    def _second_flags(self, *, training: bool) -> dict[int, bool]:
        second = self.models[1]
        with model_mode(second, training=training, flags=self._flags[training][1]):
            return {id(entry.module): entry.module.training for entry in walk_modules(second)}

    def _compare_pass(self, batch: Any, *, training: bool) -> None:
        names = _TRAINING if training else CHECKS[:1]
        with GradientStore() as stored:
            with self.watching(self.site_watch, training=training):
                a = self.run(0, batch, stored.store, training=training)
            if isinstance(a, Exception):
                self._note_raised(a, batch, names, training=training)
                return
            self.has_comparable_output = self.has_comparable_output or bool(a.leaves.opaque) or _has_numbers(a.leaves)
            if not _has_finite_value(a.leaves):
                self._has_infinite_output = True
                self._note(names, "no output of the original model is finite")
                return
            gradients = GradientDistance(stored)
            b = self.run(1, batch, gradients.compare_gradient, training=training)
            if a.backward_error is not None:
                self._note_raised(a.backward_error, batch, (GRADIENTS,), training=True)
            errors = self._errors(a, b, gradients, training=training)
            responses: Errors = {}
            if isinstance(b, ModelPass) and any(
                not error <= self.limit for parts in errors.values() for error in parts.values()
            ):
                responses = self._input_sensitivity(a, batch, stored, training=training)
            if training and isinstance(b, ModelPass):
                self._recheck_gradients(a, batch, errors, responses)
        for name, parts in errors.items():
            self.accumulators[name].update(parts, responses.get(name, {}), self.limit)

    def _errors(self, a: ModelPass, b: ModelPass | Exception, gradients: GradientDistance, *, training: bool) -> Errors:
        """Return the relative L2 errors by check and by leaf, and note the leaves that cannot be compared."""
        outputs = OUTPUTS[training]
        if isinstance(b, Exception):
            names = _TRAINING if training else (outputs,)
            self._note(names, f"the converted model raises: {first_line(b)}")
            self.largest_difference = inf
            return {name: {"": inf} for name in names}
        self._note_opaque(outputs, {**b.leaves.opaque, **a.leaves.opaque})
        errors: Errors = {outputs: self._leaf_errors(outputs, a.leaves, b.leaves)}
        if not count_numbers(a.leaves) and not any(error > 0 for error in errors[outputs].values()):
            self.accumulators[outputs].not_judged("the original model returns no numbers: there is nothing to compare")
            errors[outputs] = {}
        elif not _has_floats(a.leaves):
            self.accumulators[outputs].not_judged(
                "the original model returns integers only, which do not show small differences"
            )
        if training:
            errors[GRADIENTS] = self._gradient_error(a, b, gradients)
            errors[STATISTICS] = statistics_distances(a.buffers, b.buffers)
            if not errors[STATISTICS]:
                self._note((STATISTICS,), "the model has no running statistics")
        return errors

    def _leaf_errors(self, check: str, a: Leaves, b: Leaves) -> dict[str, float]:
        errors: dict[str, float] = {}
        for path in {**a.values, **b.values}:
            if path in a.opaque or path in b.opaque:
                continue
            try:
                pair = a.values.get(path, MISSING), b.values.get(path, MISSING)
                errors[path] = relative_l2(*pair)
                self.largest_difference = max(self.largest_difference, max_abs_difference(*pair))
            except Exception as error:  # noqa: BLE001 - a tensor subclass may not support the operations
                self._note_opaque(check, {path: first_line(error)})
        return errors

    def _gradient_error(self, a: ModelPass, b: ModelPass, gradients: GradientDistance) -> dict[str, float]:
        if a.backward_error is not None:
            return {}
        if b.backward_error is not None:
            self._note((GRADIENTS,), f"the converted model raises in its backward pass: {first_line(b.backward_error)}")
            return {"": inf}
        error = gradients.result()
        if error > 0 or a.has_graph:
            return {"": error}
        parameters = shared_tensors(walk_modules(self.models[0]), "_parameters").values()
        if any(parameter.requires_grad for parameter in parameters):
            self.accumulators[GRADIENTS].not_judged(
                "no output of the original model requires a gradient: it returns detached tensors"
            )
        else:
            self._note((GRADIENTS,), "no parameter requires a gradient")
        return {}

    def _input_sensitivity(self, a: ModelPass, batch: Any, stored: GradientStore, *, training: bool) -> Errors:
        """Return the largest response of the first model to a one-ulp change of its input, by check and by leaf.

        The input is changed up, down and at random: one change alone may miss how much a network amplifies rounding.
        """
        responses: Errors = {}

        def run(model_inputs: Any, context: AbstractContextManager[Any] | None) -> Errors:
            """Return the errors of a pass on changed inputs."""
            gradients = GradientDistance(stored)
            perturbed = self.run(0, model_inputs, gradients.compare_gradient, training=training, context=context)
            if isinstance(perturbed, Exception):
                return {}
            found: Errors = {OUTPUTS[training]: leaf_distances(a.leaves, perturbed.leaves)}
            if training:
                found[GRADIENTS] = {"": gradients.result()}
                found[STATISTICS] = statistics_distances(a.buffers, perturbed.buffers)
            return found

        for found in perturbed_passes(self.models[0], batch, run, eps=self._eps):
            for name, parts in found.items():
                max_errors = responses.setdefault(name, {})
                for part, error in parts.items():
                    max_errors[part] = max(error, max_errors.get(part, 0.0))
        return responses

    def _recheck_gradients(self, a: ModelPass, batch: Any, errors: Errors, responses: Errors) -> None:
        """If gradients differ, compare again with the original computed by the formula of batch norm.

        Torch's kernel returns a wrong gradient for a batch of one on CPU if the gradient of its output is a permuted
        view (torch 2.14).
        """
        error, response = errors[GRADIENTS].get("", 0.0), responses.get(GRADIENTS, {}).get("", 0.0)
        if error <= max(self.limit, RESPONSE_FACTOR * min(response, MAX_RESPONSE)) or a.backward_error is not None:
            return
        with GradientStore() as plain:
            by_formula = self.run(0, batch, plain.store, training=True, context=FormulaBatchNorm())
            if isinstance(by_formula, Exception) or by_formula.backward_error is not None:
                return
            if max(leaf_distances(a.leaves, by_formula.leaves).values(), default=inf) > self.limit:
                return
            to_formula = GradientDistance(plain)
            self.run(1, batch, to_formula.compare_gradient, training=True)
            found = to_formula.result()
        if found > self.limit:
            return
        self._note(
            (GRADIENTS,),
            f"torch's batch norm returns wrong gradients for this input (relative L2 {error:.1e} from the formula); "
            "the converted model agrees with the formula",
        )
        errors[GRADIENTS], responses[GRADIENTS] = {"": found}, {}

    def _note_raised(self, error: Exception, batch: Any, names: tuple[str, ...], *, training: bool) -> None:
        self.raised.setdefault(training, (error, batch))
        self._unchecked |= {*names}

    def _note(self, names: tuple[str, ...], note: str) -> None:
        for name in names:
            self.accumulators[name].notes[note] = None

    def _note_opaque(self, check: str, opaque: Mapping[str, str]) -> None:
        for path, reason in opaque.items():
            self.accumulators[check].failed = True
            self._note((check,), f"{path} cannot be compared: {reason}")


@dataclass(frozen=True)
class _TrainingSetup:
    """How the models are compared in training.

    Attributes:
        frozen: the names of the original's norms that run in evaluation mode.
        skip_reason: why the models are not compared in training; empty if they are.
    """

    frozen: tuple[str, ...] = ()
    skip_reason: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """A note on the norms in evaluation mode, if there are any."""
        if not self.frozen:
            return ()
        return (
            f"{pluralize(len(self.frozen), 'site')} with running statistics in training: compared with the original's "
            "norms in evaluation mode",
        )


def _training_setup(first: nn.Module, second: nn.Module) -> _TrainingSetup:
    """Return how to compare the models in training, given the `bn_statistics` of the converted one.

    A site with running statistics in training equals the original norm in evaluation mode. Other differences in
    `bn_statistics` have no equal in the original.
    """
    original_modules = modules_by_name(first)
    frozen, others = [], []
    for name, layer in gated_modules(second).items():
        old = original_modules.get(name)
        same = isinstance(old, GatedModule) and old.bn_statistics == layer.bn_statistics
        if layer.bn_statistics == "batch" or same or (isinstance(layer, SwitchNorm) and layer.frozen):
            continue
        if layer.bn_statistics == "running" and isinstance(layer, SwitchNorm) and old is not None:
            frozen.append(name)
        else:
            others.append(name)
    if others:
        sites = pluralize(len(others), "site")
        return _TrainingSetup(
            skip_reason=f"skipped: {sites} with running statistics in training, unlike the original model"
        )
    return _TrainingSetup(frozen=tuple(frozen))


def _flags_for_mode(flags: ModelTrainingFlags | None, training: bool) -> Flags:
    if flags is None:
        return {}
    return flags.training if training else flags.evaluation


def _has_finite_value(leaves: Leaves) -> bool:
    floating = [leaf for leaf in leaves.tensors if leaf.is_floating_point() and leaf.numel()]
    numbers = [leaf for leaf in leaves.values.values() if isinstance(leaf, float)]
    if not floating and not numbers:
        return True
    return any(isfinite(number) for number in numbers) or any(bool(leaf.isfinite().any()) for leaf in floating)


def _has_floats(leaves: Leaves) -> bool:
    tensors = any(leaf.is_floating_point() or leaf.is_complex() for leaf in leaves.tensors)
    return tensors or any(isinstance(leaf, float | complex) for leaf in leaves.values.values())


def _has_numbers(leaves: Leaves) -> bool:
    return bool(leaves.tensors) or count_numbers(leaves) > 0
