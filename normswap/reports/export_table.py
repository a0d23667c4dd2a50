"""The table of an exported file: what it is, which sizes are free, and how far its outputs are from the network's."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from normswap.checkpoints.reading import describe_size
from normswap.exporting.export_options import Exported
from normswap.reports.tables import bullets, heading

_KINDS = {
    "onnx": "ONNX",
    "pt2": "program of torch.export",
    "state-dict": "weights for the original architecture",
    "published-layout": "weights in the published layout of SN",
}


def export_table(result: Exported) -> RenderableType:
    """Return what was written, the free dimensions, the error of each case, and the notes."""
    parts: list[RenderableType] = [heading(result.path.name, _KINDS[result.to]), Text(""), _facts(result)]
    if result.cases:
        parts += [Text(""), _cases(result)]
    if result.notes:
        parts += [Text(""), bullets(result.notes)]
    return Group(*parts)


def _facts(result: Exported) -> RenderableType:
    table = Table.grid(padding=(0, 3))
    table.add_row(Text("Size", "bold"), f"{describe_size(result.path)} in {result.dtype}")
    if result.opset is not None:
        folded = ", BatchNorm folded" if result.folded else ", nothing folded"
        table.add_row(Text("Operators", "bold"), f"{result.nodes:,} nodes, opset {result.opset}{folded}")
    if result.free:
        bounds = (f"{size.name} >= {size.at_least}" for size in result.free)
        table.add_row(Text("Free sizes", "bold"), ", ".join(bounds))
    table.add_row(Text("Time", "bold"), f"{result.seconds:.1f} s")
    return table


def _cases(result: Exported) -> RenderableType:
    title = "Outputs against the network" if result.to == "published-layout" else "Outputs without normswap"
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(title)
    table.add_column("error", justify="right")
    table.add_column("limit", justify="right")
    for case in result.cases:
        table.add_row(Text(case.inputs, overflow="fold"), f"{case.relative_error:.1e}", f"{case.limit:.0e}")
    return Group(table, Text("  relative L2, compared with the network in evaluation", "dim"))
