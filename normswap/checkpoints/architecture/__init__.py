"""Architectures by name, and the identification of the architecture of a state dict."""
