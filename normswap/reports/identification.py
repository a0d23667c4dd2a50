"""Tables of which architectures a state dict can belong to, for the terminal, as rich renderables."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from normswap.checkpoints.identification import Candidate, Identification, describe_misfits

_MOST_ALIASES = 4


def identification(found: Identification) -> RenderableType:
    """Return what fits, one row per function with what sets it apart, or the nearest ones with misfits."""
    parts = _functions(found) if found.candidates else _matches(found)
    return Group(*parts, Text(f"  known: the models of {found.origin}", "dim"))


def _functions(found: Identification) -> list[RenderableType]:
    several = len(found.functions) > 1
    differences = found.differences()
    table = _table("Architecture", "differs in" if several else "", "also called")
    for group in found.functions:
        first, *others = group
        told = [f"{kind}: {value}" for kind, value in differences[first.architecture].items()]
        table.add_row(
            Text(first.architecture, overflow="fold"),
            Text("\n".join(told) if several else "", overflow="fold"),
            Text(_aliases(others), "dim", overflow="fold"),
        )
    notes = dict.fromkeys(describe_misfits(group[0]) for group in found.functions)
    return [table, *(Text(f"  {note}", "dim") for note in notes)]


def _matches(found: Identification) -> list[RenderableType]:
    table = _table("Nearest architecture", "misfits", "tensors")
    for match in found.matches:
        table.add_row(
            Text(match.architecture, overflow="fold"),
            str(match.misfits),
            Text(describe_misfits(match), overflow="fold"),
        )
    return [table] if found.matches else []


def _aliases(others: list[Candidate]) -> str:
    more = f" +{len(others) - _MOST_ALIASES}" if len(others) > _MOST_ALIASES else ""
    return ", ".join(other.architecture for other in others[:_MOST_ALIASES]) + more


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, header_style="dim" if number else "bold not dim")
    return table
