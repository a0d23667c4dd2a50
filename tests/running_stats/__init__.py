"""Tests of `normswap.running_stats`."""
