"""Quantizers to compare with, one file each, found by itself: see `qgen.bench.peer`. Packages are imported inside functions."""
