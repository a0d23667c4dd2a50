"""Verify that a converted model computes the same function as the original."""

from normswap.renamed import old_names

__getattr__ = old_names("normswap.verification")  # 0.1.0 had a module of this name
