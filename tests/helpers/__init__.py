"""Shared by tests: models, files, oracles, guarantees, and scripts that tests run as processes."""
