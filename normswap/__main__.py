"""Run the command `normswap` with `python -m normswap`."""

from normswap.cli import main

main()
