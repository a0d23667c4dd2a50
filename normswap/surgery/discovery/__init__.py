"""Find norm sites: in the module tree, in a graph, and in one observed forward pass."""
