"""The contents of a checkpoint: state dicts, optimizer states, key prefixes, and how weights load into a model."""
