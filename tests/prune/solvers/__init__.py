"""Tests of obsdiff.prune.solvers."""
