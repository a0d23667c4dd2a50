"""Tables for the terminal as rich renderables: plans, verifications, importance weights, histories, file contents.

They fit 80 columns. Nothing is computed or decided here except counts and the number of rows.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from normswap.checkpoints.architecture.identification import Candidate, Identification, describe_mismatches
from normswap.checkpoints.content.state_dict import NormTensors, WeightsSurvey
from normswap.checkpoints.record import Step
from normswap.layers.gating import BRANCHES
from normswap.running_stats.calibration import Calibration
from normswap.surgery.discovery.sites import NormSite
from normswap.surgery.importance import SiteWeights
from normswap.surgery.plan import Swap, SwapPlan
from normswap.verification.distance import Distance
from normswap.verification.equivalence import Verification
from normswap.verification.model_comparison import FP32
from normswap.verification.site_watch import SiteError

_MAX_EXAMPLES = 3
_OMITTED_BRANCHES = {
    # A plan stores no shapes, so it is unknown whether the site or the user excluded a branch.
    "in": "no `in`: a 1x1 map has no variance, or it was excluded",
    "ln": "no `ln`: too few values per sample, or it was excluded",
    "bn": "no `bn`: the old norm has no running statistics",
}
_VERDICTS = {
    True: Text("same", style="green"),
    False: Text("DIFFERS", style="bold red"),
    None: Text("not judged", "dim"),
}


def heading(text: str, subtitle: str = "") -> RenderableType:
    """Return a title and a dim subtitle."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text(text, "bold", overflow="fold"), Text(subtitle, "dim", overflow="fold"))
    return grid


def plan_summary(plan: SwapPlan) -> RenderableType:
    """Return the sites by kind, the decisions with their reasons, and the plan's notes."""
    parts: list[RenderableType] = [_kinds_table(plan), Text(""), _decisions_table(plan)]
    if plan.notes:
        parts += [Text(""), bullets(plan.notes)]
    return Group(*parts)


def notes_table(notes: Sequence[str]) -> RenderableType:
    """Return what happened to the other entries of a file."""
    return Group(Text(""), Text("Other entries of the file", "bold"), bullets(notes))


def verification_table(verification: Verification) -> RenderableType:
    """Return every check with its error, limit and verdict, and the float32 error, which has no limit."""
    loosened = "; limit loosened on request" if verification.loosened else ""
    rule = "the whole model" if verification.judged_by == "whole model" else "each site alone"
    # The model's response to a change of one unit in the last place is measured only if an error is large.
    has_response = any(check.own_response is not None for check in verification.checks)
    table = _table(
        "Verification",
        "error",
        "limit",
        "verdict",
        *(["own response"] if has_response else []),
        right_aligned={1, 2, 4},
    )
    for check in verification.checks:
        limit = _format_number(check.limit) if check.passed is not None else ""
        response = [_format_number(check.own_response)] if has_response else []
        table.add_row(Text(check.name), _format_number(check.error), limit, _VERDICTS[check.passed], *response)
    if verification.fp32_error is not None:
        table.add_row(Text(FP32, "dim"), _format_number(verification.fp32_error), "", Text("no limit", "dim"))
    lines: list[RenderableType] = [table]
    notes = dict.fromkeys((*(check.note for check in verification.checks if check.note), *verification.notes))
    lines += [Padding(Text(note, "dim"), (0, 0, 0, 2), expand=False) for note in notes]
    lines.append(Text(f"  relative L2 in {verification.precision} on {verification.inputs}{loosened}", "dim"))
    lines.append(Text(f"  judged by {rule}", "dim"))
    return Group(*lines)


def distance_table(distance: Distance, limit: int = 5) -> RenderableType:
    """Return how far a network is from its original, and the sites that differ most."""
    table = _table("Distance from the original", "", right_aligned={1})
    table.add_row("relative L2 error of the outputs", f"{distance.relative_error:.3g}")
    if distance.top1_agreement is not None:
        agreement = f"{distance.top1_agreement:.1%} of {distance.predictions:,}"
        table.add_row("top-1 agreement of predictions", agreement)
    lines: list[RenderableType] = [table, Text(f"  in evaluation, on {distance.inputs}", "dim")]
    if distance.sites:
        sites = _table("Sites alone that differ most", "outputs", right_aligned={1})
        for site in sorted(distance.sites, key=lambda each: each.relative_error, reverse=True)[:limit]:
            sites.add_row(Text(site.fqn or "(the model)", overflow="fold"), f"{site.relative_error:.3g}")
        lines += [Text(""), sites]
    return Group(*lines)


def not_measured_line(title: str, reason: str) -> RenderableType:
    """Return a line in place of a table, such as that of a verification that was skipped."""
    return Text.assemble((title, "bold"), "  ", (reason, "yellow"))


