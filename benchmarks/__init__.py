"""Measurements of normswap: run each program from the repository root, for example `python -m benchmarks.zoo.run`."""
