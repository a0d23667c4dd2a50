"""Tests of `normswap.finetune`."""
