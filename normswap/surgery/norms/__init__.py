"""Norm classes and functions that normswap knows, and which modules may be norms of unknown classes."""
