"""Tests of bad input on the command line."""
