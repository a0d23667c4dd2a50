"""Tests of `normswap.checkpoints`."""
