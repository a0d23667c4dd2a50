"""Rules of baking, one a file: a pattern, a check, and a replacement."""
