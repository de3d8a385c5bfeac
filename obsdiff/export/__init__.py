"""Stage two: masks made physical, graphs and engines, and the proof that they compute the same."""
