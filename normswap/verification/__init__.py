"""Verify that a converted model computes the same function as the original one."""
