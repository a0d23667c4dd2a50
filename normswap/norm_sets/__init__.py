"""Norm states: the norms, gates and statistics of a network, one set for each domain or client."""
