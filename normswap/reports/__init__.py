"""Tables of results for the terminal and notebooks."""
