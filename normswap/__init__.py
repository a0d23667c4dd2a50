"""normswap."""
