"""Tests of `normswap.reports`."""
