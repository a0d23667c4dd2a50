"""The six settings: what is fine-tuned on what."""
