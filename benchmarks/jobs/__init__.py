"""Every recipe of a job, in four forms: BN in training, frozen BN, matched GroupNorm, normswap."""
