"""`python -m normswap` is the command `normswap`."""

from normswap.cli import main

main()
