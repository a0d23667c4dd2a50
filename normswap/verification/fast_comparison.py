"""Compare a converted network with its original at the cost of a few float32 passes: `verify_fast`.

A float64 pass of a large network takes many times that of float32, and nearly all of that time goes to convolutions,
which both networks share. So the two parts of the comparison are separate:

- Each site is compared alone in float64, on the inputs that it receives, in both modes, with gradients and statistics.
  Outside the sites all modules, tensors and hooks must be equal bit by bit. Together they show what a comparison of the
  whole network in float64 shows, with the same limit.
- The whole networks are compared in float32, which shows how the sites are connected: outputs in evaluation on the
  whole input, outputs, gradients and statistics in training on a crop of it. The crop is the smallest on which each
  site keeps more than one position, if it has more than one on the whole input.

The limit in float32 is a rounding by one unit in the last place at each site, in both networks, forward and backward.
Whatever is above a limit is in doubt, not wrong: then, and if a network does not meet the conditions, `verify` compares
the whole networks in float64 on the whole input and decides. So it does for small networks, where that takes no time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn

from normswap.layers.gated_module import GatedModule
from normswap.layers.gating import BnStatistics
from normswap.model_state import preserved_training_flags, registered_hooks, set_training_flags
from normswap.surgery.arguments import describe_shapes
from normswap.surgery.discovery.whole_model import Observation, observe_forward
from normswap.surgery.importance import gated_modules
from normswap.surgery.module_tree import copy_model, model_training_flags, walk_modules
from normswap.text import pluralize
from normswap.verification.check_progress import CheckProgress, RunningCheck
from normswap.verification.equivalence import DEFAULT_TOLERANCE, Verification
from normswap.verification.model_comparison import OUTPUTS, SITES_ALONE, ModelComparison
from normswap.verification.model_pass import GradientStore, ModelPass, gradient_distance, output_distance
from normswap.verification.precision import LIMITS, Precision
from normswap.verification.site_watch import (
    SiteCall,
    SiteError,
    SitePair,
    differences_outside_sites,
    record_calls_hook,
    run_site,
    site_outputs,
    site_statistics_distance,
)

# Below this number of elements at all sites together, float64 takes no longer than the rest of a conversion.
MIN_ELEMENTS = 1 << 22
# The number of positions along each dimension that a crop leaves to the smallest map.
_POSITIONS = 2
# One unit in the last place in each of two networks, forward and backward.
_ROUNDINGS = 4
_SINGLE = Precision(torch.float32, casts=False)
_DOUBLE = Precision(torch.float64)


def verify_fast(
    original: nn.Module,
    converted: nn.Module,
    inputs: Any,
    *,
    observation: Observation | None = None,
    bn_statistics: Mapping[str, BnStatistics] | None = None,
    progress: CheckProgress | None = None,
) -> Verification | None:
    """Return the verification of a conversion if the networks agree beyond doubt, else None: then use `verify`.

    Both models are left as they are.

    Args:
        observation: the forward pass of `original` on `inputs`, if it was observed before.
        bn_statistics, progress: as in `verify`.
    """
    modules = [entry.module for model in (original, converted) for entry in walk_modules(model)]
    with preserved_training_flags(modules), RunningCheck(progress) as running:
        return _compare(original, converted, inputs, observation, bn_statistics, running)


def _compare(
    original: nn.Module,
    converted: nn.Module,
    inputs: Any,
    observation: Observation | None,
    bn_statistics: Mapping[str, BnStatistics] | None,
    running: RunningCheck,
) -> Verification | None:
    if not _has_only_float32(original, converted) or not _is_image_batch(inputs) or gated_modules(original):
        return None
    if observation is None:
        running.begin(OUTPUTS[False])
        observation = observe_forward(original, inputs, walk_modules(original))
    num_elements = sum(prod(shape) for shapes in observation.shapes.values() for shape in shapes)
    if num_elements < MIN_ELEMENTS:
        return None
    comparison = ModelComparison(
        original,
        converted,
        [inputs],
        limit=_rounding_limit(len(observation.shapes)),
        precision=_SINGLE,
        flags=(model_training_flags(original), model_training_flags(converted)),
        bn_statistics=bn_statistics,
        on_check=running.begin,
    )
    sites = comparison.site_watch.pairs
    if not _can_compare_alone(sites, comparison, observation):
        return None
    if not _agree_in_evaluation(comparison, inputs, observation):
        return None
    trained = _agree_in_training(comparison, inputs, observation)
    if trained is None or not all(check.passed is not False for check in comparison.checks()):
        return None
    running.begin(SITES_ALONE)
    flags = {mode: [comparison.flags_in_mode(index, training=mode) for index in (0, 1)] for mode in (False, True)}
    errors = tuple(_compare_alone(site, trained.calls[site.name], flags) for site in sites)
    if any(not error <= DEFAULT_TOLERANCE for site in errors for error in _measured(site)):
        return None
    if differences_outside_sites(original, converted, comparison.site_watch.names):
        return None
    return _result(comparison, trained.crop, errors)


def _result(comparison: ModelComparison, crop: Tensor, sites: tuple[SiteError, ...]) -> Verification:
    checks = comparison.checks()
    largest = max(error for site in sites for error in _measured(site))
    notes = (
        *comparison.reference_notes,
        f"training was compared on a crop of {describe_shapes(crop)}, on which each site keeps several positions",
        f"{pluralize(len(sites), 'site')} agreed alone in float64 within {DEFAULT_TOLERANCE:.0e} (outputs, gradients, "
        f"running statistics; at most {largest:.1e}); everything outside them is equal bit by bit",
    )
    return Verification(
        passed=True,
        tolerance=comparison.limit,
        loosened=False,
        inputs=describe_shapes(comparison.inputs[0]),
        checks=checks,
        sites=sites,
        max_abs_error=comparison.largest_difference,
        max_rel_error=max(check.error for check in checks if check.error is not None),
        fp32_error=checks[0].error,
        precision=_SINGLE.name,
        notes=notes,
        training_reference=comparison.reference.name,
    )


# --- conditions -------------------------------------------------------------------------------------------------------


def _has_only_float32(*models: nn.Module) -> bool:
    modules = [entry.module for model in models for entry in walk_modules(model)]
    tensors = (t for module in modules for t in (*module._parameters.values(), *module._buffers.values()))
    return all(t is None or t.dtype == torch.float32 or _is_integer(t) for t in tensors)


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)


def _is_image_batch(inputs: Any) -> bool:
    return isinstance(inputs, Tensor) and inputs.dtype == torch.float32 and inputs.dim() > 2


def _can_compare_alone(sites: Sequence[SitePair], comparison: ModelComparison, observation: Observation) -> bool:
    """Return whether every converted site is a module that ran and uses the batch of this process only."""
    if not sites or comparison.site_watch.unpaired or comparison.reference.skip_reason:
        return False
    layers = [layer for site in sites for layer in site.converted_modules if isinstance(layer, GatedModule)]
    return all(site.is_module_site and site.name in observation.shapes for site in sites) and not any(
        layer.synchronize for layer in layers
    )


def _rounding_limit(num_sites: int) -> float:
    """Return the rounding of both networks, forward and backward, at each site; at most the limit of float32."""
    return min(LIMITS[torch.float32], _ROUNDINGS * (1 + num_sites) * _SINGLE.eps)


# --- the whole networks in float32 ------------------------------------------------------------------------------------


def _agree_in_evaluation(comparison: ModelComparison, inputs: Any, observation: Observation) -> bool:
    """Compare with the outputs of the observed pass; return whether they are finite and agree."""
    comparison.on_check(OUTPUTS[False])
    with GradientStore() as nothing:
        compared = comparison.compare_second(ModelPass(observation.outputs, {}, {}), inputs, nothing, training=False)
    if compared is None:
        return False
    comparison.judge(compared[1], {})
    return comparison.is_judged and comparison.checks()[0].passed is True


@dataclass(frozen=True)
class _Trained:
    """A comparison in training: the crop of the input, and the calls of each site on it."""

    crop: Tensor
    calls: dict[str, list[SiteCall]]


def _agree_in_training(comparison: ModelComparison, inputs: Tensor, observation: Observation) -> _Trained | None:
    """Compare on the smallest crop that fits; return None if none fits, or if the networks do not agree."""
    for crop in _crops(inputs, observation):
        calls: dict[str, list[SiteCall]] = {site.name: [] for site in comparison.site_watch.pairs}
        hooks = (record_calls_hook(site.original, calls[site.name]) for site in comparison.site_watch.pairs)
        with GradientStore() as stored:
            a = comparison.run_first(crop, stored, registered_hooks(hooks), training=True)
            if isinstance(a, Exception) or not _keeps_positions(calls, observation):
                continue
            compared = None if a.backward_error else comparison.compare_second(a, crop, stored, training=True)
        if compared is None:
            return None
        comparison.judge(compared[1], {})
        agree = comparison.is_judged and comparison.checks()[1].passed is True
        return _Trained(crop, calls) if agree else None
    return None


def _crops(inputs: Tensor, observation: Observation) -> Iterator[Tensor]:
    """Yield crops of the input, the smallest first, down to which the maps of the sites have several positions."""
    sizes = inputs.shape[2:]
    maps = [shape[2:] for shapes in observation.shapes.values() for shape in shapes if len(shape) == inputs.dim()]
    strides = [
        max((ceil(size / each[dim]) for each in maps if each[dim] > 1), default=size) for dim, size in enumerate(sizes)
    ]
    positions = _POSITIONS
    while any(positions * stride < size for stride, size in zip(strides, sizes, strict=True)):
        crop = inputs
        for dim, (stride, size) in enumerate(zip(strides, sizes, strict=True), start=2):
            crop = crop.narrow(dim, 0, min(size, positions * stride))
        yield crop.contiguous()
        positions *= 2


def _keeps_positions(calls: Mapping[str, Sequence[SiteCall]], observation: Observation) -> bool:
    """Return whether each site ran as often as observed, with several positions where it had several."""
    for name, recorded in calls.items():
        shapes = [_input_shape(call) for call in recorded]
        observed = observation.shapes[name]
        if len(shapes) != len(observed):
            return False
        if any(prod(was[2:]) > 1 and prod(now[2:]) == 1 for was, now in zip(observed, shapes, strict=True)):
            return False
    return True


def _input_shape(call: SiteCall) -> tuple[int, ...]:
    args, kwargs = call.args
    return next((tuple(value.shape) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), ())


# --- each site in float64 ---------------------------------------------------------------------------------------------


def _compare_alone(
    site: SitePair, calls: Sequence[SiteCall], flags: Mapping[bool, Sequence[Mapping[int, bool]]]
) -> SiteError:
    """Return the largest errors of a site in float64 over all its calls, in evaluation and in training.

    Args:
        flags: by mode (True for training), the training flags of the modules of both models, by their `id`.
    """
    largest: dict[str, float] = {}
    for call in calls:
        exact = SiteCall(_DOUBLE.cast(call.args), call.random_state, call.first, call.input_needs_no_grad)
        pair = SitePair(site.name, copy_model(site.original), copy_model(site.converted))
        _DOUBLE.apply_to_modules([*pair.original_modules, *pair.converted_modules])
        _copy_flags(site, pair, flags[False])
        with torch.no_grad():
            errors = {
                "evaluation": output_distance(*(site_outputs(each, exact) for each in (pair.original, pair.converted)))
            }
        _copy_flags(site, pair, flags[True])
        (expected, expected_gradients), (found, gradients) = (run_site(entries, exact) for entries in pair.entries)
        errors["training"] = output_distance(expected, found)
        errors["gradients"] = gradient_distance(expected_gradients, gradients)
        errors["statistics"] = site_statistics_distance(pair)
        for measure, error in errors.items():
            largest[measure] = max(largest.get(measure, 0.0), error)
    return SiteError(site.name, **largest)


def _copy_flags(site: SitePair, copied: SitePair, flags: Sequence[Mapping[int, bool]]) -> None:
    """Set the training flags of a copy of a site to those of the modules that it is a copy of."""
    for entries, new_entries, own in zip(site.entries, copied.entries, flags, strict=True):
        set_training_flags(
            (new.module, own[id(old.module)])
            for old, new in zip(entries, new_entries, strict=True)
            if id(old.module) in own
        )


def _measured(site: SiteError) -> list[float]:
    measures = (site.evaluation, site.training, site.gradients, site.statistics)
    return [error for error in measures if error is not None]
