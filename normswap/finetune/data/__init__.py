"""Data sets and loaders of a fine-tuning run."""

from normswap.renamed import old_names

__getattr__ = old_names("normswap.finetune.data")  # it was a module once
