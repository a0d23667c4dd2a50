"""Tests of `normswap.verification.equivalence`."""
