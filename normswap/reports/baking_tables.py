"""Tables of baked networks: what the sites became, and what changed."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from normswap.baking.bake_plan import BakeMeasurement, BakePlan
from normswap.surgery.plan import list_names

_NAMES = {
    "folded": "folded into the layer before",
    "batch norm": "BatchNorm",
    "group norm": "GroupNorm",
    "instance norm": "InstanceNorm",
    "compact": "compact layer, no gates",
    "kept": "kept with gates",
}


def bake_table(plan: BakePlan) -> RenderableType:
    """Return the number of sites by what they became, and the reasons."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("Baked sites", header_style="bold not dim")
    table.add_column("sites", justify="right")
    for name, count in plan.counts.items():
        if count:
            table.add_row(_NAMES[name], str(count))
    lines: list[RenderableType] = [table]
    reasons: dict[str, list[str]] = {}
    for site in plan.sites:
        if site.reason is not None:
            reasons.setdefault(f"{'kept' if site.result == 'kept' else 'not folded'}: {site.reason}", []).append(
                site.fqn
            )
    lines += [Text(f"  {len(fqns)} {reason}: {list_names(fqns)}", "dim") for reason, fqns in reasons.items()]
    return Group(*lines)


def bake_measurement_table(measurement: BakeMeasurement | None) -> RenderableType:
    """Return the measured output error and the time before and after."""
    if measurement is None:
        return Text.assemble(("Measured", "bold"), "  ", ("nothing: no example inputs", "yellow"))
    before, after = measurement.seconds_before * 1e3, measurement.seconds_after * 1e3
    won = f"{1 - after / before:.0%} less" if after <= before else f"{after / before - 1:.0%} more"
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_row(Text("Measured", "bold"), f"on {measurement.inputs}, in evaluation")
    table.add_row("output error", f"{measurement.relative_error:.1e} (relative L2)")
    table.add_row("time", f"{before:.1f} ms -> {after:.1f} ms, {won}")
    return table
