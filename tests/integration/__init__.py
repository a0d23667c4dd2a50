"""Tests of whole flows: model zoo, laws of a conversion, documentation, packaging, imports, wording, benchmarks."""
