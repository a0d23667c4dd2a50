"""Tasks: what a run trains for. Each task opens its data, and defines loss and metrics."""
