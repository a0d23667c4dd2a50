"""Compare two models on data in one precision: every check, leaf by leaf, against its limit.

The limit of a check is that of the precision, or ten times the original's own response to a change of its input by one
unit in the last place, if that is larger. If the response is not finite or exceeds 1e-3, the check cannot judge the
whole model, and `equivalence` compares the sites one by one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import inf, isfinite
from typing import Any

from torch import nn

from normswap.layers.gating import BnStatistics
from normswap.surgery.model_outputs import Leaves, count_numbers, max_abs_difference, relative_l2
from normswap.surgery.module_tree import Flags, ModelTrainingFlags, model_mode, walk_modules
from normswap.text import first_line, pluralize
from normswap.verification.model_pass import (
    MISSING,
    FormulaBatchNorm,
    GradientCallback,
    GradientDistance,
    GradientStore,
    ModelPass,
    constant_buffer_distances,
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
from normswap.verification.site_watch import SiteError, SiteWatch, differences_outside_sites
from normswap.verification.training_reference import constant_buffers, training_reference

OUTPUTS = {False: "outputs in evaluation", True: "outputs in training"}
GRADIENTS, STATISTICS = "gradients", "running statistics"
CHECKS = (OUTPUTS[False], OUTPUTS[True], GRADIENTS, STATISTICS)
_TRAINING = CHECKS[1:]
# Comparisons that are no check of a whole model, but take time too.
FP32, SITES_ALONE = "outputs in float32", "each site alone"

_MAX_LISTED = 3
_MEASURES = {
    "evaluation": "outputs in evaluation",
    "training": "outputs in training",
    "gradients": "gradients",
    "statistics": "running statistics",
}
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
        bn_statistics: as in `training_reference`.
        on_check: called with the name of each check when it begins.
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
        bn_statistics: BnStatistics | Mapping[str, BnStatistics] | None = None,
        on_check: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.models = first, second
        self.on_check = on_check
        self.inputs, self.limit, self._eps = inputs, limit, precision.eps
        self.site_limit = max(limit, precision.limit)
        self.accumulators = {name: CheckAccumulator(name, limit) for name in CHECKS}
        self.raised: dict[bool, tuple[Exception, Any]] = {}
        self.largest_difference = 0.0
        self.has_comparable_output = self._has_infinite_output = False
        self._unchecked: set[str] = set()
        self.reference = training_reference(first, second, bn_statistics)
        # The original may be the converted model, and this one its norms again, as after `revert` or `bake`.
        self._mirror = training_reference(second, first, plain_only=True)
        self._constant_buffers = constant_buffers(second)
        self._flags = {
            training: (
                {**_flags_for_mode(flags[0], training), **(self.reference.flags if training else {})},
                {**_flags_for_mode(flags[1], training), **(self._mirror.flags if training else {})},
            )
            for training in (False, True)
        }
        self.modes = (False,) if self.reference.skip_reason else (False, True)
        if self.reference.skip_reason:
            self._note(_TRAINING, self.reference.skip_reason)
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
    def reference_notes(self) -> tuple[str, ...]:
        """Notes on the norms of both models that are in evaluation in training."""
        if not self._mirror.sites:
            return self.reference.notes
        count = pluralize(len(self._mirror.sites), "site")
        return (
            *self.reference.notes,
            f"training is compared with the norms of the second model in evaluation (frozen) at {count}",
        )

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
        before_backward: Callable[[], None] = lambda: None,
    ) -> ModelPass | Exception:
        """Run the first (0) or the second model (1) once; in training, the first one is the reference."""
        if training:  # the reference comes last: it decides on a call before other modes see it
            context = _both(context or nullcontext(), (self.reference, self._mirror)[index].applied())
        flags = self._flags[training][index]
        return run_pass(
            self.models[index],
            batch,
            on_gradient,
            training=training,
            flags=flags,
            context=context,
            before_backward=before_backward,
        )

    def watching(self, watch: SiteWatch, *, training: bool, gradients: bool = False) -> Any:
        """Return a context in which passes of the first model are compared with the second one site by site."""
        return watch.watching(training=training, flags=self._second_flags(training=training), gradients=gradients)

    def compare_on_random_input(self, watch: SiteWatch, name: str, *, training: bool) -> bool:
        """Compare a site that did not run on random input; return whether the original site takes such an input."""
        reference = self.reference.applied() if training else nullcontext()
        with model_mode(self.models[0], training=training, flags=self._flags[training][0]), reference:
            return watch.compare_on_random_input(name, training=training, flags=self._second_flags(training=training))

    def _second_flags(self, *, training: bool) -> dict[int, bool]:
        return self.flags_in_mode(1, training=training)

    def flags_in_mode(self, index: int, *, training: bool) -> dict[int, bool]:
        """Return the training flags of all modules of the first (0) or the second model (1) in a mode, by their `id`.

        In training, these are the flags of the reference.
        """
        model = self.models[index]
        with model_mode(model, training=training, flags=self._flags[training][index]):
            return {id(entry.module): entry.module.training for entry in walk_modules(model)}

    def _compare_pass(self, batch: Any, *, training: bool) -> None:
        names = _TRAINING if training else CHECKS[:1]
        with GradientStore() as stored:
            a = self.run_first(batch, stored, self.watching(self.site_watch, training=training), training=training)
            if isinstance(a, Exception):
                self._note_raised(a, batch, names, training=training)
                return
            compared = self.compare_second(a, batch, stored, training=training)
            if compared is None:
                return
            b, errors = compared
            responses: Errors = {}
            if isinstance(b, ModelPass) and any(
                not error <= self.limit for parts in errors.values() for error in parts.values()
            ):
                responses = self._input_sensitivity(a, batch, stored, training=training)
            if training and isinstance(b, ModelPass):
                self._recheck_gradients(a, batch, errors, responses)
        self.judge(errors, responses)

    def run_first(
        self, batch: Any, stored: GradientStore, watching: AbstractContextManager[Any], *, training: bool
    ) -> ModelPass | Exception:
        """Run the first model once inside the context `watching`; in training, store its gradients."""
        self.on_check(OUTPUTS[training])
        with watching:
            return self.run(0, batch, stored.store, training=training, before_backward=lambda: self.on_check(GRADIENTS))

    def compare_second(
        self, a: ModelPass, batch: Any, stored: GradientStore, *, training: bool
    ) -> tuple[ModelPass | Exception, Errors] | None:
        """Run the second model once; return its results, and the errors by check and by leaf.

        Args:
            a: the results of the first model in the same mode.
            stored: its gradients.

        Returns:
            None if no output of the first model is finite.
        """
        self.has_comparable_output = self.has_comparable_output or bool(a.leaves.opaque) or _has_numbers(a.leaves)
        if not _has_finite_value(a.leaves):
            self._has_infinite_output = True
            self._note(_TRAINING if training else CHECKS[:1], "no output of the original model is finite")
            return None
        gradients = GradientDistance(stored)
        b = self.run(1, batch, gradients.compare_gradient, training=training)
        if a.backward_error is not None:
            self._note_raised(a.backward_error, batch, (GRADIENTS,), training=True)
        if training:
            self.on_check(STATISTICS)
        return b, self._errors(a, b, gradients, training=training)

    def judge(self, errors: Errors, responses: Errors) -> None:
        """Add the errors of one pass to the checks.

        Args:
            responses: the responses of the original to a one-ulp change, by check and by leaf.
        """
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
            errors[STATISTICS] |= constant_buffer_distances(a, b, self._constant_buffers)
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


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


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


# --- sites one by one -------------------------------------------------------------------------------------------------


def site_problems(comparison: ModelComparison) -> tuple[list[str], list[str]]:
    """Return the errors at sites although the whole models agree, and remarks on sites that did not run.

    The output of a site may not reach the outputs of the model: the model keeps it in an attribute, multiplies it by
    zero, rounds it to an integer, or uses it for other inputs only.
    """
    watch = comparison.site_watch
    not_run = [site.fqn for site in watch.errors() if site.evaluation is None and site.training is None]
    compared = [
        name
        for name in not_run
        if all(comparison.compare_on_random_input(watch, name, training=t) for t in comparison.modes)
    ]
    remarks = []
    if matching := [name for name in compared if name not in watch.wrong]:
        remarks.append(
            f"{pluralize(len(matching), 'site')} did not run, but agreed alone on random input: "
            f"{_join_limited(matching)}"
        )
    if others := [name for name in not_run if name not in compared]:
        remarks.append(f"{pluralize(len(others), 'site')} did not run and cannot be compared: {_join_limited(others)}")
    failures = [_describe_difference(name, errors, comparison.site_limit) for name, errors in watch.wrong.items()]
    return _limit_problems(failures), remarks


def compare_sites(comparison: ModelComparison) -> tuple[tuple[SiteError, ...], list[str]]:
    """Compare each site alone in all modes; return the errors, and all problems in words."""
    first, second = comparison.models
    watch, limit = comparison.new_watch(), comparison.site_limit
    for batch in comparison.inputs:
        for training in comparison.modes:
            with comparison.watching(watch, training=training, gradients=True):
                comparison.run(0, batch, training=training)
    errors = watch.errors()
    problems = [_problem(site, limit) for site in errors]
    problems += [f"{name} cannot be compared alone" for name in watch.unpaired]
    problems += differences_outside_sites(first, second, watch.names)
    if not errors:
        problems.append("the converted model has no converted site")
    return errors, _limit_problems([problem for problem in problems if problem])


def _limit_problems(problems: list[str]) -> list[str]:
    more = [f"{len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
    return problems[:_MAX_LISTED] + more


def _join_limited(names: list[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")


def _problem(site: SiteError, limit: float) -> str:
    if site.evaluation is None and site.training is None:
        return f"{site.fqn} did not run"
    measured = {measure: getattr(site, measure) for measure in _MEASURES}
    wrong = {measure: error for measure, error in measured.items() if error is not None and not error <= limit}
    return _describe_difference(site.fqn, wrong, limit) if wrong else ""


def _describe_difference(name: str, wrong: Mapping[Any, float], limit: float) -> str:
    found = ", ".join(f"{error:.1e} in {_MEASURES[measure]}" for measure, error in wrong.items())
    return f"{name}, compared alone, differs by {found} (limit {limit:.0e})"
