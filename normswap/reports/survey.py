"""Tables of what a file shows without an architecture, for the terminal, as rich renderables."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from normswap.checkpoints.survey import NormTensors, WeightsSurvey

_MOST_GROUPS = 24
_MOST_NAMES = 3


def weights_table(weights: WeightsSurvey) -> RenderableType:
    """Return one set of weights: how many tensors and parameters, and its norms by the module around them."""
    title = Text.assemble((weights.entry or "Weights", "bold"), "  ", (_described(weights), "dim"))
    if not weights.norms:
        return Group(title, Text("  no norm tensors", "yellow"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("Norms in", "batch", "other", "channels", "names"):
        table.add_column(name, justify="right" if name in ("batch", "other", "channels") else "left")
    groups = [*weights.groups().items()]
    for name, norms in groups[:_MOST_GROUPS]:
        table.add_row(
            Text(name or "(outermost)", overflow="fold"),
            *(str(count or "") for count in _counts(norms)),
            _channels(norms),
            Text(_names(norms), "dim", overflow="fold"),
        )
    rest = [norm for _, norms in groups[_MOST_GROUPS:] for norm in norms]
    if rest:
        table.add_row(Text(f"{len(groups) - _MOST_GROUPS} more", "dim"), *(str(n or "") for n in _counts(rest)), "", "")
    return Group(title, table, Text(f"  {_total(weights)}", "dim"))


def _described(weights: WeightsSurvey) -> str:
    parts = [f"{weights.tensors:,} tensors", f"{weights.parameters:,} parameters", f"{weights.bytes / 1e6:.1f} MB"]
    return ", ".join(parts + ([f"all names begin with {weights.prefix}"] if weights.prefix else []))


def _counts(norms: "list[NormTensors] | tuple[NormTensors, ...]") -> tuple[int, int]:
    batch = sum(norm.statistics for norm in norms)
    return batch, len(norms) - batch


def _total(weights: WeightsSurvey) -> str:
    batch, other = _counts(weights.norms)
    converted = sum(norm.converted for norm in weights.norms)
    parts = [f"{batch} batch norms with running statistics"]
    parts += [f"{other} norms without (LayerNorm, GroupNorm, ...)"] if other else []
    parts += [f"{converted} with importance weights already"] if converted else []
    return ", ".join(parts)


def _channels(norms: tuple[NormTensors, ...]) -> str:
    sizes = sorted({norm.channels for norm in norms})
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _names(norms: tuple[NormTensors, ...]) -> str:
    shown = ", ".join(norm.fqn for norm in norms[:_MOST_NAMES])
    return shown + (f" +{len(norms) - _MOST_NAMES}" if len(norms) > _MOST_NAMES else "")
