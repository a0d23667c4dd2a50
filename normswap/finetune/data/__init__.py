"""The images of a fine-tuning run: data sets, loaders, scikit-learn's digits."""

from normswap.renamed import old_names

__getattr__ = old_names("normswap.finetune.data")  # the path of a module in 0.1.0
