"""Atomic writes, digests of contents, and memory of mapped files."""
