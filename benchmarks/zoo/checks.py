"""Build one model, give its batch norms random values, convert it and check the conversion.

`normswap.verify` compares the functions of the default conversion: in training with the original whose norms are in
evaluation, as the record says. The other checks are those of the tests (tests/helpers/guarantees), which do
not use the package. Errors of the original model, when it is built or run, are recorded separately from failures of
normswap.
"""

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import normswap
from benchmarks.zoo.catalog import Entry, entries
from benchmarks.zoo.norm_values import batch_norms, randomise
from benchmarks.zoo.records import (
    CONVERTED,
    FAILED,
    MODEL_FAILS,
    NO_NORM,
    PARTLY,
    PLANNED,
    Record,
    accepted_reason,
)
from normswap.errors import ModelError
from normswap.model_state import call_model, preserved_state, seeded, training_flags
from normswap.surgery.arguments import describe_shapes
from normswap.surgery.discovery.whole_model import tracing_path
from normswap.surgery.module_tree import model_mode
from normswap.surgery.plan import SwapPlan
from normswap.verification.training_reference import training_reference
from tests.helpers import guarantees

# The checks are shared with the tests, which import their helpers by name.

FLOAT64_PARAMETERS = 100_000_000
CPU_PARAMETERS = 400_000_000
MULTIPLY_ADDS = 0.3e9  # of one forward pass; slower models get the smaller input, if they have one
SITE_LIMIT = 1e-9
FP32_LIMIT = 1e-5
_OWN_RESPONSES = 10

Save = Callable[[Record], None]


class ModelFails(Exception):  # noqa: N818 - a result, not an error of this program
    """The original model cannot be built or run."""


def blank(entry: Entry) -> Record:
    """Return the record of a model before the first stage."""
    return Record(entry.key, entry.zoo, entry.name, entry.family, reduced=entry.reduced)


def check_model(
    entry: Entry, save: Save = lambda _: None, *, float64_parameters: int = FLOAT64_PARAMETERS, quick_above: float = inf
) -> Record:
    """Run all checks on one model. Errors are recorded, never raised; the record is saved after every stage.

    Args:
        float64_parameters: verification is in float64 up to this number of parameters.
        quick_above: above this number of parameters verification and the check of gate gradients, which take most of
            the time, are skipped.
    """
    record = blank(entry)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        _check(entry, record, save, float64_parameters, quick_above)
    except ModelFails as finding:
        record.outcome = MODEL_FAILS
        record.notes.append(str(finding))
        record.skips = [["", "", str(finding), MODEL_FAILS]] * max(1, record.norms)
        record.sites = record.norms
    except BaseException as error:  # noqa: BLE001 - any error concerns only this model
        record.failures.append(f"{record.stage}: {type(error).__name__}: {error}"[:600])
        record.trace = traceback.format_exc()[-1500:]
    if record.failures:
        record.outcome = FAILED
    elif record.outcome == Record.outcome:
        record.outcome = PARTLY if record.skips else CONVERTED
    save(record)
    return record


def _check(entry: Entry, record: Record, save: Save, float64_parameters: int, quick_above: float) -> None:
    with _stage(record, "inspect", save):
        blueprint = _blueprint(entry)
    if blueprint is not None:
        record.parameters = sum(p.numel() for p in blueprint.parameters())
        record.norms = len(batch_norms(blueprint))
        if not record.norms:
            record.outcome = NO_NORM
            return
        if record.parameters > CPU_PARAMETERS:
            _plan_on_meta(entry, blueprint, record, save)
            return
    torch.manual_seed(0)
    with _stage(record, "build", save), _errors_of_the_model():
        model = entry.build().eval()
    record.parameters = sum(p.numel() for p in model.parameters())
    record.norms = len(batch_norms(model))
    if not record.norms:
        record.outcome = NO_NORM
        return
    if record.parameters > CPU_PARAMETERS:  # it has no blueprint on meta
        _plan_on_meta(entry, model.to("meta"), record, save)
        return
    with _stage(record, "choose an input", save):
        inputs = _runnable_input(entry, model, blueprint, record)
    del blueprint
    record.inputs = describe_shapes(inputs)
    with _stage(record, "trace", save):
        whole = tracing_path(model, inputs)
    record.path, record.path_reason = whole.path, whole.reason
    before = guarantees.Record.of(model)
    with _stage(record, "plan", save):
        plan = normswap.plan_swaps(model, inputs)
    with _stage(record, "swap", save):
        converted = normswap.convert(model, plan=plan).model
    _account(model, plan, record)
    record.bn_statistics = "+".join(sorted({swap.bn_statistics for swap in plan.swaps}))
    with _stage(record, "check unchanged parts", save), _recorded(record):
        guarantees.nothing_else_changed(before, converted, plan, same_objects=False)
        guarantees.nothing_else_changed(before, model, SwapPlan((), (), ""), same_objects=True)
    del before
    with _stage(record, "check the plan", save), _recorded(record):
        _accounted_for(plan)
    if record.parameters <= quick_above:
        fine = record.parameters <= float64_parameters
        _same_function(entry, model, converted, inputs, record, save, fine=fine)
        with _stage(record, "check gate gradients", save), _recorded(record):
            record.gates_checked = _check_gate_gradients(entry, converted, inputs, plan, record)
    with _stage(record, "check reversal", save), _recorded(record):
        guarantees.plan_survives_json(plan)
        guarantees.converting_twice_changes_nothing(converted, plan, None)
        del converted
        guarantees.reverts(model, None, plan=plan)


