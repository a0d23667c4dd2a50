"""Fine-tuning by recipe: the recipe file, the trainer, the data, the files of a run."""
