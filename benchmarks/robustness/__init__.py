"""Damage files, kill runs and change sources during a conversion; run the C extension under sanitizers."""