def read_back_line(error: float) -> RenderableType:
    """Return how far a program that was read back differs from the original, in the program's own precision."""
    return Text.assemble(
        ("Read back", "bold"), f"  computes the same function as the original, relative L2 {_format_number(error)}"
    )


def worst_sites(verification: Verification, limit: int = 5) -> RenderableType:
    """Return the sites that differ most from the norms they replaced, on the same input."""
    measured = any(site.gradients is not None for site in verification.sites)
    headings = ["evaluation", "training", *["gradients"] * measured, "statistics"]
    table = _table("Sites that differ most", *headings, right_aligned={1, 2, 3, 4})
    ranked = sorted(verification.sites, key=_max_error, reverse=True)
    for site in ranked[:limit]:
        gradients = [_format_number(site.gradients)] if measured else []
        errors = [
            _format_number(site.evaluation),
            _format_number(site.training),
            *gradients,
            _format_number(site.statistics),
        ]
        table.add_row(Text(site.fqn, overflow="fold"), *errors)
    return table


def site_table(sites: Sequence[NormSite], plan: SwapPlan) -> RenderableType:
    """Return one row per site in order of execution: class, channels, input shape and branches."""
    swaps = {swap.fqn: swap for swap in plan.swaps}
    table = _table("Site", "class", "C", "input", "becomes", right_aligned={2})
    for site in sites:
        swap = swaps.get(site.fqn)
        becomes = Text("+".join(swap.branches) + _describe_start(swap)) if swap else Text("stays", "dim")
        shapes = ["x".join(map(str, shape)) for shape in site.shapes or ()]
        input_shape = " ".join(shapes[:1]) + (f" +{len(shapes) - 1}" if len(shapes) > 1 else "")
        table.add_row(
            Text(site.fqn or "(the model)", overflow="fold"),
            Text(
                _short_class(site.class_name) if swap else _display_class(site.class_name), "dim", overflow="ellipsis"
            ),
            str(site.num_features or ""),
            input_shape or ("" if site.shapes is None else "did not run"),
            becomes,
        )
    return table


def importance_table(weights: Mapping[str, SiteWeights], plan: SwapPlan | None = None) -> RenderableType:
    """Return the importance weights of every site, for means and for variances.

    Args:
        plan: the plan of the conversion; with it the number of unchanged sites is added.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("Importance weights", header_style="bold not dim")
    for kind in ("mean", "var"):
        for branch in BRANCHES:
            table.add_column(f"{kind} {branch}", justify="right")
    for fqn, site_weights in weights.items():
        table.add_row(
            Text(fqn or "(the model)", overflow="fold"),
            *(_format_weight(side.get(branch)) for side in site_weights for branch in BRANCHES),
        )
    if plan is None:
        return table
    initial = {swap.fqn: swap.vertex for swap in plan.swaps if swap.start is None}
    unchanged = sum(
        fqn in initial and all(side.get(initial[fqn]) == 1 for side in site_weights)
        for fqn, site_weights in weights.items()
    )
    return Group(
        table, Text(f"  {unchanged} of {len(weights)} sites still compute exactly the norm they replaced", "dim")
    )


def predicted_bake_table(counts: Mapping[float, Mapping[str, int]]) -> RenderableType:
    """Return how many sites a bake would make plain norms, by the tolerance within which an importance counts as 1."""
    columns = ("BatchNorm", "GroupNorm", "InstanceNorm", "mix")
    table = _table("Predicted bake, tolerance", *columns, right_aligned={1, 2, 3, 4})
    for tolerance, found in counts.items():
        table.add_row(f"{tolerance:g}", *(str(found[name]) for name in ("bn", "ln", "in", "mix")))
    return table


def history(steps: Iterable[Step]) -> RenderableType:
    """Return the history of a model, one row per step."""
    table = _table("History", "when (UTC)", "by", "from")
    for step in steps:
        source = f"{step.source}{f' ({step.sha256[:12]})' if step.sha256 else ''}" if step.source else ""
        source = ", ".join(part for part in (source, step.detail) if part)
        when = step.date.removesuffix("+00:00").replace("T", " ")
        table.add_row(Text(step.action), Text(when), Text(f"normswap {step.normswap}"), Text(source, overflow="fold"))
    return table


def calibration_table(calibration: Calibration, limit: int = 10) -> RenderableType:
    """Return the layers whose statistics changed most, a line for the others, and the skipped layers."""
    table = _table("Statistics that changed most", "values", "mean by", "std x", "shift", right_aligned={1, 2, 3, 4})
    ranked = sorted(calibration.layers, key=lambda layer: layer.shift, reverse=True)
    for layer in ranked[:limit]:
        factor = 1 / layer.deviation_ratio if layer.deviation_ratio else math.inf
        numbers = (f"{layer.values:,}", f"{layer.mean_shift:.3g}", f"{factor:.3g}", f"{layer.shift:.3g}")
        table.add_row(Text(layer.fqn or "(the model)", overflow="fold"), *numbers)
    if ranked[limit:]:
        table.add_row(Text(f"{len(ranked) - limit} more, at most", "dim"), "", "", "", f"{ranked[limit].shift:.3g}")
    reasons: dict[str, list[str]] = {}
    for skipped_layer in calibration.skipped:
        reasons.setdefault(skipped_layer.reason, []).append(skipped_layer.fqn)
    lines: list[RenderableType] = [
        table,
        Text("  in standard deviations; shift: the largest change of a normalized value", "dim"),
    ]
    if reasons:
        lines_by_reason = [
            f"{len(names)} skipped, {reason}: {_format_examples(names)}" for reason, names in reasons.items()
        ]
        lines += [Text(""), bullets(lines_by_reason)]
    return Group(*lines)


def bullets(notes: Iterable[str]) -> RenderableType:
    """Return notes as a list with a hanging indent."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    for note in notes:
        table.add_row(Text("note", "yellow"), Text(note))
    return table


