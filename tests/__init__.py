"""Tests of normswap: one folder for each package, `integration` for whole flows, `helpers` for shared code."""
