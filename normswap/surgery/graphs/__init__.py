"""FX graphs: tracing, rewriting of forward methods, whole models as graphs, exported programs."""
