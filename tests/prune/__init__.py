"""Tests of obsdiff.prune."""