def _table(first: str, *others: str, right_aligned: set[int] | None = None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, header_style="bold not dim", no_wrap=False)
    for index, name in enumerate(others, start=1):
        table.add_column(name, justify="right" if index in (right_aligned or ()) else "left")
    return table


def _kinds_table(plan: SwapPlan) -> RenderableType:
    swapped, skipped = (Counter(item.class_name for item in side) for side in (plan.swaps, plan.skips))
    table = _table("Sites by kind", "found", "swapped", "skipped", right_aligned={1, 2, 3})
    rows = [(name, swapped[name], skipped[name]) for name in sorted({**swapped, **skipped})]
    if len(rows) != 1:
        rows.append(("", len(plan.swaps), len(plan.skips)))
    for name, num_swapped, num_skipped in rows:
        kind = Text.assemble(_short_class(name), (f"  {name.partition('.')[0]}", "dim")) if name else Text("all", "dim")
        kind = (
            Text(_display_class(name)) if num_skipped and name and _display_class(name) != _short_class(name) else kind
        )
        table.add_row(kind, str(num_swapped + num_skipped), str(num_swapped), str(num_skipped))
    return table


def _decisions_table(plan: SwapPlan) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(ratio=1)
    groups: dict[tuple[str, str], list[str]] = {}
    for swap in plan.swaps:
        groups.setdefault(("swap", _describe(swap)), []).append(swap.fqn)
    for skip in plan.skips:
        groups.setdefault(("skip", skip.reason), []).append(
            f"{skip.fqn or '(the model)'} ({_display_class(skip.class_name)})"
        )
    for (decision, reason), names in groups.items():
        everything = decision == "swap" and len(names) == len(plan.swaps) and not plan.skips
        what = Text.assemble(reason, ("" if everything else f"\n{_format_examples(names)}", "dim"))
        table.add_row(str(len(names)), Text(decision, "green" if decision == "swap" else "yellow"), what)
    return table


def _describe(swap: Swap) -> str:
    statistics = f", {swap.bn_statistics} statistics" if "bn" in swap.branches else ""
    groups = f", `ln` of {swap.num_groups} groups" if swap.num_groups > 1 else ""
    parts = [f"{'+'.join(swap.branches)}, {swap.gate} gate{statistics}{groups}{', matched' * swap.matched}"]
    omitted = [branch for branch in BRANCHES if branch not in swap.branches]
    if swap.start is not None:
        parts.append(f"starts at {_STARTS[swap.start]}, without `bn`: another function")
        omitted.remove("bn")
    parts += [_OMITTED_BRANCHES[branch] for branch in omitted]
    if swap.untrained:
        parts.append("its running statistics were never updated")
    if not swap.train_gates and len(swap.branches) > 1:
        parts.append("frozen together with its importance weights")
    if swap.owner is not None:
        parts.append("a call of F.batch_norm; the forward of its module is rewritten")
    return "; ".join(parts)


_STARTS = {"ln": "layer norm", "gn": "group norm", "uniform": "equal weights"}


def _describe_start(swap: Swap) -> str:
    """The start of a swap and whether its statistics were never updated, for a narrow column."""
    return (f", at {swap.start}" if swap.start else "") + ", untrained" * swap.untrained


def _format_examples(names: list[str]) -> str:
    shown = ", ".join(name or "(the model)" for name in names[:_MAX_EXAMPLES])
    return shown + (f" +{len(names) - _MAX_EXAMPLES}" if len(names) > _MAX_EXAMPLES else "")


def _format_number(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.1e}"


def _max_error(site: SiteError) -> float:
    return max(error or 0.0 for error in (site.evaluation, site.training, site.gradients, site.statistics))


def _format_weight(value: float | None) -> RenderableType:
    if value is None:
        return Text("-", "dim")
    return Text(f"{value:.2f}", "dim" if value == 0 else "")


