"""The bake plan: what each site became, and why, without tensors."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from normswap.errors import PlanError
from normswap.schema import SchemaError, read_record
from normswap.text import pluralize, printable_as

Result = Literal["batch norm", "group norm", "instance norm", "compact", "kept"]


@dataclass(frozen=True)
class BakedSite:
    """A site of a baked network.

    Attributes:
        fqn: the name of the site.
        result: what it became: a plain norm, a compact layer, or what it was (`kept`).
        class_name: the class that it has now.
        mean, var: the importance weights that were fixed, by branch; empty for a site without gates.
        folded_into: the layer that took up the norm, None if it was not folded.
        reason: why it was kept, or not folded; None if there is nothing to explain.
    """

    fqn: str
    result: Result
    class_name: str
    mean: Mapping[str, float]
    var: Mapping[str, float]
    folded_into: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class BakeMeasurement:
    """What a bake changed, on the example inputs.

    Attributes:
        relative_error: the relative L2 error of all outputs, baked against converted.
        seconds_before, seconds_after: one forward pass in evaluation, the median of several, measured by turns.
        inputs: the shapes of the inputs.
    """

    relative_error: float
    seconds_before: float
    seconds_after: float
    inputs: str


@printable_as("bake_plan")
@dataclass(frozen=True, repr=False)
class BakePlan:
    """What each site of a network became; `print` shows it as a table.

    Attributes:
        sites: one entry per site, in the order of the network.
        tolerance: the largest importance weight that was dropped at decided sites.
        measurement: error and time on the example inputs, None without inputs.

    Examples:
        >>> import torch, normswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> plan = normswap.bake(normswap.convert(model).model, fold=True).plan
        >>> plan.sites[0].result, plan.sites[0].folded_into
        ('batch norm', '0')
        >>> normswap.BakePlan.from_json(plan.to_json()) == plan
        True
    """

    sites: tuple[BakedSite, ...]
    tolerance: float = 0.0
    measurement: BakeMeasurement | None = None

    __module__ = "normswap"

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {result}" for result, count in self.counts.items() if count)
        return f"BakePlan({pluralize(len(self.sites), 'site')}: {counts or 'nothing baked'})"

    @property
    def counts(self) -> dict[str, int]:
        """The number of sites by what they became; `folded` counts those that became part of another layer."""
        names = ("batch norm", "group norm", "instance norm", "compact", "kept")
        counts = {name: sum(s.result == name and s.folded_into is None for s in self.sites) for name in names}
        return {"folded": sum(site.folded_into is not None for site in self.sites), **counts}

    @property
    def is_plain(self) -> bool:
        """Whether every site is its old Batch Normalization, so that the original architecture loads the weights."""
        return all(site.result == "batch norm" and site.folded_into is None for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain lists, dicts, strings and numbers."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the plan as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the plan in a JSON text.

        Raises:
            PlanError: it is not JSON, or a field is missing, unknown or of a wrong type.
        """
        try:
            return read_record(cls, json.loads(text), "the bake plan")
        except (ValueError, RecursionError, SchemaError) as error:
            raise PlanError(f"expected a bake plan as JSON, as BakePlan.to_json() writes it; {error}") from None
