"""Find norm sites, plan swaps, apply a plan to a model, and revert it."""
