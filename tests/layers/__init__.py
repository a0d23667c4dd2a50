"""Tests of `normswap.layers`."""
