"""Measure the time and memory of the layer, of networks, of conversion and of compilation."""
