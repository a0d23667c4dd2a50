"""Build the index of architectures and measure how well models are identified by their tensors."""
