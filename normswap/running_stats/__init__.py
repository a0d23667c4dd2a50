"""Running statistics: calibrate them on data, freeze, unfreeze, share and re-estimate them."""
