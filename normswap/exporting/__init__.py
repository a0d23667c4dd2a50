"""Converted networks as files that run without normswap: ONNX, exported programs, state dicts."""
