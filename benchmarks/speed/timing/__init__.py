"""Time works in rounds until their ratios are certain enough."""
