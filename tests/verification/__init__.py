"""Tests of `normswap.verification`."""
