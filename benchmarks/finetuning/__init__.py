"""Fine-tune converted networks and compare them with other ways to train at small batch sizes."""
