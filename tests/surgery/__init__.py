"""Tests of `normswap.surgery`."""