def _display_class(class_name: str) -> str:
    """The full name of a class, but only the last part for torch's own classes."""
    return _short_class(class_name) if class_name.startswith("torch.nn.") else class_name


def _short_class(class_name: str) -> str:
    return class_name.rpartition(".")[2]


# --- architectures ----------------------------------------------------------------------------------------------------

_MAX_ALIASES = 4


def identification(found: Identification) -> RenderableType:
    """Return the architectures that fit, one row per function with its differences, or the nearest ones."""
    parts = _functions_table(found) if found.candidates else _matches_table(found)
    names = [Text(f"  tensor names: those of {found.layout}", "dim")] if found.layout else []
    return Group(*parts, *names, Text(f"  searched: the models of {found.origin}", "dim"))


def _functions_table(found: Identification) -> list[RenderableType]:
    several = len(found.functions) > 1
    differences = found.differences()
    table = _borderless_table("Architecture", "differs in" if several else "", "also called")
    for group in found.functions:
        first, *others = group
        note_lines = [f"{kind}: {value}" for kind, value in differences[first.architecture].items()]
        table.add_row(
            Text(first.architecture, overflow="fold"),
            Text("\n".join(note_lines) if several else "", overflow="fold"),
            Text(_aliases(others), "dim", overflow="fold"),
        )
    notes = dict.fromkeys(describe_mismatches(group[0]) for group in found.functions)
    return [table, *(Text(f"  {note}", "dim") for note in notes)]


def _matches_table(found: Identification) -> list[RenderableType]:
    table = _borderless_table("Nearest architecture", "mismatches", "tensors")
    for match in found.matches:
        table.add_row(
            Text(match.architecture, overflow="fold"),
            str(match.num_mismatches),
            Text(describe_mismatches(match), overflow="fold"),
        )
    return [table] if found.matches else []


def _aliases(others: list[Candidate]) -> str:
    more = f" +{len(others) - _MAX_ALIASES}" if len(others) > _MAX_ALIASES else ""
    return ", ".join(other.architecture for other in others[:_MAX_ALIASES]) + more


def _borderless_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, header_style="dim" if number else "bold not dim")
    return table


# --- files of unknown architecture ------------------------------------------------------------------------------------

_MAX_GROUPS = 24
_MAX_NAMES = 3


def weights_table(weights: WeightsSurvey) -> RenderableType:
    """Return the size of one set of weights, and its norms by the module that contains them."""
    title = Text.assemble((weights.entry or "Weights", "bold"), "  ", (_describe_weights(weights), "dim"))
    if not weights.norms:
        return Group(title, Text("  no norm tensors", "yellow"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("Norms in", "batch", "other", "channels", "names"):
        table.add_column(name, justify="right" if name in ("batch", "other", "channels") else "left")
    groups = [*weights.groups().items()]
    for name, norms in groups[:_MAX_GROUPS]:
        table.add_row(
            Text(name or "(outermost)", overflow="fold"),
            *(str(count or "") for count in _counts(norms)),
            _channels(norms),
            Text(_names(norms), "dim", overflow="fold"),
        )
    rest = [norm for _, norms in groups[_MAX_GROUPS:] for norm in norms]
    if rest:
        table.add_row(Text(f"{len(groups) - _MAX_GROUPS} more", "dim"), *(str(n or "") for n in _counts(rest)), "", "")
    return Group(title, table, Text(f"  {_describe_total(weights)}", "dim"))


def _describe_weights(weights: WeightsSurvey) -> str:
    parts = [f"{weights.tensors:,} tensors", f"{weights.parameters:,} parameters", f"{weights.bytes / 1e6:.1f} MB"]
    return ", ".join(parts + ([f"all names start with {weights.prefix}"] if weights.prefix else []))


def _counts(norms: "list[NormTensors] | tuple[NormTensors, ...]") -> tuple[int, int]:
    batch = sum(norm.statistics for norm in norms)
    return batch, len(norms) - batch


def _describe_total(weights: WeightsSurvey) -> str:
    batch, other = _counts(weights.norms)
    converted = sum(norm.converted for norm in weights.norms)
    parts = [f"{batch} batch norms with running statistics"]
    parts += [f"{other} norms without running statistics (LayerNorm, GroupNorm, ...)"] if other else []
    parts += [f"{converted} already converted"] if converted else []
    return ", ".join(parts)


def _channels(norms: tuple[NormTensors, ...]) -> str:
    sizes = sorted({norm.channels for norm in norms})
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _names(norms: tuple[NormTensors, ...]) -> str:
    shown = ", ".join(norm.fqn for norm in norms[:_MAX_NAMES])
    return shown + (f" +{len(norms) - _MAX_NAMES}" if len(norms) > _MAX_NAMES else "")
