"""`analyze`: what can be said of a network from data without labels, before a conversion and after it."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normswap.analysis.advice import Advice, advise_network, advise_site
from normswap.analysis.batch_norms import BatchNormCalls, BatchNormSite
from normswap.analysis.single_branches import (
    BranchMeter,
    ConvertedSite,
    SingleBranchPlan,
    choose_branches,
    rank_sites,
)
from normswap.errors import ArgumentError, DataError, NothingToDo
from normswap.running_stats.accumulation import batch_inputs, move_to_device
from normswap.surgery.arguments import describe_invalid_batches, describe_shapes, require_module
from normswap.surgery.importance import gated_modules
from normswap.surgery.wrappers import unwrap
from normswap.text import pluralize, printable_as
from normswap.verification.distance import OutputDistance, evaluation_mode, run_model


@printable_as("analysis")
@dataclass(frozen=True, repr=False)
class Analysis:
    """The result of `analyze`; `print(analysis)` shows it as tables.

    Attributes:
        batch_size: the number of samples of a batch in training.
        samples: the number of samples that were read.
        batch_norms: the Batch Normalizations in the order in which they run.
        training_error: the relative L2 error of the outputs if every Batch Normalization normalizes by its batch, as in
            training, against evaluation; None without Batch Normalization.
        training_agreement: the share, from 0 to 1, of predictions that are the same; None if there are no predictions.
        advice: what to do with the Batch Normalizations, in a sentence or two.
        converted: the converted sites, the one that is forced to one branch most cheaply first.
        plan: the sites that are forced to one branch; None without converted sites.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> normswap.analyze(model, [torch.randn(8, 3, 8, 8)])
        Analysis(1 BN site, 0 converted sites, batch_size=2, 8 samples)
    """

    batch_size: int
    samples: int
    batch_norms: tuple[BatchNormSite, ...]
    training_error: float | None
    training_agreement: float | None
    advice: str
    converted: tuple[ConvertedSite, ...]
    plan: SingleBranchPlan | None

    __module__ = "normswap"

    def __repr__(self) -> str:
        sites = f"{pluralize(len(self.batch_norms), 'BN site')}, {pluralize(len(self.converted), 'converted site')}"
        return f"Analysis({sites}, batch_size={self.batch_size}, {self.samples} samples)"

    @property
    def site_advice(self) -> dict[str, Advice]:
        """What to do with each Batch Normalization: `leave`, `freeze`, `convert` or `calibrate`."""
        return {site.fqn: advise_site(site) for site in self.batch_norms}

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers."""
        return {**asdict(self), "site_advice": self.site_advice}


def analyze(
    model: nn.Module,
    data: Iterable[Any],
    *,
    batch_size: int = 2,
    budget: float | None = None,
    device: torch.device | str | None = None,
    on_site: Callable[[int, int], None] = lambda done, total: None,
) -> Analysis:
    """Measure a network on data without labels: its Batch Normalizations, and its converted sites.

    Of each Batch Normalization: how far training at a batch size is from evaluation, how much of that is due to small
    batches (`noise`) and to running statistics that are not those of the data (`shift`), and advice. Of each converted
    site: what all weight on one branch does to the outputs, and the sites that can have one branch within a budget. The
    model runs in evaluation mode and keeps its state.

    Args:
        model: a network with BN layers, with SN layers or with both; it may be wrapped.
        data: an iterable of inputs (a tensor, a tuple of positional arguments or a dict of keyword arguments), or of
            lists or tuples whose first item is such an input. All of them are kept in memory; some hundred images are
            enough. Batches may be larger than `batch_size`.
        batch_size: the number of samples of a batch in training. Samples of a batch that do not fill one are left out.
        budget: the largest relative L2 error of the outputs that the plan may have; default: no limit, so the plan has
            all converted sites.
        device: the device to move the inputs to; default is not to move them.
        on_site: a function that is called with the number of converted sites that are measured, and of all.

    Returns:
        An `Analysis`. `normswap.set_importance(model, analysis.plan.branches)` applies its plan.

    Raises:
        NothingToDo: the model has neither a Batch Normalization with running statistics that ran, nor a converted site.
        DataError: there are no inputs, or no input has `batch_size` samples.
        ArgumentError: `model` is not a module, or `batch_size` or `budget` is no such number.
        ModelError: the model raises on an input.

    Examples:
        >>> import torch, normswap
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> converted = normswap.convert(net).model
        >>> normswap.set_importance(converted, {"1": {"ln": 0.02, "bn": 0.98}})
        >>> analysis = normswap.analyze(converted, [torch.randn(8, 3, 8, 8)], budget=0.1)
        >>> analysis.plan.branches, analysis.plan.relative_error < 0.1
        ({'1': 'bn'}, True)
        >>> analysis.plan.settings
        {'1': {'train_gates': False}}
    """
    model = unwrap(require_module(model))
    _check_numbers(batch_size, budget)
    inputs = _read_inputs(data, device)
    if all(_count_samples(batch) < batch_size for batch in inputs):
        largest = max(map(_count_samples, inputs))
        raise DataError(
            f"data: expected inputs of at least batch_size={batch_size} samples, got at most {largest}: pass larger "
            "batches"
        )
    inputs = [batch for batch in inputs if _count_samples(batch) >= batch_size]
    with evaluation_mode(model):
        sites, outputs = _measure_batch_norms(model, inputs, batch_size)
        if not sites and not gated_modules(model):
            raise NothingToDo(
                "nothing to analyze: no Batch Normalization with running statistics ran, and no site is converted"
            )
        meter = BranchMeter(model, inputs)
        converted = rank_sites(meter, on_site)
        plan = choose_branches(meter, converted, budget) if converted else None
    return Analysis(
        batch_size,
        sum(map(_count_samples, inputs)),
        sites,
        outputs.relative_error if sites else None,
        outputs.top1_agreement if sites else None,
        advise_network(sites, batch_size),
        converted,
        plan,
    )


def _check_numbers(batch_size: object, budget: object) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ArgumentError(f"batch_size: expected a number of samples >= 1, got {batch_size!r:.80}")
    if budget is not None and (not isinstance(budget, int | float) or isinstance(budget, bool) or not budget >= 0):
        raise ArgumentError(f"budget: expected a relative error such as 0.1, got {budget!r:.80}")


def _read_inputs(data: Iterable[Any], device: torch.device | str | None) -> list[Any]:
    if problem := describe_invalid_batches(data):
        raise DataError(f"data: {problem}")
    inputs = [move_to_device(batch_inputs(batch), device) for batch in data]
    if not inputs:
        raise DataError("data: expected at least one input, got none")
    return inputs


def _count_samples(inputs: Any) -> int:
    """The number of samples: the first dimension of the first tensor."""
    tensor = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()), None)
    if tensor is None:
        raise DataError(f"data: expected inputs with samples in their first dimension, got {describe_shapes(inputs)}")
    return len(tensor)


def _measure_batch_norms(
    model: nn.Module, inputs: list[Any], batch_size: int
) -> tuple[tuple[BatchNormSite, ...], OutputDistance]:
    """The sites, and the distance of the outputs in training from those in evaluation."""
    measured = BatchNormCalls(model, batch_size)
    training = BatchNormCalls(model, batch_size, as_in_training=True)
    distance = OutputDistance()
    for batch in inputs:
        measured.samples = training.samples = _count_samples(batch)
        with measured.ignored(), measured:
            reference = run_model(model, batch)
        if measured.has_sites:
            with training.ignored(), training:
                distance.add(reference, run_model(model, batch), batch)
    return measured.sites(), distance
