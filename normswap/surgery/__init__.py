"""Finding norm sites, planning, swapping, rewriting and reverting."""
