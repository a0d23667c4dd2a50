"""Tests of `normswap.integrations`; each is skipped if its library is not installed. `make integrations` runs all."""
