"""Read checkpoint files into models and write converted models into files."""
