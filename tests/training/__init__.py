"""Tests of `normswap.training`."""
