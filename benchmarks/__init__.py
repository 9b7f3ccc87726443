"""Benchmarks: each is one command, one run, everything compared side by side in it."""