def smallest_of_each_family(zoo: str) -> list[str]:
    """Return the name of the model with the fewest parameters of each family that has batch norms."""
    best: dict[str, tuple[int, str]] = {}
    for entry in entries(zoo):
        blueprint = _blueprint(entry)
        if blueprint is not None and batch_norms(blueprint):
            size = sum(p.numel() for p in blueprint.parameters())
            best[entry.family] = min(best.get(entry.family, (size, entry.name)), (size, entry.name))
    return [name for _, name in best.values()]


@contextmanager
def _stage(record: Record, name: str, save: Save) -> Iterator[None]:
    """Set the name of the stage, measure its time and save the record."""
    record.stage = name
    save(record)
    start = time.perf_counter()
    try:
        yield
    finally:
        record.seconds[name] = round(time.perf_counter() - start, 4)
    record.stage = "end"


@contextmanager
def _recorded(record: Record) -> Iterator[None]:
    """Record the failure of a check and continue with the next one."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a failed check, or an error of the converted model
        text = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        record.failures.append(f"{record.stage}: {text}"[:600])
        record.trace = record.trace or traceback.format_exc()[-1500:]


@contextmanager
def _errors_of_the_model() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ModelFails(f"cannot be built: {type(error).__name__}: {error}"[:300]) from error


def _blueprint(entry: Entry) -> nn.Module | None:
    """Return the model on `meta`, or None if it needs values when it is built."""
    try:
        with torch.device("meta"):
            return entry.build().eval()
    except Exception:  # noqa: BLE001 - the model is built on the CPU next
        return None


def _plan_on_meta(entry: Entry, model: nn.Module, record: Record, save: Save) -> None:
    """Plan and swap a model that is too large for this machine on `meta`, without running it."""
    inputs = tree_map_only(Tensor, lambda t: t.to("meta"), entry.inputs(model)[-1])
    record.outcome, record.inputs = PLANNED, describe_shapes(inputs)
    with _stage(record, "plan", save):
        try:
            plan = normswap.plan_swaps(model, inputs)
        except normswap.NormswapError as error:
            record.notes.append(f"planned without an input: {error}"[:300])
            plan = normswap.plan_swaps(model)
    _account(model, plan, record)
    with _stage(record, "swap", save):
        normswap.convert(model, plan=plan, inplace=True)


def _runnable_input(entry: Entry, model: nn.Module, blueprint: nn.Module | None, record: Record) -> Any:
    """Set random values and return the first input that works in both modes, or else in evaluation mode."""
    problems: list[str] = []
    candidates = entry.inputs(model)
    if entry.smaller is not None and blueprint is not None and _operations(blueprint, candidates[0]) > MULTIPLY_ADDS:
        candidates = [entry.smaller(model), *candidates]
    for training in (True, False):
        for inputs in candidates:
            failure = _problem(randomise(model, inputs if training else None), inputs, "training") if training else None
            failure = failure or _evaluation_problem(model, inputs, record)
            if failure is None:
                record.notes += [f"before conversion: {problem}" for problem in dict.fromkeys(problems)]
                return inputs
            problems.append(failure)
        randomise(model, None)
    raise ModelFails("; ".join(dict.fromkeys(problems))[:400])


def _operations(blueprint: nn.Module, inputs: Any) -> int:
    """Return the multiply-adds of one forward pass, counted on `meta`; 0 if the model needs values."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            call_model(blueprint, tree_map_only(Tensor, lambda t: t.to("meta"), inputs))
        except Exception:  # noqa: BLE001 - the run on the CPU shows if the model fails
            return 0
    return int(counter.get_total_flops() // 2)


def _evaluation_problem(model: nn.Module, inputs: Any, record: Record) -> str | None:
    """Run the model once in evaluation mode, restore its state, and return a description of the problem, if any."""
    modules = list(model.modules())
    with torch.no_grad(), seeded(0), preserved_state(modules), training_flags(modules, training=False):
        start = time.perf_counter()
        try:
            outputs = call_model(model, inputs)
        except Exception as error:  # noqa: BLE001 - any error of the model is a result
            return _problem(error, inputs, "evaluation")
        record.seconds["forward"] = round(time.perf_counter() - start, 4)
    return _problem(outputs, inputs, "evaluation")


def _problem(outputs: Any, inputs: Any, mode: str) -> str | None:
    if isinstance(outputs, Exception):
        return f"fails in {mode} on {describe_shapes(inputs)}: {type(outputs).__name__}: {outputs}"[:250]
    floats = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return f"returns NaN in {mode} on {describe_shapes(inputs)}" if any(leaf.isnan().any() for leaf in floats) else None


def _account(model: nn.Module, plan: SwapPlan, record: Record) -> None:
    """Count sites; check that skips have accepted reasons and that every batch norm is in the plan."""
    norms = batch_norms(model)
    by_name = dict(model.named_modules(remove_duplicate=False))
    for skip in plan.skips:
        if skip.kind in ("bn", "frozen bn") or by_name.get(skip.fqn) in norms:
            reason = accepted_reason(skip.class_name, skip.reason)
            record.skips.append([skip.fqn, skip.class_name, skip.reason, reason or "not accepted"])
            if reason is None:
                record.failures.append(f"skip of {skip.fqn} ({skip.class_name}): {skip.reason}"[:300])
        else:
            record.other_norms += 1
    record.swapped = len(plan.swaps)
    record.sites = record.swapped + len(record.skips)
    decided = {by_name.get(decision.fqn) for decision in (*plan.swaps, *plan.skips)}
    missing = [name for name, module in by_name.items() if module in norms and module not in decided]
    if missing:
        record.failures.append(f"plan: {len(missing)} batch norms are not in the plan: {', '.join(missing[:3])}")


def _accounted_for(plan: SwapPlan) -> None:
    """Check that every module is in the plan once, with a reason if it is skipped; see also `_account`."""
    decided = Counter(decision.fqn for decision in (*plan.swaps, *plan.skips))
    if max(decided.values(), default=1) > 1:
        raise AssertionError(f"{decided.most_common(1)} is in the plan twice")
    if any(len(skip.reason) <= 10 for skip in plan.skips):
        raise AssertionError("a skip has no reason")


def _same_function(
    entry: Entry, model: nn.Module, converted: nn.Module, inputs: Any, record: Record, save: Save, *, fine: bool
) -> None:
    """Verify in float64 if `fine` is true and the model supports it, else in float32."""
    with _stage(record, "verify", save), _recorded(record):
        whole = None
        if fine:
            try:
                whole = normswap.verify(model, converted, [inputs])
            except ModelError as error:
                record.notes.append(f"float64: {error}"[:250])
        record.precision = "float64" if whole is None else whole.precision
        if whole is None and entry.view is None:
            record.precision = "float32"
            _compare_in_float32(model, converted, inputs, record)
        judged = whole
        if entry.view is not None:
            judged = normswap.verify(entry.view(model), entry.view(converted), [inputs])
            record.notes.append("verification uses a part of the outputs; see the view of this model in benchmarks/zoo")
        if judged is not None:
            _record_verification(whole or judged, judged, record)


def _record_verification(whole: normswap.Verification, judged: normswap.Verification, record: Record) -> None:
    record.training_reference = judged.training_reference
    if record.bn_statistics == "running" and judged.training_reference == "mixed":
        record.failures.append(f"verification: training was compared with the {judged.training_reference} model")
    record.checks += [[c.name, c.error, c.limit, c.own_response, c.passed, c.note] for c in judged.checks]
    record.fp32_error = judged.fp32_error if record.fp32_error is None else record.fp32_error
    for mode in ("evaluation", "training"):
        errors = [error for site in whole.sites if (error := getattr(site, mode)) is not None]
        record.site_errors.append(max(errors, default=None))
        worst = max(errors, default=0.0)
        if worst > (SITE_LIMIT if whole.precision == "float64" else FP32_LIMIT):
            fqn = next(site.fqn for site in whole.sites if getattr(site, mode) == worst)
            record.failures.append(f"verification: site {fqn} has an error of {worst:.1e} in {mode}")
    for check in judged.checks:
        if check.passed is False:
            own = "" if check.own_response is None else f", own response {check.own_response:.1e}"
            record.failures.append(
                f"verification: {check.name}: {check.error:.1e}, limit {check.limit:.1e}{own} {check.note}"
            )
    if judged.precision != "float64":
        record.notes += [f"float64: {note}"[:250] for note in judged.notes[:1]]
    if judged.judged_by == "sites":
        record.notes.append(judged.notes[-1][:400])
    if not judged.passed and not any(check.passed is False for check in judged.checks):
        record.failures.append(f"verification: {judged.summary}: {'; '.join(judged.notes)}"[:400])


def _compare_in_float32(model: nn.Module, converted: nn.Module, inputs: Any, record: Record) -> None:
    """Compare outputs in both modes in float32; the limit depends on how the original amplifies rounding errors.

    In training the original is the reference of `normswap.verify`: its norms are in evaluation where the converted
    model uses running statistics.
    """
    reference = training_reference(model, converted)
    record.training_reference = reference.name

    def outputs(of: nn.Module, fed: Any, training: bool) -> list[Any]:
        modules = list(of.modules())
        is_reference = training and of is model
        flags = reference.flags if is_reference else {}
        with (
            torch.no_grad(),
            seeded(0),
            preserved_state(modules),
            model_mode(of, training=training, flags=flags),
            reference.applied() if is_reference else nullcontext(),
        ):
            return tree_leaves(call_model(of, fed))

    nudged = tree_map_only(Tensor, lambda t: t * (1 + torch.finfo(t.dtype).eps) if t.is_floating_point() else t, inputs)
    for mode in ("evaluation", "training"):
        name, training = f"outputs in {mode}", mode == "training"
        try:
            expected = outputs(model, inputs, training)
        except Exception as error:  # noqa: BLE001 - if the original raises, the check is skipped
            record.checks.append([name, None, FP32_LIMIT, None, None, f"the original raises: {error}"[:200]])
            continue
        error = _distance(expected, outputs(converted, inputs, training))
        own = _distance(expected, outputs(model, nudged, training)) if error > FP32_LIMIT else None
        limit = max(FP32_LIMIT, _OWN_RESPONSES * (own or 0.0))
        record.checks.append([name, error, limit, own, error <= limit, "float32"])
        if not training:
            record.fp32_error = error
        if error > limit:
            record.failures.append(f"verification in float32: {name}: {error:.1e}, limit {limit:.1e}")


def _distance(first: Sequence[Any], second: Sequence[Any]) -> float:
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, Tensor) and a.is_floating_point()]
    return max((guarantees.distance(a, b) for a, b in pairs), default=0.0)


