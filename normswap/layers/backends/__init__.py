"""Backends of the layer: plain torch (the reference), CPU kernels, Triton kernels, and the choice between them."""
