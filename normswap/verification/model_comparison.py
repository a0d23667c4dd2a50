"""Original against converted on data in one precision: every check, leaf by leaf, against its limit.

The limit of a check is the precision's, or ten times the original's own response to a change of its input by one unit
in the last place. If that response is not finite or exceeds 1e-3, the whole model cannot be judged by that check, and
`site_verdict` decides. Measures and judges; nothing is repaired.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

from torch import Tensor, nn

from normswap.layers.gated_module import GatedModule
from normswap.layers.switch_norm import SwitchNorm
from normswap.surgery.importance import gated_modules
from normswap.surgery.model_outputs import (
    Leaves,
    TensorNames,
    VectorDistance,
    count_numbers,
    match_names,
    max_abs_difference,
    relative_l2,
)
from normswap.surgery.module_tree import Flags, ModelTrainingFlags, model_mode, modules_by_name, walk_modules
from normswap.text import first_line
from normswap.verification.model_pass import (
    FormulaBatchNorm,
    GradientCallback,
    GradientDistance,
    GradientStore,
    ModelPass,
    perturbed_passes,
    run_pass,
    shared_tensors,
)
from normswap.verification.precision import Precision
from normswap.verification.site_watch import SiteWatch

OUTPUTS = {False: "outputs in evaluation", True: "outputs in training"}
GRADIENTS, STATISTICS = "gradients", "running statistics"
CHECKS = (OUTPUTS[False], OUTPUTS[True], GRADIENTS, STATISTICS)
_TRAINING = CHECKS[1:]

_RESPONSE_FACTOR = 10
# The largest response of the original itself at which a comparison of whole models still means anything.
_MAX_RESPONSE = 1e-3

Errors = dict[str, dict[str, float]]  # by check and by leaf


@dataclass(frozen=True)
class Check:
    """One comparison of two models.

    `error` is the worst relative L2 over all batches, `limit` what it was compared with, `own_response` that of the
    original to a one-ulp change of its input if it was needed. `passed` is None if nothing can be judged; `note` says
    why.
    """

    name: str
    error: float | None
    limit: float
    own_response: float | None = None
    passed: bool | None = None
    note: str = ""


@dataclass
class _CheckAccumulator:
    """The worst case of one check over all batches, by error relative to its limit."""

    name: str
    limit: float
    error: float | None = None
    own_response: float | None = None
    failed: bool = False
    unjudged: bool = False
    notes: dict[str, None] = field(default_factory=dict)

    def update(self, errors: Mapping[str, float], responses: Mapping[str, float], base: float) -> None:
        """Judge what can be judged; an error that only the converted model makes infinite always can."""
        unjudgeable = {
            part: response
            for part, error in errors.items()
            if not error <= base and not (response := responses.get(part, 0.0)) <= _MAX_RESPONSE
            if not (error == inf and isfinite(response))
        }
        for part, response in unjudgeable.items():
            self.not_judged(
                f"{part or self.name}: not judged, one unit in the last place of the input alone changes it by "
                f"{response:.1e} (relative L2) in the original"
            )
        for part in errors:  # each with a limit of its own: one that amplifies rounding hides no other one
            if part in unjudgeable:
                continue
            error, own = errors[part], responses.get(part)
            limit = max(base, _RESPONSE_FACTOR * (own or 0.0))
            self.failed = self.failed or not error <= limit
            if self.error is None or error / limit > self.error / self.limit:
                self.error, self.limit, self.own_response = error, limit, own

    def not_judged(self, note: str) -> None:
        self.unjudged = True
        self.notes[note] = None

    def check(self, note: str) -> Check:
        """Return the check, with one more note."""
        passed = False if self.failed else None if self.unjudged or self.error is None else True
        notes = "; ".join(dict.fromkeys(text for text in (*self.notes, note) if text))
        return Check(self.name, self.error, self.limit, self.own_response, passed, notes)


class ModelComparison:
    """Two models in the same precision, compared on inputs in evaluation and in training."""

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
        self.accumulators = {name: _CheckAccumulator(name, limit) for name in CHECKS}
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
        """Return what compares the two models site by site."""
        return SiteWatch(*self.models, limit=self.site_limit, eps=self._eps)

    def compare(self) -> None:
        """Compare in all modes on all inputs."""
        for batch in self.inputs:
            for training in self.modes:
                self._compare_pass(batch, training=training)
                if False in self.raised:
                    return

    @property
    def is_judged(self) -> bool:
        """Whether every check that was made can be judged by the whole models."""
        # A model of which nothing is finite in any pass is judged: nothing of it can pass.
        partly_finite = self._has_infinite_output and any(
            accumulator.error is not None for accumulator in self.accumulators.values()
        )
        return not partly_finite and not any(accumulator.unjudged for accumulator in self.accumulators.values())

    def checks(self, raised: Mapping[bool, tuple[Exception, Any]] | None = None) -> tuple[Check, ...]:
        """Return every check.

        Args:
            raised: what the original raised, by training or evaluation; default is what it raised here.
        """
        raised_errors = self.raised if raised is None else raised
        raised_note = (
            f"the original raises in training: {first_line(raised_errors[True][0])}" if True in raised_errors else ""
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
        """Return a context in which passes of the first model are compared site by site."""
        return watch.watching(training=training, flags=self._second_flags(training=training), gradients=gradients)

    def compare_on_random_input(self, watch: SiteWatch, name: str, *, training: bool) -> bool:
        """Compare a site that never ran on an input made for it, and return whether the original's takes one."""
        with model_mode(self.models[0], training=training, flags=self._flags[training][0]):
            return watch.compare_on_random_input(name, training=training, flags=self._second_flags(training=training))

    def _second_flags(self, *, training: bool) -> dict[int, bool]:
        second = self.models[1]
        with model_mode(second, training=training, flags=self._flags[training][1]):
            return {id(entry.module): entry.module.training for entry in walk_modules(second)}

    def _compare_pass(self, batch: Any, *, training: bool) -> None:
        names = _TRAINING if training else CHECKS[:1]
        with GradientStore() as kept:
            with self.watching(self.site_watch, training=training):
                a = self.run(0, batch, kept.store, training=training)
            if isinstance(a, Exception):
                self._note_raised(a, batch, names, training=training)
                return
            self.has_comparable_output = self.has_comparable_output or bool(a.leaves.opaque) or _has_numbers(a.leaves)
            if not _has_finite_value(a.leaves):
                self._has_infinite_output = True
                self._note(names, "no output of the original is finite")
                return
            gradients = GradientDistance(kept)
            b = self.run(1, batch, gradients.compare_gradient, training=training)
            if a.backward_error is not None:
                self._note_raised(a.backward_error, batch, (GRADIENTS,), training=True)
            errors = self._errors(a, b, gradients, training=training)
            responses: Errors = {}
            if isinstance(b, ModelPass) and any(
                not error <= self.limit for parts in errors.values() for error in parts.values()
            ):
                responses = self._input_sensitivity(a, batch, kept, training=training)
            if training and isinstance(b, ModelPass):
                self._recheck_gradients(a, batch, kept, errors, responses)
        for name, parts in errors.items():
            self.accumulators[name].update(parts, responses.get(name, {}), self.limit)

    def _errors(self, a: ModelPass, b: ModelPass | Exception, gradients: GradientDistance, *, training: bool) -> Errors:
        """Relative L2 by check and by leaf, with a note on what cannot be compared."""
        outputs = OUTPUTS[training]
        if isinstance(b, Exception):
            names = _TRAINING if training else (outputs,)
            self._note(names, f"the converted model raises: {first_line(b)}")
            self.largest_difference = inf
            return {name: {"": inf} for name in names}
        self._note_opaque(outputs, {**b.leaves.opaque, **a.leaves.opaque})
        errors: Errors = {outputs: self._leaf_errors(outputs, a.leaves, b.leaves)}
        if not count_numbers(a.leaves) and not any(error > 0 for error in errors[outputs].values()):
            self.accumulators[outputs].not_judged("the original returns no number: nothing to compare")
            errors[outputs] = {}
        elif not _has_floats(a.leaves):
            self.accumulators[outputs].not_judged("the original returns whole numbers only, which say little of a site")
        if training:
            errors[GRADIENTS] = self._gradient_error(a, b, gradients)
            errors[STATISTICS] = _statistics_error(a.buffers, b.buffers)
            if not errors[STATISTICS]:
                self._note((STATISTICS,), "there are no running statistics")
        return errors

    def _leaf_errors(self, check: str, a: Leaves, b: Leaves) -> dict[str, float]:
        errors: dict[str, float] = {}
        for path in {**a.values, **b.values}:
            if path in a.opaque or path in b.opaque:
                continue
            try:
                pair = a.values.get(path, _MISSING), b.values.get(path, _MISSING)
                errors[path] = relative_l2(*pair)
                self.largest_difference = max(self.largest_difference, max_abs_difference(*pair))
            except Exception as error:  # noqa: BLE001 - a tensor of a class of its own, with operations of its own
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
        if any(parameter.requires_grad for parameter in shared_tensors(self.models[0], "_parameters").values()):
            self.accumulators[GRADIENTS].not_judged(
                "no output of the original has a gradient: it returns detached values"
            )
        else:
            self._note((GRADIENTS,), "nothing requires a gradient")
        return {}

    def _input_sensitivity(self, a: ModelPass, batch: Any, kept: GradientStore, *, training: bool) -> Errors:
        """By check and leaf, how far the first model moves at most if its input changes by one unit in the last place.

        Changed upwards, downwards and at random: a single change says little of how much rounding a network amplifies.
        """
        responses: Errors = {}

        def run(model_inputs: Any, context: AbstractContextManager[Any] | None) -> Errors:
            gradients = GradientDistance(kept)
            perturbed = self.run(0, model_inputs, gradients.compare_gradient, training=training, context=context)
            if isinstance(perturbed, Exception):
                return {}
            found: Errors = {OUTPUTS[training]: all_distances(a.leaves, perturbed.leaves)}
            if training:
                found[GRADIENTS] = {"": gradients.result()}
                found[STATISTICS] = _statistics_error(a.buffers, perturbed.buffers)
            return found

        for found in perturbed_passes(self.models[0], batch, run, eps=self._eps):
            for name, parts in found.items():
                max_errors = responses.setdefault(name, {})
                for part, error in parts.items():
                    max_errors[part] = max(error, max_errors.get(part, 0.0))
        return responses

    def _recheck_gradients(
        self, a: ModelPass, batch: Any, kept: GradientStore, errors: Errors, responses: Errors
    ) -> None:
        """If gradients differ, compare with the original by the formula of batch norm: torch's kernel may be wrong.

        For a batch of one on CPU its gradient is wrong if the gradient of its output is a permuted view (torch 2.14).
        """
        error, response = errors[GRADIENTS].get("", 0.0), responses.get(GRADIENTS, {}).get("", 0.0)
        if error <= max(self.limit, _RESPONSE_FACTOR * min(response, _MAX_RESPONSE)) or a.backward_error is not None:
            return
        with GradientStore() as plain:
            by_formula = self.run(0, batch, plain.store, training=True, context=FormulaBatchNorm())
            if isinstance(by_formula, Exception) or by_formula.backward_error is not None:
                return
            if max(all_distances(a.leaves, by_formula.leaves).values(), default=inf) > self.limit:
                return
            to_formula = GradientDistance(plain)
            self.run(1, batch, to_formula.compare_gradient, training=True)
            found = to_formula.result()
        if found > self.limit:
            return
        self._note(
            (GRADIENTS,),
            f"torch's own batch norm returns wrong gradients on this input (relative L2 {error:.1e} from its formula); "
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


class _Missing:
    """Stands for a leaf that one side lacks."""


_MISSING = _Missing()


@dataclass(frozen=True)
class _TrainingSetup:
    """How the models are compared in training: names of the original's norms that are put into evaluation, or why the
    models are not compared in training.
    """

    frozen: tuple[str, ...] = ()
    skip_reason: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What to say of the norms in evaluation."""
        many = (
            f"{len(self.frozen)} sites use running statistics in training: compared with the original's norms there in "
        )
        return (f"{many}evaluation",) if self.frozen else ()


def _training_setup(first: nn.Module, second: nn.Module) -> _TrainingSetup:
    """A site that uses running statistics in training computes what the original does with that norm in evaluation."""
    original_modules = modules_by_name(first)
    frozen, others = [], []
    for name, layer in gated_modules(second).items():
        old = original_modules.get(name)
        same = isinstance(old, GatedModule) and old.bn_statistics == layer.bn_statistics
        if layer.bn_statistics == "batch" or same or (isinstance(layer, SwitchNorm) and "weight" in layer._buffers):
            continue
        if layer.bn_statistics == "running" and isinstance(layer, SwitchNorm) and old is not None:
            frozen.append(name)
        else:
            others.append(name)
    if others:
        return _TrainingSetup(skip_reason=f"{len(others)} sites use running statistics in training, by choice")
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


def all_distances(a: Leaves, b: Leaves) -> dict[str, float]:
    """Return the distance of every leaf, infinite if it cannot be compared."""

    def leaf_distance(path: str) -> float:
        try:
            return relative_l2(a.values.get(path, _MISSING), b.values.get(path, _MISSING))
        except Exception:  # noqa: BLE001 - said where the two models are compared
            return inf

    return {path: leaf_distance(path) for path in {**a.values, **b.values}}


def _statistics_error(references: dict[TensorNames, Tensor], values: dict[TensorNames, Tensor]) -> dict[str, float]:
    """The floating buffers of each module as one vector, the others by equality; by module.

    One vector, since a running mean that is zero in truth, as behind a convolution of a normalised map, is rounding
    noise and has no relative error of its own.
    """
    vectors: dict[str, VectorDistance] = {}
    errors: dict[str, float] = {}
    for names, partner in match_names(references, values):
        reference, value, owner = references[names], values[partner], names[0].rpartition(".")[0]
        if not reference.is_floating_point() or reference.dtype != value.dtype or reference.shape != value.shape:
            errors[names[0]] = relative_l2(reference, value)
            continue
        vectors.setdefault(owner, VectorDistance()).add(reference, value)
    return errors | {f"{owner or 'the model'} (statistics)": vector.result() for owner, vector in vectors.items()}
