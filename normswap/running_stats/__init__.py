"""Calibrate, freeze, unfreeze, synchronize and update running statistics."""
