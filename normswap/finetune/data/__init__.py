"""Data sets and loaders of a fine-tuning run."""
