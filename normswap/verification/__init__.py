"""Verify that a converted model computes the same function as the original one."""

from normswap.renamed import old_names

__getattr__ = old_names("normswap.verification")  # it was a module once
