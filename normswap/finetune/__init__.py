"""What comes after a conversion: training the converted model."""
