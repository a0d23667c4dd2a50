"""Tests of whole flows: model zoo, guarantees, documentation, packaging, imports, wording, benchmarks."""
