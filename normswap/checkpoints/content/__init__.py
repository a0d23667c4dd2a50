"""What a checkpoint contains: state dicts, optimizer states, key prefixes, and how weights load into a model."""
