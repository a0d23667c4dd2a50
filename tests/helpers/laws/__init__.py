"""The laws of a conversion (docs/architecture.md) as functions that every conversion test calls.

Written on their own: comparisons, float64 arithmetic and the walk over modules are not the package's. A broken law
raises AssertionError with the figure and the place.
"""

from tests.helpers.laws.accounting import accounted_for, norm_calls
from tests.helpers.laws.all_laws import hold
from tests.helpers.laws.equivalence import distance, same_function
from tests.helpers.laws.gate_gradients import Visit, alive, share_gradients
from tests.helpers.laws.round_trips import converting_twice_changes_nothing, plan_survives_json, reverts
from tests.helpers.laws.unchanged import Record, nothing_else_changed
from tests.helpers.laws.walking import GATES, LIMIT, NO_SWAPS, call, in_float64, own_tensors, paths, to_float64

__all__ = [
    "GATES",
    "LIMIT",
    "NO_SWAPS",
    "Record",
    "Visit",
    "accounted_for",
    "alive",
    "call",
    "converting_twice_changes_nothing",
    "distance",
    "hold",
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
