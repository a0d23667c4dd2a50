"""The evidence: nine ways to fine-tune a BN network, on six tasks, at four batch sizes (`make evidence`)."""