def _check_gate_gradients(entry: Entry, converted: nn.Module, inputs: Any, plan: SwapPlan, record: Record) -> int:
    """Compare gate gradients with the oracle; in float32, only check that they are finite. Return their number."""
    swapped = [swap.fqn for swap in plan.swaps]
    if entry.view is not None:
        view = entry.view(converted)
        inside = next(name for name, _ in view.named_children())
        return guarantees.alive(view, [f"{inside}.{fqn}" for fqn in swapped], inputs)
    if record.precision == "float64":
        return guarantees.alive(converted, swapped, inputs)
    layers = guarantees.paths(converted)
    gates = {f"{fqn}.{gate}": getattr(layers[fqn], gate) for fqn in swapped for gate in guarantees.GATES}
    gates = {name: gate for name, gate in gates.items() if gate.requires_grad}
    if not gates:
        return 0
    modules = list(converted.modules())
    with seeded(0), preserved_state(modules), training_flags(modules, training=True):
        heads = [y for y in tree_leaves(call_model(converted, inputs)) if isinstance(y, Tensor) and y.requires_grad]
        gradients = torch.autograd.grad(
            heads, list(gates.values()), [torch.randn_like(y) for y in heads], allow_unused=True
        )
    for name, gradient in zip(gates, gradients, strict=True):
        if gradient is not None and not gradient.isfinite().all():
            raise AssertionError(f"expected a finite gradient of {name}, got {gradient.tolist()}")
    return sum(gradient is not None for gradient in gradients)
