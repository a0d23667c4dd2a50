"""Training a converted model in your own loop: parameter groups, watching importance weights, live conversion."""
