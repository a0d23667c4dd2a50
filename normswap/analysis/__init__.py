"""Label-free measurements: what batch statistics do to a BN network, and which branch each converted site needs."""
