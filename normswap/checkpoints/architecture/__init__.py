"""Architectures by name, and the identification of the architecture of a state dict."""

from normswap.renamed import old_names

__getattr__ = old_names("normswap.checkpoints.architecture")  # it was a module once
