"""Tests of `normswap.baking`."""
