"""Norm classes and functions that normswap knows, and which modules may be norms of unknown classes."""

from normswap.renamed import old_names

__getattr__ = old_names("normswap.surgery.norms")  # it was a module once
