"""Tests of `normswap.checkpoints.derived`."""
