"""Formats that normswap neither reads nor writes: their names for error messages, by suffix or by first bytes."""

import codecs
import json
import re
from contextlib import suppress

# Suffixes of other formats for models and arrays.
UNSUPPORTED_SUFFIXES = {
    ".onnx",
    ".h5",
    ".hdf5",
    ".keras",
    ".tflite",
    ".pb",
    ".gguf",
    ".npz",
    ".npy",
    ".json",
    ".mlmodel",
    ".engine",
}
# The first bytes of other formats.
_OTHER_MAGIC_BYTES = {
    b"\x89PNG": "an image (PNG)",
    b"\xff\xd8\xff": "an image (JPEG)",
    b"GIF8": "an image (GIF)",
    b"\x89HDF": "an HDF5 file, as Keras writes: load it with its own library and torch.save the weights",
    b"\x93NUMPY": "a numpy array: torch.save a state dict of tensors",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"GGUF": "a GGUF file, which holds quantised tensors: convert the model before its quantization",
    b"\x7fELF": "a program",
    b"%PDF": "a PDF document",
}
_ONNX = re.compile(rb"\x08.[\x12:]", re.DOTALL)  # the version of the format, then the producer


def describe_bytes(head: bytes) -> str:
    """Return what a file probably is by its first bytes, and what to do with it; for error messages."""
    other = next((name for start, name in _OTHER_MAGIC_BYTES.items() if head.startswith(start)), None)
    if other is not None:
        return other
    if _ONNX.match(head):
        return "probably ONNX: convert the Python model, then export it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: fetch the real file with git lfs pull"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page: the download failed, try it again"
    # An incremental decoder, since the first bytes may end inside a character.
    with suppress(UnicodeDecodeError):
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
        if "".join(text.split()).isprintable():
            return f"text ({json.dumps(text[:20])}...)"
    return f"an unknown format ({head[:8].hex(' ')} ...)"
