"""Measurements: latency, quality, and the report that shows them."""
