"""Shared by tests: models, files, oracles, laws, and scripts that tests run as processes."""
