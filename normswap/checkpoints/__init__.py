"""Reading files into models and writing models into files, with plan, architecture and proof beside the tensors."""
