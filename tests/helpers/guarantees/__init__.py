"""The guarantees of a conversion (docs/architecture.md) as functions that every conversion test calls.

They use no code of the package for comparisons, float64 arithmetic and the walk over modules. A broken guarantee
raises AssertionError with the value and the place.
"""

from tests.helpers.guarantees.accounting import accounted_for, norm_calls
from tests.helpers.guarantees.all_guarantees import check_all
from tests.helpers.guarantees.equivalence import distance, same_function
from tests.helpers.guarantees.gate_gradients import Visit, alive, share_gradients
from tests.helpers.guarantees.round_trips import converting_twice_changes_nothing, plan_survives_json, reverts
from tests.helpers.guarantees.unchanged import Record, nothing_else_changed
from tests.helpers.guarantees.walking import GATES, LIMIT, NO_SWAPS, call, in_float64, own_tensors, paths, to_float64

__all__ = [
    "GATES",
    "LIMIT",
    "NO_SWAPS",
    "Record",
    "Visit",
    "accounted_for",
    "alive",
    "call",
    "check_all",
    "converting_twice_changes_nothing",
    "distance",
    "in_float64",
    "norm_calls",
    "nothing_else_changed",
    "own_tensors",
    "paths",
    "plan_survives_json",
    "reverts",
    "same_function",
    "share_gradients",
    "to_float64",
]
