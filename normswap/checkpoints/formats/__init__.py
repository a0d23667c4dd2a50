"""File formats of checkpoints, and checks that refuse damaged or unsafe files before a reader opens them."""
