"""Measure exported files: outputs, nodes, time, speed in onnxruntime and OpenVINO, and int8."""
